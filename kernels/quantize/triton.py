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
    FP4_GROUP,
    Q_BLOCK,
    Precision,
    QuantizedTensor,
    cdiv,
    padded_dim,
)
from ..rope import Rope
from ..start import start_kernel
from ..tiles import round_even, round_to_int
from ..versions import to_e4m3
from .limits import (
    CLIP_LIMIT,
    CLIP_RESOLUTION,
    code_top,
)
from .rope import Tables, load_rotated_rows, rope_arguments
from .sample import sample
from .stats import ChannelStats, block_mean, channel_stats, token_mean
from .triton_fp4 import fp4_groups, pack_codes
from .triton_value import STORAGE, quantize_value, scale_of, shares

__all__ = [
    "ChannelStats",
    "block_mean",
    "channel_stats",
    "quantize_rows",
    "quantize_smoothed_rows",
    "quantize_value",
    "sample",
    "token_mean",
]

_GROUP = tl.constexpr(FP4_GROUP)
_CLIP_LIMIT, _CLIP_RESOLUTION = tl.constexpr(CLIP_LIMIT), tl.constexpr(CLIP_RESOLUTION)


@triton.jit
def _hadamard(x, p_seed, ROWS: tl.constexpr, DIM: tl.constexpr, LOG2_DIM: tl.constexpr):
    """Signed Hadamard rotation of [ROWS, DIM], the butterfly of ``reference.rotate``.

    The seed of the signs comes by a pointer, so that a captured graph can be fed another one.

    Every stage pairs neighbours and moves sums to the lower and differences to the upper half: the
    index bit that was lowest becomes the highest, so after all stages each is back in its place.
    """
    h = (tl.arange(0, DIM) + 1).to(tl.uint32) * 0x9E3779B1
    if p_seed is not None:
        h += tl.load(p_seed).to(tl.uint32, bitcast=True)
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
    p_seed,
    p_codes,
    p_scale,
    p_micro,
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
        x = _hadamard(x, p_seed, BLOCK, DP, LOG2_DP)
    amax = tl.max(tl.abs(x), 1)
    if GROUPED:
        amax = tl.zeros_like(amax) + tl.max(amax, 0)
    scale = scale_of(amax, 1.0 / TOP)
    if FORMAT == "int4" and len(SHARES) > 0:
        scale = _clipped_scale(x, scale, SHARES)
    codes = x * tl.div_rn(1.0, scale)[:, None]
    in_rows = (o_l < length)[:, None]
    WIDTH: tl.constexpr = DP // 2 if FORMAT == "int4" or FORMAT == "fp4" else DP
    start = (i_bh * length + i_l * BLOCK) * WIDTH
    rows = tl.arange(0, BLOCK)[:, None]
    if FORMAT == "fp4":
        GROUPS: tl.constexpr = DP // _GROUP
        codes, micro = fp4_groups(tl.reshape(codes, [BLOCK * GROUPS, _GROUP]), SHARES)
        at = rows * GROUPS + tl.arange(0, GROUPS)[None, :]
        p_micro += (i_bh * length + i_l * BLOCK) * GROUPS
        tl.store(p_micro + at, tl.reshape(micro, [BLOCK, GROUPS]), mask=in_rows)
    else:
        codes = tl.minimum(tl.maximum(codes, -TOP), TOP)
        if FORMAT == "int4":
            codes = round_to_int(codes)
    if WIDTH != DP:
        at = rows * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(p_codes + start + at, pack_codes(codes, BLOCK, WIDTH), mask=in_rows)
    elif FORMAT == "int8":
        tl.store(
            p_codes + start + rows * DP + o_d[None, :], round_to_int(codes).to(tl.int8), in_rows
        )
    else:
        tl.store(p_codes + start + rows * DP + o_d[None, :], to_e4m3(codes), in_rows)
    scale *= multiplier
    if GROUPED:
        tl.store(p_scale + i_bh * blocks + i_l, tl.max(scale, 0))
    else:
        tl.store(p_scale + i_bh * length + o_l, scale, mask=o_l < length)


