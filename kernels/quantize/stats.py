"""Statistics of Q, K and V over their tokens, in Triton: what smoothing and scaling need first."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import padded_dim
from ..rope import Rope
from .rope import load_rotated_rows, rope_arguments

#: Tokens whose statistics one program sums up; the few partial sums are added by Torch.
STATS_CHUNK = 512


class ChannelStats(NamedTuple):
    """Of a tensor ``[B, H, L, D]`` over its tokens, each ``[B, H, D]`` float32."""

    mean: Tensor
    low: Tensor
    high: Tensor


@triton.jit
def _stats_kernel(
    p_x,
    p_sum,  # [B, H, chunks, D], or None
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
    AVERAGE: tl.constexpr,  # divide by the chunk's tokens
    ROPE: tl.constexpr,  # columns of the tables, 0 without
    INTERLEAVED: tl.constexpr,
):
    chunks = tl.cdiv(length, CHUNK)
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    total = tl.zeros([BLOCK_D], tl.float32)
    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], -float("inf"), tl.float32)
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
            p_cos,
            p_sin,
            rope_b,
            rope_l,
            rope_d,
            D,
            0,
            BLOCK_D,
            ROPE,
            INTERLEAVED,
        )
        if p_sum is not None:
            total += tl.sum(x, 0)
        if p_low is not None:
            low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(inside, x, -float("inf")), 0))
    at = (i_bh * chunks + i_c) * D + o_d
    if p_sum is not None:
        if AVERAGE:
            total = tl.div_rn(total, (stop - i_c * CHUNK).to(tl.float32))
        tl.store(p_sum + at, total, mask=o_d < D)
    if p_low is not None:
        tl.store(p_low + at, low, mask=o_d < D)
        tl.store(p_high + at, high, mask=o_d < D)


def token_mean(x: Tensor, rope: Rope | None = None) -> Tensor:
    """Mean over the tokens of ``[B, H, L, D]``, rotated by ``rope`` -> ``[B, H, D]`` float32."""
    (sums,) = partial_stats(x, extremes=False, rope=rope)
    return sums.sum(2) * (1.0 / x.shape[2])


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
    (sums,) = partial_stats(x, extremes=False, chunk=block, average=True, rope=rope)
    return sums


def channel_stats(x: Tensor) -> ChannelStats:
    """Mean and extremes of every channel of ``[B, H, L, D]`` in one pass."""
    sums, low, high = partial_stats(x)
    return ChannelStats(sums.sum(2) * (1.0 / x.shape[2]), low.amin(2), high.amax(2))


def partial_stats(
    x: Tensor,
    *,
    sums: bool = True,
    extremes: bool = True,
    chunk: int = STATS_CHUNK,
    average: bool = False,
    rope: Rope | None = None,
) -> list[Tensor]:
    """Sums, minima and maxima of every ``chunk`` tokens, those that are asked for.

    Each is ``[B, H, chunks, D]`` float32; ``average`` turns sums into means,
    ``rope`` rotates ``x`` first.
    """
    batch, heads, length, head_dim = x.shape
    chunks = triton.cdiv(length, chunk)
    shape = (batch, heads, chunks, head_dim)
    wanted = (sums, extremes, extremes)
    outputs = [
        torch.empty(shape, dtype=torch.float32, device=x.device) if w else None for w in wanted
    ]
    with torch.cuda.device_of(x):
        _stats_kernel[(chunks * batch * heads,)](
            x,
            *outputs,
            length,
            heads,
            *x.stride(),
            **rope_arguments(rope, x),
            D=head_dim,
            BLOCK_D=padded_dim(head_dim),
            CHUNK=chunk,
            BLOCK=64 if rope is None else 32,  # room for the tables
            AVERAGE=average,
            num_warps=4 if head_dim <= 128 else 8,
            enable_fp_fusion=False,
        )
    return [x for x in outputs if x is not None]
