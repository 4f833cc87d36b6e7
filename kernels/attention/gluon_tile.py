"""One tile of the Gluon attention kernel: 64 keys of the online softmax."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import TILE_N
from ..versions import distributed_type, inline_asm
from .gluon_asm import (
    add_row,
    hide_columns,
    scores_int4,
    scores_int8,
    values_fp8,
    values_int8,
    values_int8_tiles,
    values_uint8,
    values_uint8_tiles,
)
from .gluon_fp4 import scores_fp4, values_fp4, weigh_fp4
from .gluon_program import add_mask, multiply_up, subtract_up
from .terms import LAG

_TILE_N, _MINUS_MAGIC = gl.constexpr(TILE_N), gl.constexpr(12582912.0)

#: log2 of P's largest code.
RANGE_FP8 = gl.constexpr(math.log2(448.0))
RANGE_INT8, RANGE_UINT8 = gl.constexpr(math.log2(127.0)), gl.constexpr(math.log2(255.0))
_LAG = gl.constexpr(LAG)


class State(NamedTuple):
    """What goes from tile to tile, and where the next tile's operands lie.

    What a kernel does not have is anything else.
    """

    acc: Any  # [BM, DP] float32
    total: Any  # [BM, 4] float32, each lane's own part
    top: Any  # [BM] float32, log2 units
    reference: Any  # [BM], what P of INT8 or FP4 is relative to
    p_k: Any  # to copy from, steps ahead
    p_v: Any
    p_k_scale: Any
    p_bias: Any
    p_k_micro: Any
    p_v_micro: Any
    p_mask: Any
    p_tiles: Any
    factor: Any  # of V's last tile, in whose units acc is
    p_v_scale: Any  # [4, DP / 8] words of two scales of an INT8 V, a lane's


@gluon.jit
def copied(state, p_k, p_v):
    """The state when another step's K and V are on their way."""
    return State(
        state.acc,
        state.total,
        state.top,
        state.reference,
        p_k,
        p_v,
        state.p_k_scale,
        state.p_bias,
        state.p_k_micro,
        state.p_v_micro,
        state.p_mask,
        state.p_tiles,
        state.factor,
        state.p_v_scale,
    )