@triton.jit
def _quantize_rows_kernel(
    p_x,
    p_mean,  # [B, H, means, D] contiguous, or None
    p_factor,  # [B, H / group, D], or None
    p_seed,  # one int32, seed of the rotation's signs, or None
    p_codes,  # [B, H, L, bytes of DP]
    p_scale,  # [B, H, groups]
    p_micro,  # [B, H, L, DP / 16], FP4 only
    length,
    heads,
    group,
    means,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    multiplier,
    p_cos,  # tables of RoPE, or None
    p_sin,
    rope_b,
    rope_l,
    rope_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,  # "int8", "int4", "fp8", "fp4"
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of a program
    GROUPED: tl.constexpr,  # one scale for all of them
    MEAN_BLOCK: tl.constexpr,  # rows that share a mean; 0: all
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,  # candidates of clipping, empty without
    ROPE: tl.constexpr,  # columns of the tables, 0 without
    INTERLEAVED: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK)
    i_l = tl.program_id(0) % blocks
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    o_l, o_d = i_l * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    rope = Tables(p_cos, p_sin, rope_b, rope_l, rope_d)
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
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
        DP,
        ROPE,
        INTERLEAVED,
    )
    if p_mean is not None:
        i_mean = i_bh * means
        if MEAN_BLOCK:
            i_mean += i_l * BLOCK // MEAN_BLOCK
        mean = tl.load(p_mean + i_mean * D + o_d, mask=o_d < D, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)
    if p_factor is not None:
        x *= tl.load(p_factor + i_bh // group * D + o_d, mask=o_d < D, other=1.0)[None, :]
    _quantize_tile(
        x,
        p_seed,
        p_codes,
        p_scale,
        p_micro,
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
    p_factor,  # as of _quantize_rows_kernel
    p_seed,  # as of _quantize_rows_kernel
    p_codes,
    p_scale,
    p_micro,
    length,
    heads,
    group,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    multiplier,
    p_cos,  # tables of RoPE, or None
    p_sin,
    rope_b,
    rope_l,
    rope_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    MEAN_BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,
    ROPE: tl.constexpr,  # columns of the tables, 0 without
    INTERLEAVED: tl.constexpr,
):
    """The rows of one mean per program: it finds the mean, then meets them again in its cache.

    All of them in registers would spill.
    """
    groups = tl.cdiv(length, MEAN_BLOCK)
    i_group = tl.program_id(0) % groups
    i_bh = (tl.program_id(0) // groups).to(tl.int64)
    o_d = tl.arange(0, DP)
    rope = Tables(p_cos, p_sin, rope_b, rope_l, rope_d)
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    first = i_group * MEAN_BLOCK
    stop = tl.minimum(length, first + MEAN_BLOCK)
    total = tl.zeros([DP], tl.float32)
    for start in range(first, stop, BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        x, _ = load_rotated_rows(
            p_x,
            o_l,
            length,
            stride_l,
            stride_d,
            i_bh // heads,
            rope,
            D,
            0,
            DP,
            ROPE,
            INTERLEAVED,
        )
        total += tl.sum(x, 0)
    mean = tl.div_rn(total, (stop - first).to(tl.float32))
    tl.store(p_mean + (i_bh * groups + i_group) * D + o_d, mean, mask=o_d < D)
    for start in range(first, stop, BLOCK):
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
            DP,
            ROPE,
            INTERLEAVED,
        )
        x = tl.where(inside, x - mean[None, :], 0.0)
        if p_factor is not None:
            x *= tl.load(p_factor + i_bh // group * D + o_d, mask=o_d < D, other=1.0)[None, :]
        _quantize_tile(
            x,
            p_seed,
            p_codes,
            p_scale,
            p_micro,
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


def quantize_rows(
    x: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None = None,
    factor: Tensor | None = None,
    rotation: bool = False,
    sign_seed: Tensor | None = None,
    clip: bool = False,
    block: int = 1,
    multiplier: float = 1.0,
    rope: Rope | None = None,
) -> QuantizedTensor:
    """As :func:`.reference.quantize_rows`, for INT8, INT4, FP8 and FP4.

    Args:
        rope: rotates ``x`` as it is loaded; then the twin's ``x`` is
            :func:`..rope.apply_rope` of it, and ``mean`` the mean of that.

    Raises:
        ValueError: another precision, or ``block`` is not 1, 32, 64 or 128, or not 1 for FP4.
    """
    _check_rows(precision)
    if precision is Precision.FP4 and block != 1:
        raise ValueError(f"block must be 1 for fp4, got {block}")
    if block not in (1, 32, 64, 128):
        raise ValueError(f"block must be 1, 32, 64 or 128, got {block}")
    batch, heads, length, head_dim = x.shape
    dim = padded_dim(head_dim)
    rows = block if block > 1 else 16 if clip else 32
    blocks = cdiv(length, rows)
    codes, micro = _empty_rows(x, precision)
    groups = length if block == 1 else blocks
    scale = torch.empty(batch, heads, groups, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        start_kernel(
            _quantize_rows_kernel,
            (blocks * batch * heads,),
            x,
            None if mean is None else mean.contiguous(),
            factor,
            sign_seed if rotation else None,
            codes,
            scale,
            micro,
            length,
            heads,
            1 if factor is None else heads // factor.shape[1],
            mean.shape[2] if mean is not None and mean.ndim == 4 else 1,
            *x.stride(),
            multiplier,
            **rope_arguments(rope, x),
            D=head_dim,
            DP=dim,
            LOG2_DP=dim.bit_length() - 1,
            FORMAT=precision.value,
            TOP=code_top(precision),
            BLOCK=rows,
            GROUPED=block != 1,
            MEAN_BLOCK=Q_BLOCK if mean is not None and mean.ndim == 4 else 0,
            ROTATE=rotation,
            SHARES=shares(precision, clip),
            num_warps=4 if rows * dim <= (2048 if precision is Precision.FP4 else 8192) else 8,
            enable_fp_fusion=False,
        )
    return QuantizedTensor(codes, scale, precision, block, micro)


def quantize_smoothed_rows(
    x: Tensor,
    precision: Precision,
    *,
    factor: Tensor | None = None,
    rotation: bool = False,
    sign_seed: Tensor | None = None,
    clip: bool = False,
    multiplier: float = 1.0,
    rope: Rope | None = None,
) -> tuple[QuantizedTensor, Tensor]:
    """:func:`quantize_rows` minus the mean of every 128 rows, reading ``x`` once.

    ``rope`` rotates ``x`` first.

    Returns:
        The codes with one scale per row, and the means ``[B, H, ceil(L / 128), D]`` float32, as of
        :func:`block_mean`.

    Raises:
        ValueError: another precision than INT8, INT4, FP8 and FP4.
    """
    _check_rows(precision)
    batch, heads, length, head_dim = x.shape
    dim, groups, device = padded_dim(head_dim), cdiv(length, Q_BLOCK), x.device
    codes, micro = _empty_rows(x, precision)
    scale = torch.empty(batch, heads, length, dtype=torch.float32, device=device)
    mean = torch.empty(batch, heads, groups, head_dim, dtype=torch.float32, device=device)
    with torch.cuda.device_of(x):
        start_kernel(
            _quantize_smoothed_rows_kernel,
            (groups * batch * heads,),
            x,
            mean,
            factor,
            sign_seed if rotation else None,
            codes,
            scale,
            micro,
            length,
            heads,
            1 if factor is None else heads // factor.shape[1],
            *x.stride(),
            multiplier,
            **rope_arguments(rope, x),
            D=head_dim,
            DP=dim,
            LOG2_DP=dim.bit_length() - 1,
            FORMAT=precision.value,
            TOP=code_top(precision),
            BLOCK=16 if clip else 32,
            MEAN_BLOCK=Q_BLOCK,
            ROTATE=rotation,
            SHARES=shares(precision, clip),
            num_warps=4 if rope is None else 8,  # room for the tables
            enable_fp_fusion=False,
        )
    return QuantizedTensor(codes, scale, precision, 1, micro), mean


def _check_rows(precision: Precision) -> None:
    if precision not in STORAGE:
        raise ValueError(f"precision must be int8, int4, fp8 or fp4, got {precision.value}")


def _empty_rows(x: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """Room for the codes of ``x``, and for the micro scales of FP4."""
    dim = padded_dim(x.shape[3])
    shape, storage = (*x.shape[:3], dim * precision.bits // 8), STORAGE[precision]
    codes = torch.empty(shape, dtype=storage, device=x.device)
    if precision is not Precision.FP4:
        return codes, None
    shape = (*x.shape[:3], dim // FP4_GROUP)
    return codes, torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
