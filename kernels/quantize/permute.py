"""Token orders that let a tensor core's accumulator serve as its next operand.

A thread of ``mma.m16n8`` holds columns ``2t, 2t + 1`` of every n8 tile of S, but columns
``4t .. 4t + 3`` of every k16 half of the 8-bit operand P.  The sum over keys doesn't care for their
order, so V's tokens are stored where P's registers want them: P then needs no exchange between
threads.  ``docs/kernels.md`` draws it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import TILE_N, QuantizedValue

#: Tokens that change places among themselves: the k extent of an 8-bit ``mma``.
GROUP = 32


def token_order() -> Tensor:
    """Position in a permuted V -> token, ``[32]`` int64.

    Bits of the position: half (16), thread (8, 4), n8 tile of the half (2), column (1).
    """
    position = torch.arange(GROUP)
    return (position & ~15) | ((position & 2) << 2) | ((position >> 1) & 6) | (position & 1)


def column_order() -> Tensor:
    """Position in a tile's list of scales -> token, ``[64]`` int64.

    The 16 columns of a thread stand side by side, so that it reads them 16 bytes at a time.
    """
    thread, tile, column = torch.meshgrid(
        torch.arange(4), torch.arange(TILE_N // 8), torch.arange(2), indexing="ij"
    )
    return (8 * tile + 2 * thread + column).flatten()


def permute_value(v: QuantizedValue) -> QuantizedValue:
    """An 8-bit V with its tokens in :func:`token_order` within each 32."""
    return v._replace(data=_gather(v.data, token_order()))


def restore_value(v: QuantizedValue) -> QuantizedValue:
    """The inverse of :func:`permute_value`."""
    return v._replace(data=_gather(v.data, token_order().argsort()))


def _gather(data: Tensor, order: Tensor) -> Tensor:
    codes = data.view(torch.uint8).unflatten(-1, (-1, GROUP))  # E4M3 has no gather
    return codes[..., order.to(data.device)].flatten(-2).view(data.dtype)
