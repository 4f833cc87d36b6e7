"""Inline assembly of the Gluon attention kernel: products of one thread's registers.

Every function is called while compiling, with the names of the registers that one thread holds of
each tensor, in layout order, and returns PTX.  ``docs/kernels.md`` explains the orders.
"""

from __future__ import annotations

import struct

from triton.experimental import gluon

from ..formats import LOG2E

#: -1.5 * 2^23 as float32 bits.  An integer sum that starts here *is* the float -12582912 - sum, so
#: that no conversion instruction is needed (|sum| < 2^22).
MAGIC_BITS = 0xCB400000
_MINUS_MAGIC, _PLUS_MAGIC = f"0f{MAGIC_BITS:08X}", f"0f{MAGIC_BITS ^ 1 << 31:08X}"

#: Of every 8 tiles of 8 channels, those whose integer sums are converted and not subtracted from.
#: On sm_80 the special-function unit does that, which has time where the FP32 lanes have none; on
#: later cards the conversion (I2FP) costs what the subtraction does.
CONVERTED = 3

#: The same where sums are scaled.
CONVERTED_SCALED = 3

#: Four bytes of one, with which ``dp4a`` adds a word's bytes.
_ONES = 0x01010101

_LOG2E = f"0f{struct.unpack('I', struct.pack('f', LOG2E))[0]:08X}"

_INT4 = "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32"
_INT8 = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
_UINT8 = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.u8.s8.s32"
_FP8_F16 = "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16"


@gluon.constexpr_function
def regs(names):
    """Registers as one vector operand."""
    return "{" + ", ".join(names) + "}"


