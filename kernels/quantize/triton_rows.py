"""Q's and K's rows as a program quantizes them, bit-exact with :mod:`.reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FP4_GROUP, TILE_N, Precision, padded_dim
from ..tiles import round_even, round_to_int
from ..versions import to_e4m3
from .limits import CLIP_LIMIT, CLIP_RESOLUTION
from .rope import load_rotated_rows
from .triton_fp4 import fp4_groups, pack_codes
from .triton_value import STORAGE, scale_of

_TILE_N, _GROUP = tl.constexpr(TILE_N), tl.constexpr(FP4_GROUP)
_CLIP_LIMIT, _CLIP_RESOLUTION = tl.constexpr(CLIP_LIMIT), tl.constexpr(CLIP_RESOLUTION)
#: What the attention kernel's integer sums start from, as a float, is minus this.
_MAGIC = tl.constexpr(12582912.0)


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
    p_columns,
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
    COLUMN_FACTOR: tl.constexpr,
):
    """Rotate, scale, round and store one tile of :func:`rows_program`."""
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
    if p_columns is not None:
        # With two mantissa bits free 1.5 * 2^23 * scale is exact; scores move by 2^-22 of theirs.
        kept = (scale.to(tl.int32, bitcast=True) & -4).to(tl.float32, bitcast=True)
        kept *= COLUMN_FACTOR
        # Where a token stands in its tile's list (``permute.column_order``).
        position = ((o_l & 6) << 3) | ((o_l & 56) >> 2) | (o_l & 1)
        tiles = tl.cdiv(length, _TILE_N) + 2
        at_column = (i_bh * tiles + o_l // _TILE_N) * (2 * _TILE_N) + position
        tl.store(p_columns + at_column, kept)
        tl.store(p_columns + at_column + _TILE_N, kept * _MAGIC)
    scale *= multiplier
    if GROUPED:
        tl.store(p_scale + i_bh * blocks + i_l, tl.max(scale, 0))
    else:
        tl.store(p_scale + i_bh * length + o_l, scale, mask=o_l < length)


class Rows(NamedTuple):
    """Q or K as a program finds it, and where its codes go."""

    p_x: Any
    p_mean: Any  # [B, H, means, D], read or written, or None
    p_factor: Any  # [B, H / group, D], or None
    p_seed: Any  # one int32, seed of the rotation's signs, or None
    p_codes: Any  # [B, H, L, bytes of DP]
    p_scale: Any  # [B, H, groups]
    p_micro: Any  # [B, H, L, DP / 16], FP4 only
    p_columns: Any  # [B, H, columns / 64, 2, 64] of ``gluon_columns.key_scales``, or None
    length: Any
    heads: Any
    group: Any
    means: Any
    stride_b: Any
    stride_h: Any
    stride_l: Any
    stride_d: Any
    multiplier: Any


@triton.jit
def _rows_at(
    start,
    x,  # Rows
    p_x,  # of the head
    rope,
    mean,  # [DP]
    i_bh,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMN_FACTOR: tl.constexpr,
):
    """Quantize BLOCK rows from ``start`` on."""
    o_d = tl.arange(0, DP)
    rows, inside = load_rotated_rows(
        p_x,
        start + tl.arange(0, BLOCK),
        x.length,
        x.stride_l,
        x.stride_d,
        i_bh // x.heads,
        rope,
        D,
        0,
        DP,
        ROPE,
        INTERLEAVED,
    )
    if x.p_mean is not None:
        rows = tl.where(inside, rows - mean[None, :], 0.0)
    if x.p_factor is not None:
        p_factor = x.p_factor + i_bh // x.group * D + o_d
        rows *= tl.load(p_factor, mask=o_d < D, other=1.0)[None, :]
    _quantize_tile(
        rows,
        x.p_seed,
        x.p_codes,
        x.p_scale,
        x.p_micro,
        x.p_columns,
        i_bh,
        start // BLOCK,
        tl.cdiv(x.length, BLOCK),
        x.length,
        x.multiplier,
        DP,
        LOG2_DP,
        FORMAT,
        TOP,
        BLOCK,
        GROUPED,
        ROTATE,
        SHARES,
        COLUMN_FACTOR,
    )


@triton.jit
def rows_program(
    x,  # Rows
    rope,  # Tables
    program,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,  # "int8", "int4", "fp8", "fp4"
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,  # rows at a time
    SPAN: tl.constexpr,  # rows of a program
    GROUPED: tl.constexpr,  # one scale for BLOCK rows
    MEAN_BLOCK: tl.constexpr,  # rows that share a mean; 0: all
    OWN_MEAN: tl.constexpr,  # the program's own, which it finds and writes
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,  # candidates of clipping, empty without
    ROPE: tl.constexpr,  # columns of the tables, 0 without
    INTERLEAVED: tl.constexpr,
    COLUMN_FACTOR: tl.constexpr,  # of scales in column order, whose lists are two tiles longer
):
    """Quantize some rows of one head.

    Those of one mean are met twice, the second time in the cache: in registers they would spill.
    """
    limit = x.length
    if x.p_columns is not None:
        limit = (tl.cdiv(x.length, _TILE_N) + 2) * _TILE_N
    spans = tl.cdiv(limit, SPAN)
    first = program % spans * SPAN
    i_bh = (program // spans).to(tl.int64)
    o_d = tl.arange(0, DP)
    p_x = x.p_x + (i_bh // x.heads) * x.stride_b + (i_bh % x.heads) * x.stride_h
    stop = tl.minimum(limit, first + SPAN)
    mean = tl.zeros([DP], tl.float32)
    if OWN_MEAN:
        total = tl.zeros([DP], tl.float32)
        for start in range(first, stop, BLOCK):
            rows, _ = load_rotated_rows(
                p_x,
                start + tl.arange(0, BLOCK),
                x.length,
                x.stride_l,
                x.stride_d,
                i_bh // x.heads,
                rope,
                D,
                0,
                DP,
                ROPE,
                INTERLEAVED,
            )
            total += tl.sum(rows, 0)
        mean = tl.div_rn(total, (stop - first).to(tl.float32))
        tl.store(x.p_mean + (i_bh * spans + first // SPAN) * D + o_d, mean, mask=o_d < D)
    elif x.p_mean is not None:
        i_mean = i_bh * x.means
        if MEAN_BLOCK:
            i_mean += first // MEAN_BLOCK
        mean = tl.load(x.p_mean + i_mean * D + o_d, mask=o_d < D, other=0.0)
    # A loop costs registers, for what is the same in all of its turns.
    if SPAN == BLOCK:
        _rows_at(
            first,
            x,
            p_x,
            rope,
            mean,
            i_bh,
            D,
            DP,
            LOG2_DP,
            FORMAT,
            TOP,
            BLOCK,
            GROUPED,
            ROTATE,
            SHARES,
            ROPE,
            INTERLEAVED,
            COLUMN_FACTOR,
        )
    else:
        for start in range(first, stop, BLOCK):
            _rows_at(
                start,
                x,
                p_x,
                rope,
                mean,
                i_bh,
                D,
                DP,
                LOG2_DP,
                FORMAT,
                TOP,
                BLOCK,
                GROUPED,
                ROTATE,
                SHARES,
                ROPE,
                INTERLEAVED,
                COLUMN_FACTOR,
            )


def check_rows(precision: Precision) -> None:
    if precision not in STORAGE:
        raise ValueError(f"precision must be int8, int4, fp8 or fp4, got {precision.value}")


def empty_rows(x: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """Room for the codes of ``x``, and for the micro scales of FP4."""
    dim = padded_dim(x.shape[3])
    shape, storage = (*x.shape[:3], dim * precision.bits // 8), STORAGE[precision]
    codes = torch.empty(shape, dtype=storage, device=x.device)
    if precision is not Precision.FP4:
        return codes, None
    shape = (*x.shape[:3], dim // FP4_GROUP)
    return codes, torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
