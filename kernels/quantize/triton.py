"""The quantizers in Triton, bit-exact with :mod:`.reference` given the same means.

Offsets into the caller's tensors are 64-bit, every masked load names its ``other``, and FP fusion
is off where the twin's rounding must be reproduced.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import (
    MAX_SCALE,
    MIN_SCALE,
    Q_BLOCK,
    TILE_N,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    padded_dim,
    padded_length,
)
from ..tiles import round_even, round_to_int, stored_token
from .reference import CLIP_CANDIDATES, CLIP_LIMIT, CLIP_RESOLUTION, FP8_FAST_VALUE_MAX
from .stats import ChannelStats, block_mean, channel_stats, load_rows, partial_stats, token_mean

__all__ = [
    "ChannelStats",
    "block_mean",
    "channel_stats",
    "load_rows",
    "quantize_rows",
    "quantize_smoothed_rows",
    "quantize_value",
    "token_mean",
]

_STORAGE = {
    Precision.INT8: torch.int8,
    Precision.INT4: torch.uint8,
    Precision.FP8: torch.float8_e4m3fn,
}

_MAX_SCALE, _MIN_SCALE = tl.constexpr(MAX_SCALE), tl.constexpr(MIN_SCALE)
_CLIP_LIMIT, _CLIP_RESOLUTION = tl.constexpr(CLIP_LIMIT), tl.constexpr(CLIP_RESOLUTION)


@triton.jit
def _scale_of(amax, INVERSE_TOP: tl.constexpr):
    scale = amax * INVERSE_TOP
    return tl.where(scale < _MIN_SCALE, 1.0, tl.minimum(scale, _MAX_SCALE))


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, DIM: tl.constexpr, LOG2_DIM: tl.constexpr):
    """Signed Hadamard rotation of [ROWS, DIM], the butterfly of ``reference.rotate``.

    Every stage pairs neighbours and moves sums to the lower and differences to the upper half: the
    index bit that was lowest becomes the highest, so after all stages each is back in its place.
    """
    h = (tl.arange(0, DIM) + 1).to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x85EBCA77
    x = x * tl.where(((h ^ (h >> 13)) & 1) != 0, 1.0, -1.0)[None, :]
    for _ in tl.static_range(LOG2_DIM):
        a, b = tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [ROWS, DIM])
    NORM: tl.constexpr = DIM**-0.5
    return x * NORM


@triton.jit
def _clipped_scale(x, scale, SHARES: tl.constexpr):
    """INT4 scale of every row with the least squared error, counted in integers."""
    best = tl.full(scale.shape, float("inf"), tl.float32)
    chosen = scale
    for i in tl.static_range(len(SHARES)):
        step = scale * SHARES[i]
        scaled = x * tl.div_rn(1.0, step)[:, None]
        scaled = tl.minimum(tl.maximum(scaled, -_CLIP_LIMIT), _CLIP_LIMIT)
        error = scaled - tl.minimum(tl.maximum(round_even(scaled), -7.0), 7.0)
        total = tl.sum(round_to_int(error * error * _CLIP_RESOLUTION), 1)
        cost = total.to(tl.float32) * (SHARES[i] * SHARES[i])
        better = cost < best
        best = tl.where(better, cost, best)
        chosen = tl.where(better, step, chosen)
    return chosen


@triton.jit
def _quantize_tile(
    x,  # [BLOCK, DP], smoothed
    p_codes,
    p_scale,
    i_bh,
    i_l,  # the tile's number in the head
    blocks,
    length,
    multiplier,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Rotate, scale, round and store one tile of :func:`_quantize_rows_kernel`."""
    o_l, o_d = i_l * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    if ROTATE:
        x = _hadamard(x, BLOCK, DP, LOG2_DP)
    amax = tl.max(tl.abs(x), 1)
    if GROUPED:
        amax = tl.zeros_like(amax) + tl.max(amax, 0)
    scale = _scale_of(amax, 1.0 / TOP)
    if len(SHARES) > 0:
        scale = _clipped_scale(x, scale, SHARES)
    codes = x * tl.div_rn(1.0, scale)[:, None]
    codes = tl.minimum(tl.maximum(codes, -TOP), TOP)
    in_rows = (o_l < length)[:, None]
    start = (i_bh * length + i_l * BLOCK) * (DP // 2 if FORMAT == "int4" else DP)
    rows = tl.arange(0, BLOCK)[:, None]
    if FORMAT == "int4":
        low, high = tl.split(tl.reshape(round_to_int(codes), [BLOCK, DP // 2, 2]))
        packed = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
        at = rows * (DP // 2) + tl.arange(0, DP // 2)[None, :]
        tl.store(p_codes + start + at, packed, mask=in_rows)
    elif FORMAT == "int8":
        tl.store(
            p_codes + start + rows * DP + o_d[None, :], round_to_int(codes).to(tl.int8), in_rows
        )
    else:
        tl.store(p_codes + start + rows * DP + o_d[None, :], codes.to(tl.float8e4nv), in_rows)
    scale *= multiplier
    if GROUPED:
        tl.store(p_scale + i_bh * blocks + i_l, tl.max(scale, 0))
    else:
        tl.store(p_scale + i_bh * length + o_l, scale, mask=o_l < length)


@triton.jit
def _quantize_rows_kernel(
    p_x,
    p_mean,  # [B, H, means, D] contiguous, or None
    p_codes,  # [B, H, L, bytes of DP]
    p_scale,  # [B, H, groups]
    length,
    heads,
    means,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    multiplier,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,  # "int8", "int4", "fp8"
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a program
    GROUPED: tl.constexpr,  # one scale for all of them
    MEAN_BLOCK: tl.constexpr,  # rows that share a mean; 0: all
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,  # candidates of clipping, empty without
):
    blocks = tl.cdiv(length, BLOCK)
    i_l = tl.program_id(0) % blocks
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    o_l, o_d = i_l * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    x, inside = load_rows(p_x, o_l, o_d, length, stride_l, stride_d, D)
    if p_mean is not None:
        i_mean = i_bh * means
        if MEAN_BLOCK:
            i_mean += i_l * BLOCK // MEAN_BLOCK
        mean = tl.load(p_mean + i_mean * D + o_d, mask=o_d < D, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)
    _quantize_tile(
        x,
        p_codes,
        p_scale,
        i_bh,
        i_l,
        blocks,
        length,
        multiplier,
        DP,
        LOG2_DP,
        FORMAT,
        TOP,
        BLOCK,
        GROUPED,
        ROTATE,
        SHARES,
    )


@triton.jit
def _quantize_smoothed_rows_kernel(
    p_x,
    p_mean,  # [B, H, ceil(L / MEAN_BLOCK), D], written
    p_codes,
    p_scale,
    length,
    heads,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    multiplier,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    MEAN_BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,
):
    """The rows of one mean per program: it finds the mean, then meets them again in its cache.

    All of them in registers would spill.
    """
    groups = tl.cdiv(length, MEAN_BLOCK)
    i_group = tl.program_id(0) % groups
    i_bh = (tl.program_id(0) // groups).to(tl.int64)
    o_d = tl.arange(0, DP)
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    first = i_group * MEAN_BLOCK
    stop = tl.minimum(length, first + MEAN_BLOCK)
    total = tl.zeros([DP], tl.float32)
    for start in range(first, stop, BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        x, _ = load_rows(p_x, o_l, o_d, length, stride_l, stride_d, D)
        total += tl.sum(x, 0)
    mean = tl.div_rn(total, (stop - first).to(tl.float32))
    tl.store(p_mean + (i_bh * groups + i_group) * D + o_d, mean, mask=o_d < D)
    for start in range(first, stop, BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        x, inside = load_rows(p_x, o_l, o_d, length, stride_l, stride_d, D)
        x = tl.where(inside, x - mean[None, :], 0.0)
        _quantize_tile(
            x,
            p_codes,
            p_scale,
            i_bh,
            start // BLOCK,
            0,
            length,
            multiplier,
            DP,
            LOG2_DP,
            FORMAT,
            TOP,
            BLOCK,
            False,
            ROTATE,
            SHARES,
        )


@triton.jit
def _quantize_value_kernel(
    p_x,
    p_mean,  # [B, H, D], or None
    p_low,  # [B, H, D], the extremes of every channel
    p_high,
    p_codes,  # [B, H, D, Lp]
    p_scale,  # [B, H, D]
    length,
    padded,
    heads,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOP: tl.constexpr,
    FP8: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = padded // BLOCK
    i_l = tl.program_id(0) % blocks
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    o_l, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    if PERMUTED:
        o_l = stored_token(o_l)
    o_l += i_l * BLOCK
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    x, inside = load_rows(p_x, o_l, o_d, length, stride_l, stride_d, D)
    low = tl.load(p_low + i_bh * D + o_d, mask=o_d < D, other=0.0)
    high = tl.load(p_high + i_bh * D + o_d, mask=o_d < D, other=0.0)
    if p_mean is not None:
        mean = tl.load(p_mean + i_bh * D + o_d, mask=o_d < D, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)
        # Rounding is monotone, so the largest |x - mean| is at one of the extremes, bit for bit.
        low, high = low - mean, high - mean
    scale = _scale_of(tl.maximum(tl.abs(low), tl.abs(high)), 1.0 / TOP)
    codes = x * tl.div_rn(1.0, scale)[None, :]
    codes = tl.trans(tl.minimum(tl.maximum(codes, -TOP), TOP))  # [BLOCK_D, BLOCK]
    p_tile = p_codes + i_bh * D * padded + i_l * BLOCK
    at = o_d[:, None].to(tl.int64) * padded + tl.arange(0, BLOCK)[None, :]
    if FP8:
        tl.store(p_tile + at, codes.to(tl.float8e4nv), mask=o_d[:, None] < D)
    else:
        tl.store(p_tile + at, round_to_int(codes).to(tl.int8), mask=o_d[:, None] < D)
    if i_l == 0:
        tl.store(p_scale + i_bh * D + o_d, scale, mask=o_d < D)


def quantize_rows(
    x: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None = None,
    rotation: bool = False,
    clip: bool = False,
    block: int = 1,
    multiplier: float = 1.0,
) -> QuantizedTensor:
    """As :func:`.reference.quantize_rows`, for INT8, INT4 and FP8.

    Raises:
        ValueError: another precision, or ``block`` is not 1, 32, 64 or 128.
    """
    if precision not in _STORAGE:
        raise ValueError(f"precision must be int8, int4 or fp8, got {precision.value}")
    if block not in (1, 32, 64, 128):
        raise ValueError(f"block must be 1, 32, 64 or 128, got {block}")
    batch, heads, length, head_dim = x.shape
    dim = padded_dim(head_dim)
    rows = block if block > 1 else 16 if clip else 32
    blocks = triton.cdiv(length, rows)
    width = dim // 2 if precision is Precision.INT4 else dim
    codes = torch.empty(batch, heads, length, width, dtype=_STORAGE[precision], device=x.device)
    groups = length if block == 1 else blocks
    scale = torch.empty(batch, heads, groups, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _quantize_rows_kernel[(blocks * batch * heads,)](
            x,
            None if mean is None else mean.contiguous(),
            codes,
            scale,
            length,
            heads,
            mean.shape[2] if mean is not None and mean.ndim == 4 else 1,
            *x.stride(),
            multiplier,
            D=head_dim,
            DP=dim,
            LOG2_DP=dim.bit_length() - 1,
            FORMAT=precision.value,
            TOP=precision.qmax,
            BLOCK=rows,
            GROUPED=block != 1,
            MEAN_BLOCK=Q_BLOCK if mean is not None and mean.ndim == 4 else 0,
            ROTATE=rotation,
            SHARES=CLIP_CANDIDATES if clip and precision is Precision.INT4 else (),
            num_warps=4 if rows * dim <= 8192 else 8,
            enable_fp_fusion=False,
        )
    return QuantizedTensor(codes, scale, precision, block)


def quantize_smoothed_rows(
    x: Tensor,
    precision: Precision,
    *,
    rotation: bool = False,
    clip: bool = False,
    multiplier: float = 1.0,
) -> tuple[QuantizedTensor, Tensor]:
    """:func:`quantize_rows` minus the mean of every 128 rows, reading ``x`` once.

    Returns:
        The codes with one scale per row, and the means ``[B, H, ceil(L / 128), D]`` float32, as of
        :func:`block_mean`.

    Raises:
        ValueError: another precision than INT8, INT4 and FP8.
    """
    if precision not in _STORAGE:
        raise ValueError(f"precision must be int8, int4 or fp8, got {precision.value}")
    batch, heads, length, head_dim = x.shape
    dim, groups, device = padded_dim(head_dim), triton.cdiv(length, Q_BLOCK), x.device
    width = dim // 2 if precision is Precision.INT4 else dim
    codes = torch.empty(batch, heads, length, width, dtype=_STORAGE[precision], device=device)
    scale = torch.empty(batch, heads, length, dtype=torch.float32, device=device)
    mean = torch.empty(batch, heads, groups, head_dim, dtype=torch.float32, device=device)
    with torch.cuda.device_of(x):
        _quantize_smoothed_rows_kernel[(groups * batch * heads,)](
            x,
            mean,
            codes,
            scale,
            length,
            heads,
            *x.stride(),
            multiplier,
            D=head_dim,
            DP=dim,
            LOG2_DP=dim.bit_length() - 1,
            FORMAT=precision.value,
            TOP=precision.qmax,
            BLOCK=16 if clip else 32,
            MEAN_BLOCK=Q_BLOCK,
            ROTATE=rotation,
            SHARES=CLIP_CANDIDATES if clip and precision is Precision.INT4 else (),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return QuantizedTensor(codes, scale, precision, 1), mean


def quantize_value(
    v: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None = None,
    fast: bool = False,
    permuted: bool = False,
    stats: ChannelStats | None = None,
) -> QuantizedValue:
    """As :func:`.reference.quantize_value`, for INT8 and FP8.

    Args:
        permuted: store the tokens as :func:`.permute.permute_value` does.
        stats: V's :func:`channel_stats` where they are known; saves one pass over V.

    Raises:
        ValueError: another precision.
    """
    if precision not in (Precision.INT8, Precision.FP8):
        raise ValueError(f"precision must be int8 or fp8, got {precision.value}")
    batch, heads, length, head_dim = v.shape
    if stats is None:
        low, high = partial_stats(v, sums=False)
        low, high = low.amin(2), high.amax(2)
    else:
        low, high = stats.low, stats.high
    padded = padded_length(length)
    codes = torch.empty(batch, heads, head_dim, padded, dtype=_STORAGE[precision], device=v.device)
    scale = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):
        _quantize_value_kernel[(padded // TILE_N * batch * heads,)](
            v,
            None if mean is None else mean.contiguous(),
            low,
            high,
            codes,
            scale,
            length,
            padded,
            heads,
            *v.stride(),
            D=head_dim,
            BLOCK_D=padded_dim(head_dim),
            TOP=FP8_FAST_VALUE_MAX if fast else precision.qmax,
            FP8=precision is Precision.FP8,
            PERMUTED=permuted,
            BLOCK=TILE_N,
            num_warps=4 if head_dim <= 128 else 8,
            enable_fp_fusion=False,
        )
    return QuantizedValue(codes, scale, precision, length, mean)
