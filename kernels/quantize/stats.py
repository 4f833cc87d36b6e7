"""Statistics of Q, K and V over their tokens, in Triton: what smoothing and scaling need first."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import tuning as cards
from ..formats import cdiv, padded_dim
from ..rope import Rope
from ..start import start_kernel
from .rope import Tables, load_rotated_rows, rope_arguments

#: Tokens whose statistics one program finds; the parts are joined by Torch, in one launch each for
#: means and for extremes, in none where there is one part.  Short ones fill a card at 1K tokens.
STATS_CHUNK = 128


class ChannelStats(NamedTuple):
    """Of a tensor ``[B, H, L, D]`` over its tokens, each ``[B, H, D]`` float32, or no mean."""

    mean: Tensor | None
    low: Tensor
    high: Tensor


@triton.jit
def _stats_kernel(
    p_x,
    p_mean,  # [B, H, chunks, D], or None
    p_low,  # the same, or None
    p_high,
    length,
    heads,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    p_cos,  # tables of RoPE, or None
    p_sin,
    rope_b,
    rope_l,
    rope_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # of the mean over all tokens, which they add up to; else chunks' own
    ROPE: tl.constexpr,  # columns of the tables, 0 without
    INTERLEAVED: tl.constexpr,
):
    chunks = tl.cdiv(length, CHUNK)
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    rope = Tables(p_cos, p_sin, rope_b, rope_l, rope_d)
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    # Of every row of a block, so that nothing crosses a warp within the loop.
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    low = tl.full([BLOCK, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK, BLOCK_D], -float("inf"), tl.float32)
    stop = tl.minimum(length, (i_c + 1) * CHUNK)
    for start in range(i_c * CHUNK, stop, BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        x, inside = load_rotated_rows(
            p_x,
            o_l,
            length,
            stride_l,
            stride_d,
            i_bh // heads,
            rope,
            D,
            0,
            BLOCK_D,
            ROPE,
            INTERLEAVED,
        )
        if p_mean is not None:
            total += x
        if p_low is not None:
            low = tl.minimum(low, tl.where(inside, x, float("inf")))
            high = tl.maximum(high, tl.where(inside, x, -float("inf")))
    at = (i_bh * chunks + i_c) * D + o_d
    if p_mean is not None:
        count = tl.full([], length if PARTS else stop - i_c * CHUNK, tl.float32)
        tl.store(p_mean + at, tl.div_rn(tl.sum(total, 0), count), mask=o_d < D)
    if p_low is not None:
        tl.store(p_low + at, tl.min(low, 0), mask=o_d < D)
        tl.store(p_high + at, tl.max(high, 0), mask=o_d < D)


def token_mean(x: Tensor, rope: Rope | None = None) -> Tensor:
    """Mean over the tokens of ``[B, H, L, D]``, rotated by ``rope`` -> ``[B, H, D]`` float32."""
    means, _ = _partial_stats(x, extremes=False, rope=rope)
    return _join_means(means)


def block_mean(x: Tensor, block: int, rope: Rope | None = None) -> Tensor:
    """Means of ``block`` tokens of ``[B, H, L, D]`` -> ``[B, H, ceil(L / block), D]`` float32.

    Args:
        x: any float dtype and strides.
        block: tokens, a multiple of 64.
        rope: rotates ``x`` first.

    Raises:
        ValueError: ``block`` is no multiple of 64.
    """
    if block % 64:
        raise ValueError(f"block must be a multiple of 64, got {block}")
    means, _ = _partial_stats(x, extremes=False, block=block, rope=rope)
    return means


def extremes(x: Tensor) -> ChannelStats:
    """Minimum and maximum of every channel of ``[B, H, L, D]``."""
    return joined(_partial_stats(x, means=False)[1])


def joined(parts: Tensor) -> ChannelStats:
    """Minimum and maximum of every channel, of the parts that ``Sample.v_extremes`` has."""
    return ChannelStats(None, *_join_extremes(parts))


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and extremes of every channel of ``[B, H, L, D]`` in one pass."""
    means, pair = _partial_stats(x)
    return ChannelStats(_join_means(means), *_join_extremes(pair))


def _join_means(parts: Tensor) -> Tensor:
    return parts.squeeze(2) if parts.shape[2] == 1 else parts.sum(2)


def _join_extremes(pair: Tensor) -> tuple[Tensor, Tensor]:
    if pair.shape[3] == 1:
        low, high = pair.squeeze(3).unbind()
        return low, high
    # One launch for both: the maximum of the minima and its like cost nothing beside it.
    lows, highs = torch.aminmax(pair, dim=3)
    return lows.unbind()[0], highs.unbind()[1]


def _launch(arch: str, extremes: bool, rotated: bool, dim: int) -> tuple[int, int]:
    """Rows of a block and warps of a program; on sm_90 as an H200 was fastest with."""
    wide = 1 if dim <= 128 else 2
    if extremes and arch == "sm_90" and not rotated:
        return 32, 2 * wide
    if extremes or rotated or arch.startswith("gfx"):  # room for three sums, or for the tables
        return 32, 4 * wide
    return 128, 4 * wide


def _partial_stats(
    x: Tensor,
    *,
    means: bool = True,
    extremes: bool = True,
    block: int | None = None,
    rope: Rope | None = None,
) -> tuple[Tensor, Tensor]:
    """Statistics of every :data:`STATS_CHUNK` tokens, or of every ``block``.

    Args:
        x: ``[B, H, L, D]``, any float dtype and strides.
        means, extremes: those that are asked for; the others come back empty.
        block: tokens whose own mean is wanted, instead of their part of the mean over all.
        rope: rotates ``x`` first.

    Returns:
        Means ``[B, H, chunks, D]``, minima and maxima ``[2, B, H, chunks, D]``, float32.
    """
    batch, heads, length, head_dim = x.shape
    chunk = block or STATS_CHUNK
    chunks = cdiv(length, chunk)
    shape, device = (batch, heads, chunks, head_dim), x.device
    arch = cards.architecture(device)
    rows, warps = _launch(arch, extremes, rope is not None, padded_dim(head_dim))
    mean = torch.empty(shape if means else (0,), dtype=torch.float32, device=device)
    pair = torch.empty((2, *shape) if extremes else (2, 0), dtype=torch.float32, device=device)
    with torch.cuda.device_of(x):
        start_kernel(
            _stats_kernel,
            (chunks * batch * heads,),
            x,
            mean if means else None,
            *(pair.unbind() if extremes else (None, None)),
            length,
            heads,
            *x.stride(),
            **rope_arguments(rope, x),
            D=head_dim,
            BLOCK_D=padded_dim(head_dim),
            CHUNK=chunk,
            BLOCK=min(rows, chunk),
            PARTS=block is None,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return mean, pair