@gluon.jit
def attend_tile(
    state,
    tile,
    k_tile,
    v_tile,
    k_len,
    q,
    q_micro,
    q_scale,
    o_m,
    magic,
    EDGE: gl.constexpr,
    QK: gl.constexpr,
    PV: gl.constexpr,
    BIAS: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    TILED: gl.constexpr,
    BY_TILE: gl.constexpr,
    D: gl.constexpr,
    STEP: gl.constexpr,
    mma: gl.constexpr,
):
    """64 keys of the online softmax."""
    rhs: gl.constexpr = gl.DotOperandLayout(1, mma, 1)
    FP8: gl.constexpr = PV == "fp8"
    UNSIGNED: gl.constexpr = PV == "uint8"
    RANGE: gl.constexpr = RANGE_FP8 if FP8 else RANGE_UINT8 if UNSIGNED else RANGE_INT8
    ADDITIVE: gl.constexpr = MASK != "none" and MASK != "bool"
    SCALED: gl.constexpr = BIAS or ADDITIVE  # q_scale is applied to S, not within the exponent
    acc, total, top, reference = state.acc, state.total, state.top, state.reference
    p_k, p_v, p_k_scale, p_bias = state.p_k, state.p_v, state.p_k_scale, state.p_bias
    p_k_micro, p_v_micro, p_mask = state.p_k_micro, state.p_v_micro, state.p_mask
    p_tiles, factor, p_v_scale = state.p_tiles, state.factor, state.p_v_scale

    s_type: gl.constexpr = distributed_type(gl.float32, [q.shape[0], _TILE_N], mma)
    k = k_tile.permute((1, 0)).load(rhs)
    k_scale = gl.load(p_k_scale)
    p_k_scale += 2 * _TILE_N
    if BIAS:
        bias = gl.load(p_bias)
        p_bias += _TILE_N
    bits = ()
    if MASK == "bool":
        bits = (gl.load(p_mask),)  # type: ignore[assignment]
        p_mask += 32
    smoothing = (q_scale, bias) if BIAS else ()
    if QK == "fp4":
        if EDGE:
            rows: gl.constexpr = gl.SliceLayout(1, p_k_micro.type.layout)
            inside = tile * _TILE_N + gl.arange(0, _TILE_N, rows) < k_len
            k_micro = gl.load(p_k_micro, mask=inside[:, None], other=0)
        else:
            k_micro = gl.load(p_k_micro)
        p_k_micro += _TILE_N * p_k_micro.shape[1]
        s = inline_asm(
            scores_fp4,
            _constraints("=&f", 4, 1, BIAS, MASK == "bool"),
            (q, k, q_micro, k_micro, k_scale) + smoothing + bits,  # noqa: RUF005
            s_type,
            is_pure=True,
        )
    else:
        # Issue slots are dearer than loads where a tile has more tensor-core work.
        WIDE: gl.constexpr = v_tile.shape[0] >= 128 and (FP8 or MASK == "none")
        offset = gl.load(p_k_scale - _TILE_N) if WIDE else k_scale * _MINUS_MAGIC
        # Scales leave two mantissa bits free, so that the magic term cancels exactly.
        s = inline_asm(
            scores_int4 if QK == "int4" else scores_int8,
            _constraints("=&f", 3, 2, BIAS, MASK == "bool"),
            (q, k, magic, k_scale, offset) + smoothing + bits,  # noqa: RUF005
            s_type,
            is_pure=True,
        )
    if SCALED and not BIAS:
        s = s * q_scale[:, None]
    start = tile * _TILE_N
    if ADDITIVE:
        s, p_mask = add_mask(s, p_mask, MASK)
    if EDGE:
        visible = gl.full([q.shape[0]], 0, gl.int32, gl.SliceLayout(1, mma)) + k_len
        if CAUSAL:
            visible = gl.minimum(visible, o_m + 1)
        s = inline_asm(hide_columns, ("=f", "f", "r"), [s, visible - start], s_type, is_pure=True)

    if PV == "fp4":
        words, p_micro, total, alpha, top, reference = weigh_fp4(
            s, q_scale, total, top, reference, _LAG, SCALED
        )
        if EDGE or v_tile.shape[0] != D:
            channel = gl.arange(0, v_tile.shape[0], p_v_micro.type.layout)
            v_micro = gl.load(p_v_micro, mask=(channel < D) & (start < k_len), other=0)
        else:
            v_micro = gl.load(p_v_micro)
        p_v_micro += D
        v = v_tile.permute((1, 0)).load(rhs)
        acc = inline_asm(
            values_fp4,
            ("=&f", "r", "r", "r", "r", "f", "f"),
            [words, p_micro, v, v_micro, acc, alpha],
            acc.type,
            is_pure=True,
        )
        return State(
            acc,
            total,
            top,
            reference,
            p_k,
            p_v,
            p_k_scale,
            p_bias,
            p_k_micro,
            p_v_micro,
            p_mask,
            p_tiles,
            factor,
            p_v_scale,
        )
    tile_top = gl.max(s, 1)
    if not SCALED:
        tile_top = multiply_up(tile_top, q_scale)
    before = top if FP8 else reference
    top = gl.maximum(top, tile_top)
    now = top
    if not FP8:
        # P relative to the tile's own maximum fills its codes, whatever came before.
        now = gl.maximum(tile_top, top - _LAG)
        reference = now
    alpha = gl.exp2(before - now)
    # Rounded up, so that no weight is above P's largest code, however large the scores are.
    shift = subtract_up(now, RANGE)
    if SCALED:
        p = gl.exp2(s - shift[:, None])
    else:
        p = gl.exp2(gl.fma(s, _down(q_scale, s), _down(-shift, s)))
    # Of INT4 Q and K the rounded codes are added, together with P V.
    ROUNDED: gl.constexpr = QK == "int4" and not FP8
    plain: gl.constexpr = values_uint8 if UNSIGNED else values_int8
    scaled: gl.constexpr = values_uint8_tiles if UNSIGNED else values_int8_tiles
    values: gl.constexpr = scaled if BY_TILE else plain
    if not ROUNDED:
        total = inline_asm(
            add_row, ("=&f", "f", "f", "f"), [p, total, alpha], total.type, is_pure=True
        )
    v = v_tile.permute((1, 0)).load(rhs)
    if TILED:
        # The accumulator goes over to this tile's units, in the factor that it takes anyway.
        alpha = alpha * (factor * gl.load(p_tiles + 1))
        factor = gl.load(p_tiles)
        p_tiles += 2
    scales = ()
    if BY_TILE:
        scales = (gl.load(p_v_scale),)  # type: ignore[assignment]
        step = v_tile.shape[0] // 2
        if EDGE and STEP > 1:  # a tile beyond the last has none, and nothing to scale
            step = gl.where(start + _TILE_N < k_len, step, 0)
        p_v_scale += step
    if FP8:
        acc = inline_asm(
            values_fp8, ("=&f", "f", "r", "f", "f"), [p, v, acc, alpha], acc.type, is_pure=True
        )
    elif ROUNDED:
        types: gl.constexpr = (acc.type, total.type)
        acc, total = inline_asm(
            values,
            _value_constraints(True, BY_TILE),
            (p, v, acc, alpha, magic) + scales + (total,),  # noqa: RUF005
            types,
            is_pure=True,
        )
    else:
        acc = inline_asm(
            values,
            _value_constraints(False, BY_TILE),
            (p, v, acc, alpha, magic) + scales,  # noqa: RUF005
            acc.type,
            is_pure=True,
        )
    return State(
        acc,
        total,
        top,
        reference,
        p_k,
        p_v,
        p_k_scale,
        p_bias,
        p_k_micro,
        p_v_micro,
        p_mask,
        p_tiles,
        factor,
        p_v_scale,
    )


@gluon.constexpr_function
def _value_constraints(total, by_tile):
    """Of the value functions: what they always take, then V's scales, then the row sums."""
    out = ("=&f", "=&f") if total else ("=&f",)
    return (*out, "f", "r", "f", "f", "r", *["r"] * by_tile, *["f"] * total)


@gluon.constexpr_function
def _constraints(out, words, floats, bias, bits):
    """Of the score functions: what they always take, then Q's scale and the bias, then the bits."""
    return (out, *["r"] * words, *["f"] * (floats + 2 * bias), *["r"] * bits)


@gluon.jit
def _down(x, like):
    """[M] -> [M, N]"""
    return gl.broadcast(x[:, None], like)[0]
