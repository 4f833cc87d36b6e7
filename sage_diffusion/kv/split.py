"""One side whose channels have unequal widths: more bits to those of larger range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width
from sage_diffusion.kv.packed import Grouping, PackedSide


class SplitSide:
    """Equal shares of a head's channels, in the order of their range, each packed by its width.

    The first tokens say which channels are wide; the order holds for all that follow.

    Attributes:
        stores: of all shares, ``"0.codes"`` ..
        order: ``[H, D]`` int16, the channels of each head from the widest down; None before the
            first tokens.
    """

    def __init__(
        self, grouping: Grouping, widths: tuple[Width, ...], dim: int, room: dict[Any, Any]
    ):
        if dim % len(widths):
            raise ValueError(
                f"{len(widths)} shares of equal size must divide the head's {dim} channels"
            )
        self.grouping, self.dim = grouping, dim
        self.order: Tensor | None = None
        share = dim // len(widths)
        self.sides = [PackedSide(replace(grouping, width=width), share, room) for width in widths]
        self.stores = {
            f"{i}.{name}": store
            for i, side in enumerate(self.sides)
            for name, store in side.stores.items()
        }

    def _index(self, x: Tensor) -> Tensor:
        """The order for ``gather`` along the channels of ``x [B, H, n, D]``."""
        assert self.order is not None
        order = self.order.to(x.device, torch.int64)
        return order[None, :, None].expand(x.shape)

    def append(self, x: Tensor) -> None:
        """As :meth:`PackedSide.append`."""
        if self.order is None:
            spread = x.amax((0, 2)) - x.amin((0, 2))
            self.order = spread.argsort(dim=1, descending=True, stable=True).to(torch.int16)
        shares = x.gather(3, self._index(x)).chunk(len(self.sides), 3)
        for side, share in zip(self.sides, shares, strict=True):
            side.append(share)

    def read(self, start: int, stop: int) -> Tensor:
        """As :meth:`PackedSide.read`."""
        x = torch.cat([side.read(start, stop) for side in self.sides], 3)
        return torch.empty_like(x).scatter_(3, self._index(x), x)

    def scores(self, q: Tensor, start: int, stop: int) -> Tensor:
        """As :meth:`PackedSide.scores`."""
        shares = q.gather(3, self._index(q)).chunk(len(self.sides), 3)
        found = [
            side.scores(share, start, stop) for side, share in zip(self.sides, shares, strict=True)
        ]
        return torch.stack(found).sum(0)

    def cut(self, tokens: int) -> None:
        """As :meth:`PackedSide.cut`."""
        for side in self.sides:
            side.cut(tokens)
