"""Memory that one layer is decoded into, shared by all layers.

Many query rows read the same past - a chunk of video frames, a chunk of a prompt - so decoding it
once for all of them costs little, and at any time only one layer is there in full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sage_diffusion.kv.layer import Layer

_LEAST, _TILES = 64, 32


class Scratch:
    """Two tensors that every :meth:`fill` writes anew, token by token as video hosts have them."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor] | None = None

    def fill(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """All K and V of a layer ``[B, H, T, D]``, tile by tile; views that the next call changes.

        In memory a token's heads lie side by side: ``.transpose(1, 2)`` is ``[B, T, H, D]`` as
        Wan's attention wants it.

        Raises:
            ValueError: the layer has no tokens.
        """
        if layer.tokens == 0:
            raise ValueError(f"layer {layer.number} has no tokens to read")
        start = 0
        # Small tiles: what decoding one allocates comes on top of everything.
        for tile in layer.tiles(max(_LEAST, layer.tokens // _TILES)):
            if start == 0:
                self._make_room(tile, layer)
            assert self._held is not None
            stop = start + tile[0].shape[2]
            for held, part in zip(self._held, tile, strict=True):
                held[:, start:stop].copy_(part.transpose(1, 2))
            start = stop
        assert self._held is not None
        k, v = self._held
        return k[:, :start].transpose(1, 2), v[:, :start].transpose(1, 2)

    def _make_room(self, like: tuple[Tensor, Tensor], layer: Layer) -> None:
        """Exactly the layer's tokens: a video grows by a chunk, and one layer is soon allocated."""
        assert layer.body is not None
        dtype = layer.body.place.dtype
        if self._held is not None and all(
            held.shape[1] >= layer.tokens
            and (held.dtype, held.device) == (dtype, part.device)
            and (held.shape[0], *held.shape[2:]) == (*part.shape[:2], part.shape[3])
            for held, part in zip(self._held, like, strict=True)
        ):
            return
        self._held = None  # before the new ones: both at once would be the peak
        k, v = (
            torch.empty(
                x.shape[0], layer.tokens, x.shape[1], x.shape[3], dtype=dtype, device=x.device
            )
            for x in like
        )
        self._held = k, v

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(x.untyped_storage().nbytes() for x in self._held or ())

    def clear(self) -> None:
        """Give the memory back."""
        self._held = None
