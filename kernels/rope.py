"""Rotary position embeddings (RoFormer, 2104.09864) that a call hands over instead of applying.

Q and K are rotated where they are loaded to be quantized, in float32, so that no rotated tensor is
written and read again.  A host that rotates by itself rounds the result to the model's half type;
here it stays float32 up to its code, which is a little more exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """Tables of one rotation: channels (a, b) become ``(a cos - b sin, b cos + a sin)``.

    Attributes:
        cos, sin: ``[L, D]`` or ``[L, D / 2]`` float32, or ``[B, L, ..]`` where batch entries differ
            (B may be 1).  With D / 2 columns both channels of a pair share one.  Tokens that are
            not rotated have cos 1 and sin 0.
        interleaved: pairs are the channels (2i, 2i + 1), as Flux has them (diffusers:
            ``use_real_unbind_dim=-1``); otherwise (i, i + D / 2), as LLaMA (``-2``).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True

    def rows(self, start: int, stop: int) -> Rope:
        """Tables of some entries of the batch."""
        if self.cos.ndim == 2 or self.cos.shape[0] == 1:
            return self
        return self._replace(cos=self.cos[start:stop], sin=self.sin[start:stop])


def check_rope(rope: Rope, x: Tensor, name: str) -> None:
    """Raise unless the tables fit ``x`` ``[B, H, L, D]``, the call's ``name``."""
    if not isinstance(rope, Rope):
        raise TypeError(f"rope_{name} must be a Rope or None, got {type(rope).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have shape [B, H, L, D], got {tuple(x.shape)}")
    batch, _, length, dim = x.shape
    if dim % 2:
        raise ValueError(f"head_dim must be even to be rotated by rope_{name}, got {dim}")
    for part, table in (("cos", rope.cos), ("sin", rope.sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"rope_{name}.{part} must be a tensor, got {type(table).__name__}")
        shape = tuple(table.shape)
        if table.dtype != torch.float32:
            raise TypeError(f"rope_{name}.{part} must be float32, got {table.dtype}")
        if table.device != x.device:
            raise ValueError(
                f"rope_{name}.{part} must be on {name}'s device {x.device}, got {table.device}"
            )
        fits = shape[-2:] in ((length, dim), (length, dim // 2))
        if not fits or shape[:-2] not in ((), (1,), (batch,)):
            raise ValueError(
                f"rope_{name}.{part} must have shape [L, D], [L, D / 2] or the same behind B, "
                f"with B={batch}, L={length}, D={dim}, got {shape}"
            )
    if rope.cos.shape != rope.sin.shape:
        raise ValueError(
            f"rope_{name}'s cos and sin must have one shape, "
            f"got {tuple(rope.cos.shape)} and {tuple(rope.sin.shape)}"
        )


def apply_rope(x: Tensor, rope: Rope | None) -> Tensor:
    """``x`` ``[B, H, L, D]`` rotated, float32; the twin of the kernels' rotating loads.

    The same operations in the same order as diffusers' ``apply_rotary_emb`` before it rounds.
    """
    rows = x.float()
    if rope is None:
        return rows
    cos, sin = (_columns(table, x.shape[-1], rope.interleaved) for table in rope[:2])
    if rope.interleaved:
        a, b = rows.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], -1).flatten(-2)
    else:
        a, b = rows.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    return rows * cos + turned * sin


def rotated(x: Tensor, rope: Rope | None) -> Tensor:
    """``x`` rotated and rounded to its own dtype: what a host hands over that rotates by itself."""
    return x if rope is None else apply_rope(x, rope).to(x.dtype)


def _columns(table: Tensor, dim: int, interleaved: bool) -> Tensor:
    """A table as ``[B or 1, 1, L, D]``."""
    if table.shape[-1] != dim:
        table = table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)
    return table.reshape(-1, 1, *table.shape[-2:])