@gluon.constexpr_function
def _scores(mma, outputs, inputs):
    (s,) = outputs
    q, k, magic, scale, offset, *more = inputs
    k_tiles = len(q) // 4  # 4 words of q a k tile, 2 of k a k and n8 tile
    lines = ["{ .reg .b32 c<4>, bit; .reg .pred seen;"]
    for n in range(len(s) // 4):
        for t in range(k_tiles):
            word = 2 * (n * k_tiles + t)
            lines.append(
                f"{mma} {{c0, c1, c2, c3}}, {regs(q[4 * t : 4 * t + 4])}, "
                f"{regs(k[word : word + 2])}, {'{c0, c1, c2, c3}' if t else regs(magic)};"
            )
        for i in range(4):
            column, out = 2 * n + i % 2, s[4 * n + i]
            lines.append(f"mov.b32 {out}, c{i};")
            only = ""
            if len(more) % 2:  # what is hidden stays the large negative number that it is
                lines.append(seen(more[-1], 4 * n + i))
                only = "@seen "
            lines.append(f"{only}fma.rn.f32 {out}, {out}, {scale[column]}, {offset[column]};")
            if len(more) > 1:
                q_scale, bias = more[:2]
                lines.append(f"fma.rn.f32 {out}, {out}, {q_scale[i // 2]}, {bias[column]};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def seen(bits, i):
    """Sets the predicate of a lane's score; ptxas makes seven at a time of them (R2P)."""
    return f"and.b32 bit, {bits[0]}, {1 << i}; setp.ne.b32 seen, bit, 0;"


@gluon.constexpr_function
def scores_int4(outputs, inputs):
    """``(magic + Q K^T) * scale + offset`` of one tile, Q and K in words of 8 nibbles.

    With a bias, ``.. * q_scale + bias``.
    """
    return _scores(_INT4, outputs, inputs)


@gluon.constexpr_function
def scores_int8(outputs, inputs):
    """As :func:`scores_int4`, Q and K in words of 4 bytes."""
    return _scores(_INT8, outputs, inputs)


@gluon.constexpr_function
def magic_words(outputs, inputs):
    """The magic bits in four registers.

    They depend on sizes, whose sign bits are never set: ptxas would otherwise write the constants
    anew for every tile.
    """
    (out,) = outputs
    sizes = inputs
    return "\n".join(
        f"shr.u32 {name}, {size[0]}, 31; or.b32 {name}, {name}, {MAGIC_BITS};"
        for name, size in zip(out, sizes, strict=True)
    )


@gluon.constexpr_function
def program_after(outputs, inputs):
    """The program's number, which can't be known before a pointer is: its highest bit is 0."""
    (results,) = outputs
    (out,) = results
    (pointers,) = inputs
    return (
        f"{{ .reg .b64 high; .reg .b32 none; shr.u64 high, {pointers[0]}, 63; "
        f"cvt.u32.u64 none, high; mov.u32 {out}, %ctaid.x; add.u32 {out}, {out}, none; }}"
    )


@gluon.constexpr_function
def _p_words(p):
    """P's registers as words of the product's operand: 4 bytes each, lowest first.

    Two n8 tiles of the score accumulator make one k16 half of the operand; V's tokens are stored
    in the matching order.
    """
    words = []
    for tile in range(0, len(p) // 4, 2):
        for row in range(2):
            low, high = 4 * tile + 2 * row, 4 * (tile + 1) + 2 * row
            words.append([p[low], p[low + 1], p[high], p[high + 1]])
    return words


@gluon.constexpr_function
def values_fp8(outputs, inputs):
    """``out = acc * alpha + e4m3(p) @ v``; the product accumulates in FP16 over the tile's keys."""
    (out,) = outputs
    p, v, acc, alpha = inputs
    words = _p_words(p)
    k_tiles = len(words) // 4
    lines = [
        f"{{ .reg .b32 a<{len(words)}>, c<2>, z; .reg .b16 h<4>; .reg .f32 x<4>; mov.b32 z, 0;"
    ]
    for i, word in enumerate(words):
        w, x, y, z = word
        lines.append(f"cvt.rn.satfinite.e4m3x2.f32 h0, {x}, {w};")
        lines.append(f"cvt.rn.satfinite.e4m3x2.f32 h1, {z}, {y}; mov.b32 a{i}, {{h0, h1}};")
    for n in range(len(out) // 4):
        for k in range(k_tiles):
            word = 2 * (n * k_tiles + k)
            lines.append(
                f"{_FP8_F16} {{c0, c1}}, {regs([f'a{4 * k + i}' for i in range(4)])}, "
                f"{regs(v[word : word + 2])}, {'{c0, c1}' if k else '{z, z}'};"
            )
        lines.append("mov.b32 {h0, h1}, c0; mov.b32 {h2, h3}, c1;")
        for i in range(4):
            r = 4 * n + i
            lines.append(f"cvt.f32.f16 x{i}, h{i};")
            lines.append(f"fma.rn.f32 {out[r]}, {acc[r]}, {alpha[i // 2]}, x{i};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def values_int8(outputs, inputs):
    """``acc * alpha + round(p) @ v``; p is at most 127.

    With a total, also ``total * alpha + sum of round(p)`` of one thread's columns, as
    :func:`add_row` has them.
    """
    return _values_int8(_INT8, "s32", False, outputs, inputs)


@gluon.constexpr_function
def values_uint8(outputs, inputs):
    """As :func:`values_int8`; p is at most 255."""
    return _values_int8(_UINT8, "u32", False, outputs, inputs)


@gluon.constexpr_function
def values_int8_tiles(outputs, inputs):
    """``acc * alpha + scale * (round(p) @ v)``, with a total as :func:`values_int8`.

    Scales come in words of two channels' bfloat16s.
    """
    return _values_int8(_INT8, "s32", True, outputs, inputs)


@gluon.constexpr_function
def values_uint8_tiles(outputs, inputs):
    """As :func:`values_int8_tiles`; p is at most 255."""
    return _values_int8(_UINT8, "u32", True, outputs, inputs)


@gluon.constexpr_function
def _values_int8(mma, bytes_of_p, scaled, outputs, inputs):
    out, *sums = outputs
    p, v, acc, alpha, magic, *totals = inputs
    if scaled:
        scales, *totals = totals
    words = _p_words(p)
    k_tiles = len(words) // 4
    lines = [f"{{ .reg .b32 a<{len(words)}>, b<4>, c<4>, z; .reg .f32 x<4>; mov.b32 z, 0;"]
    for i, word in enumerate(words):
        for j in range(4):  # the sum's low byte is the rounded code
            lines.append(f"add.rn.f32 x{j}, {word[j]}, {_PLUS_MAGIC}; mov.b32 b{j}, x{j};")
        lines.append("prmt.b32 b0, b0, b1, 0x0040; prmt.b32 b2, b2, b3, 0x0040;")
        lines.append(f"prmt.b32 a{i}, b0, b2, 0x5410;")
    for joined, total in zip(sums, totals, strict=True):  # none or one
        for row in range(2):
            start = magic[row]
            for i in range(row, len(words), 2):
                lines.append(f"dp4a.{bytes_of_p}.s32 c{row}, a{i}, {_ONES}, {start};")
                start = f"c{row}"
            lines.append(f"mov.b32 x{row}, c{row}; sub.rn.f32 x{row}, {_MINUS_MAGIC}, x{row};")
            lines.append(f"fma.rn.f32 {joined[row]}, {total[row]}, {alpha[row]}, x{row};")
    for n in range(len(out) // 4):
        share = CONVERTED_SCALED if scaled else CONVERTED
        convert = n * share % 8 < share
        start = "{z, z, z, z}" if convert else regs(magic)
        for k in range(k_tiles):
            word = 2 * (n * k_tiles + k)
            lines.append(
                f"{mma} {{c0, c1, c2, c3}}, {regs([f'a{4 * k + i}' for i in range(4)])}, "
                f"{regs(v[word : word + 2])}, {'{c0, c1, c2, c3}' if k else start};"
            )
        of = slice(4 * n, 4 * n + 4)
        if scaled:
            lines += _join_scaled(out[of], acc[of], alpha, scales[n], convert)
        else:
            lines += _join(out[of], acc[of], alpha, convert)
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _join(out, acc, alpha, convert):
    """``out = acc * alpha + sum`` of an n8 tile, whose integers are in c and become floats in x."""
    lines = []
    for i in range(4):
        if convert:
            lines.append(f"cvt.rn.f32.s32 x{i}, c{i};")
        else:
            lines.append(f"mov.b32 x{i}, c{i}; sub.rn.f32 x{i}, {_MINUS_MAGIC}, x{i};")
        lines.append(f"fma.rn.f32 {out[i]}, {acc[i]}, {alpha[i // 2]}, x{i};")
    return lines


@gluon.constexpr_function
def _join_scaled(out, acc, alpha, word, convert):
    """``out = acc * alpha + scale * sum``, scales of two channels in a word.

    Not converted, what a sum starts from is taken out of ``acc * alpha`` in the same fma: that
    rounds to half a unit of the sum, which V's rounding moves by a hundred of them.
    """
    lines = [f"{{ .reg .b32 s; .reg .f32 f<2>, m<2>; shl.b32 s, {word}, 16; mov.b32 f0, s;"]
    lines.append(f"and.b32 s, {word}, 0xFFFF0000; mov.b32 f1, s;")
    for i in range(2 * (not convert)):
        lines.append(f"mul.rn.f32 m{i}, f{i}, {_MINUS_MAGIC}; neg.f32 f{i}, f{i};")
    for i in range(4):
        one, other = (acc[i], alpha[i // 2]), (f"x{i}", f"f{i % 2}")
        if convert:
            lines.append(f"cvt.rn.f32.s32 x{i}, c{i}; mul.rn.f32 {out[i]}, {one[0]}, {one[1]};")
        else:
            lines.append(f"mov.b32 x{i}, c{i};")
            lines.append(f"fma.rn.f32 {out[i]}, {one[0]}, {one[1]}, m{i % 2};")
        lines.append(f"fma.rn.f32 {out[i]}, {other[0]}, {other[1]}, {out[i]};")
    return [*lines, "}"]


@gluon.constexpr_function
def _add_mask(kind, outputs, inputs):
    (out,) = outputs
    s, *chunks = inputs
    words = [word for chunk in chunks for word in chunk]
    lines = ["{ .reg .b32 x; .reg .b16 h<2>; .reg .f32 y;"]
    for i, pair in enumerate(zip(out, s, strict=True)):
        dst, src = pair
        word = words[i] if kind == "fp32" else words[i // 2]
        if kind == "fp32":
            lines.append(f"mov.b32 y, {word};")
        elif kind == "bf16":
            change = f"and.b32 x, {word}, 0xFFFF0000;" if i % 2 else f"shl.b32 x, {word}, 16;"
            lines.append(f"{change} mov.b32 y, x;")
        else:
            lines.append(f"mov.b32 {{h0, h1}}, {word}; cvt.f32.f16 y, h{i % 2};")
        lines.append(f"fma.rn.f32 {dst}, y, {_LOG2E}, {src};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def add_fp16(outputs, inputs):
    """``s + log2(e) * mask``, a lane's values of the mask in words of two."""
    return _add_mask("fp16", outputs, inputs)


@gluon.constexpr_function
def add_bf16(outputs, inputs):
    """As :func:`add_fp16`."""
    return _add_mask("bf16", outputs, inputs)


@gluon.constexpr_function
def add_fp32(outputs, inputs):
    """As :func:`add_fp16`, a word each."""
    return _add_mask("fp32", outputs, inputs)


@gluon.constexpr_function
def hide_columns(outputs, inputs):
    """-inf for the columns of a row from ``visible`` on, a count per row.

    Written out so that the columns are immediates: as a tensor they would take 16 registers.
    """
    (out,) = outputs
    s, visible = inputs
    lines = [
        "{ .reg .b32 own, seen<2>; .reg .pred shown;",
        "mov.u32 own, %laneid; and.b32 own, own, 3; shl.b32 own, own, 1;",
        *(f"sub.s32 seen{row}, {visible[row]}, own;" for row in range(2)),
    ]
    for i, pair in enumerate(zip(out, s, strict=True)):
        dst, src = pair
        lines.append(f"setp.gt.s32 shown, seen{i // 2 % 2}, {8 * (i // 4) + i % 2};")
        lines.append(f"selp.f32 {dst}, {src}, 0fFF800000, shown;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def add_row(outputs, inputs):
    """``out = total * alpha + sum of p`` over one *thread's* columns (``partial_layout``)."""
    (out,) = outputs
    p, total, alpha = inputs
    lines = ["{ .reg .f32 y<2>;"]
    for row in range(2):
        columns = [r for i, r in enumerate(p) if i % 4 // 2 == row]
        lines.append(f"fma.rn.f32 y0, {total[row]}, {alpha[row]}, {columns[0]};")
        lines.append(f"add.rn.f32 y1, {columns[1]}, {columns[2]};")
        lines += [f"add.rn.f32 y{i % 2}, y{i % 2}, {c};" for i, c in enumerate(columns[3:])]
        lines.append(f"add.rn.f32 {out[row]}, y0, y1;")
    return "\n".join([*lines, "}"])
