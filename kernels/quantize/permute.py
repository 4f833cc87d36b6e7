"""Token orders that let a tensor core's accumulator serve as its next operand.

A thread of ``mma.m16n8`` holds columns ``2t, 2t + 1`` of every n8 tile of S, but columns
``4t .. 4t + 3`` of every k16 half of the 8-bit operand P, and ``8t .. 8t + 7`` of every k32 half of
the 4-bit one.  The sum over keys doesn't care for their order, so V's tokens are stored where P's
registers want them: P then needs no exchange between threads.  ``docs/kernels.md`` draws it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import TILE_N, Precision, QuantizedValue, padded_dim

#: Tokens that change places among themselves: the k extent of an 8-bit ``mma``, half a 4-bit one's.
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


def fp4_token_order() -> Tensor:
    """As :func:`token_order` for a 4-bit V, ``[32]`` int64.

    Bits of the position: thread (16, 8), n8 tile of the half (4, 2), column (1).
    """
    position = torch.arange(GROUP)
    return ((position & 6) << 2) | ((position & 24) >> 2) | (position & 1)


def group_tokens(x: Tensor) -> Tensor:
    """``[.., 32 n]`` tokens -> ``[.., 2 n, 16]``: those that share a micro scale of P and of V.

    Of every 32 tokens the first halves of each 8, then the second halves: two threads of a tensor
    core hold the former of a row of P, two the latter, and in :func:`fp4_token_order` either are
    neighbours.
    """
    return x.unflatten(-1, (-1, 4, 2, 4)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def ungroup_tokens(x: Tensor) -> Tensor:
    """The inverse of :func:`group_tokens`."""
    return x.unflatten(-2, (-1, 2)).unflatten(-1, (4, 4)).transpose(-3, -2).flatten(-4)


def channel_order() -> Tensor:
    """Position in a tile's list of V's scales -> channel, ``[32]`` int64, within every 32.

    The 8 channels of a thread stand side by side, so that it reads bfloat16 scales 16 bytes at a
    time.
    """
    position = torch.arange(GROUP)
    return ((position & 6) << 2) | ((position >> 2) & 6) | (position & 1)


def permute_scales(scale: Tensor) -> Tensor:
    """V's scales by tiles, ``[.., D]`` float32 -> ``[.., Dp]`` bfloat16 by :func:`channel_order`.

    1 beyond D.
    """
    dim = scale.shape[-1]
    padded = F.pad(scale, (0, padded_dim(dim) - dim), value=1.0).unflatten(-1, (-1, GROUP))
    return padded[..., channel_order().to(scale.device)].flatten(-2).bfloat16()


def restore_scales(scale: Tensor, head_dim: int) -> Tensor:
    """The inverse of :func:`permute_scales`."""
    order = channel_order().argsort().to(scale.device)
    rows = scale.float().unflatten(-1, (-1, GROUP))[..., order].flatten(-2)
    return rows[..., :head_dim].contiguous()


def permute_value(v: QuantizedValue) -> QuantizedValue:
    """A quantized V with its tokens in the kernels' order within each 32.

    Eight bit: :func:`token_order`, and :func:`permute_scales` where tiles have scales.  FP4:
    :func:`fp4_token_order`, and the micro scales by tiles of 64 tokens, ``[B, H, Lp / 64, D, 4]``.
    """
    if v.precision is Precision.FP4:
        assert v.micro is not None
        tiles = v.micro.view(torch.uint8).unflatten(-1, (-1, 4)).transpose(2, 3).contiguous()
        return v._replace(data=_swap_pairs(v.data), micro=tiles.view(v.micro.dtype))
    scale = permute_scales(v.scale) if v.tile_scales else v.scale
    return v._replace(data=_gather(v.data, token_order()), scale=scale)


def restore_value(v: QuantizedValue) -> QuantizedValue:
    """The inverse of :func:`permute_value`."""
    if v.precision is Precision.FP4:
        assert v.micro is not None
        rows = v.micro.view(torch.uint8).transpose(2, 3).flatten(-2)
        return v._replace(data=_swap_pairs(v.data), micro=rows.view(v.micro.dtype))
    scale = restore_scales(v.scale, v.data.shape[2]) if v.tile_scales else v.scale
    return v._replace(data=_gather(v.data, token_order().argsort()), scale=scale)


def _swap_pairs(data: Tensor) -> Tensor:
    """:func:`fp4_token_order`, a 4 x 4 transpose of the bytes, which hold two tokens."""
    return data.unflatten(-1, (-1, 4, 4)).transpose(-2, -1).flatten(-3)


def _gather(data: Tensor, order: Tensor) -> Tensor:
    codes = data.view(torch.uint8).unflatten(-1, (-1, GROUP))  # E4M3 has no gather
    return codes[..., order.to(data.device)].flatten(-2).view(data.dtype)
