"""NVFP4 in the Gluon attention kernel: scores, two-level P, and P V.

``mma`` takes the E4M3 scales of 64 values as one word.  Of the four threads of a row group the
first holds the word of row g of the left operand and the second that of row g + 8; which thread
holds the word of a column is an immediate, so that the columns' words are spread over all four
(:func:`.gluon_layouts.micro_layout`).  ``docs/kernels.md`` explains the rest.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..quantize.limits import FP4_MAX, FP8_MAX, FP8_TINY
from ..versions import distributed_type, inline_asm
from .gluon_asm import MAGIC_BITS, regs, seen
from .gluon_layouts import p_micro_layout
from .gluon_program import multiply_up, subtract_up

_FP4 = (
    "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"
    ".f32.e2m1.e2m1.f32.ue4m3"
)

#: log2 of P's largest value: the largest code times the largest micro scale.
RANGE_FP4 = gl.constexpr(math.log2(FP4_MAX * FP8_MAX))

_LOG2_FP4_MAX = gl.constexpr(math.log2(FP4_MAX))
_TINY = f"0f{int(math.log2(FP8_TINY)) + 127 << 23:08X}"


@gluon.constexpr_function
def scores_fp4(outputs, inputs):
    """``Q K^T * scale`` of one tile in NVFP4; with a bias, ``.. * q_scale + bias``.

    What bits of a mask hide becomes the float that they hide integer sums by.
    """
    (s,) = outputs
    q, k, q_micro, k_micro, scale, *more = inputs
    k_tiles = len(q) // 4
    lines = ["{ .reg .f32 c<4>, z; .reg .b32 bit; .reg .pred seen; mov.f32 z, 0f00000000;"]
    for n in range(len(s) // 4):
        for t in range(k_tiles):
            word = 2 * (n * k_tiles + t)
            k_scale = k_micro[n // 4 * k_tiles + t]
            lines.append(
                f"{_FP4} {{c0, c1, c2, c3}}, {regs(q[4 * t : 4 * t + 4])}, "
                f"{regs(k[word : word + 2])}, {'{c0, c1, c2, c3}' if t else '{z, z, z, z}'}, "
                f"{{{q_micro[t]}}}, {{0, 0}}, {{{k_scale}}}, {{0, {n % 4}}};"
            )
        for i in range(4):
            column, out = 2 * n + i % 2, s[4 * n + i]
            lines.append(f"mul.rn.f32 {out}, c{i}, {scale[column]};")
            if len(more) % 2:
                lines.append(seen(more[-1], 4 * n + i))
                lines.append(f"selp.f32 {out}, {out}, 0f{MAGIC_BITS:08X}, seen;")
            if len(more) > 1:
                q_scale, bias = more[:2]
                lines.append(f"fma.rn.f32 {out}, {out}, {q_scale[i // 2]}, {bias[column]};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _halves(s, row):
    """A thread's registers of one row: 8 of the tile's first 32 keys, 8 of the others."""
    columns = [x for i, x in enumerate(s) if i % 4 // 2 == row]
    return columns[:8], columns[8:]


@gluon.constexpr_function
def _group_tops(outputs, inputs):
    """Maxima of the 16 keys that share a scale, for both of a thread's groups.

    Threads 0 and 1 of a row group share their groups, and so do 2 and 3.
    """
    low, high = outputs
    (s,) = inputs
    lines = ["{ .reg .f32 y;"]
    for row in range(2):
        for out, keys in zip((low[row], high[row]), _halves(s, row), strict=True):
            lines.append(f"max.f32 {out}, {keys[0]}, {keys[1]}, {keys[2]};")
            lines.append(f"max.f32 {out}, {out}, {keys[3]}, {keys[4]};")
            lines.append(f"max.f32 y, {keys[5]}, {keys[6]}, {keys[7]};")
            lines.append(f"max.f32 {out}, {out}, y;")
            lines.append(f"shfl.sync.bfly.b32 y, {out}, 1, 31, -1; max.f32 {out}, {out}, y;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _weights(outputs, inputs):
    """P as an operand, its scales, and ``total * alpha + sum of P`` of a thread's columns.

    P is ``2^(s - shift)``, or ``2^(s * q_scale - shift)``, and at most 2688.  The maximum of 16
    keys over 6 gives their scale, whose logarithm joins the shift: the exponential is the code.
    """
    words, micro, total = outputs
    s, low, high, shift, six, before, alpha, *q_scale = inputs
    lines = [
        "{ .reg .f32 m<4>, g<4>, u<8>, y<2>; .reg .b32 f<2>, own, other, pick;"
        ".reg .b16 h<2>, e<2>; .reg .b8 b<4>; .reg .pred odd;"
    ]
    for row in range(2):
        for i, top in ((2 * row, low[row]), (2 * row + 1, high[row])):
            lines.append(f"sub.rn.f32 m{i}, {top}, {six[row]}; ex2.approx.ftz.f32 m{i}, m{i};")
            lines.append(f"max.f32 m{i}, m{i}, {_TINY};")
        lines.append(f"cvt.rn.satfinite.e4m3x2.f32 h{row}, m{2 * row + 1}, m{2 * row};")
        lines.append(f"cvt.rn.f16x2.e4m3x2 f{row}, h{row}; mov.b32 {{e0, e1}}, f{row};")
        for i in range(2):
            j = 2 * row + i
            lines.append(f"cvt.f32.f16 m{j}, e{i}; lg2.approx.ftz.f32 g{j}, m{j};")
            lines.append(f"add.rn.f32 g{j}, g{j}, {shift[row]}; neg.f32 g{j}, g{j};")
    # Thread 0 wants the four scales of row g, thread 1 those of row g + 8; threads 2 and 3 hold the
    # second and the last of them.
    lines += [
        "mov.b32 own, {h0, h1}; mov.u32 pick, %laneid; and.b32 pick, pick, 1;",
        "mul.lo.u32 pick, pick, 0x2222; add.u32 pick, pick, 0x1010; prmt.b32 own, own, own, pick;",
        f"shfl.sync.bfly.b32 other, own, 2, 31, -1; prmt.b32 {micro[0]}, own, other, 0x5140;",
    ]
    for row in range(2):
        lines.append(f"mul.rn.f32 {total[row]}, {before[row]}, {alpha[row]};")
        for half, keys in enumerate(_halves(s, row)):
            g = 2 * row + half
            for i, key in enumerate(keys):
                if q_scale:
                    lines.append(f"fma.rn.f32 u{i}, {key}, {q_scale[0][row]}, g{g};")
                else:
                    lines.append(f"add.rn.f32 u{i}, {key}, g{g};")
                lines.append(f"ex2.approx.ftz.f32 u{i}, u{i};")
            for i in range(4):
                lines.append(f"cvt.rn.satfinite.e2m1x2.f32 b{i}, u{2 * i + 1}, u{2 * i};")
            lines.append(f"mov.b32 {words[2 * half + row]}, {{b0, b1, b2, b3}};")
            lines.append("add.rn.f32 y0, u0, u1; add.rn.f32 y1, u2, u3;")
            lines += [f"add.rn.f32 y{i % 2}, y{i % 2}, u{i};" for i in range(4, 8)]
            lines.append(f"add.rn.f32 y0, y0, y1; fma.rn.f32 {total[row]}, y0, m{g}, {total[row]};")
    return "\n".join([*lines, "}"])


@gluon.jit
def weigh_fp4(
    s,  # [BM, 64]
    q_scale,
    total,
    top,
    reference,
    LAG: gl.constexpr,
    SCALED: gl.constexpr,
):
    """One tile's P in NVFP4 behind the scale of its own maximum, as for INT8.

    Returns:
        P's words, their micro scales, and the new total, alpha, top and reference.
    """
    mma: gl.constexpr = s.type.layout
    part: gl.constexpr = total.type
    low, high = inline_asm(_group_tops, ("=&f", "=&f", "f"), [s], (part, part), is_pure=True)
    if not SCALED:
        scale = gl.convert_layout(q_scale, gl.SliceLayout(1, part.layout), assert_trivial=True)
        low, high = multiply_up(low, scale[:, None]), multiply_up(high, scale[:, None])
    tile_top = gl.max(gl.maximum(low, high), 1)
    tile_top = gl.convert_layout(tile_top, top.type.layout, assert_trivial=True)
    before = reference
    top = gl.maximum(top, tile_top)
    reference = gl.maximum(tile_top, top - LAG)
    alpha = gl.exp2(before - reference)
    shift = subtract_up(reference, RANGE_FP4)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1)
    words_type: gl.constexpr = distributed_type(gl.int32, [s.shape[0], 8], operand)
    micro_type: gl.constexpr = distributed_type(
        gl.int32, [s.shape[0], 2], p_micro_layout(s.shape[0] // 16)
    )
    types: gl.constexpr = (words_type, micro_type, part)
    six = shift + _LOG2_FP4_MAX
    if SCALED:
        words, micro, total = inline_asm(
            _weights,
            ("=&r", "=&r", "=&f", "f", "f", "f", "f", "f", "f", "f"),
            [s, low, high, shift, six, total, alpha],
            types,
            is_pure=True,
        )
    else:
        words, micro, total = inline_asm(
            _weights,
            ("=&r", "=&r", "=&f", "f", "f", "f", "f", "f", "f", "f", "f"),
            [s, low, high, shift, six, total, alpha, q_scale],
            types,
            is_pure=True,
        )
    return words, micro, total, alpha, top, reference


@gluon.constexpr_function
def values_fp4(outputs, inputs):
    """``out = acc * alpha + P V`` of one tile in NVFP4."""
    (out,) = outputs
    p, p_micro, v, v_micro, acc, alpha = inputs
    lines = ["{ .reg .f32 c<4>, z; mov.f32 z, 0f00000000;"]
    for n in range(len(out) // 4):
        lines.append(
            f"{_FP4} {{c0, c1, c2, c3}}, {regs(p)}, {regs(v[2 * n : 2 * n + 2])}, "
            f"{{z, z, z, z}}, {{{p_micro[0]}}}, {{0, 0}}, {{{v_micro[n // 4]}}}, {{0, {n % 4}}};"
        )
        for i in range(4):
            r = 4 * n + i
            lines.append(f"fma.rn.f32 {out[r]}, {acc[r]}, {alpha[i // 2]}, c{i};")
    return "\n".join([*lines, "}"])
