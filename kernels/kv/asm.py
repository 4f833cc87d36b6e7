"""Inline assembly of the decode kernel: products of codes that go from words to tensor cores.

Every function is called while compiling, with the names of the registers that one thread holds of
each tensor, in layout order, and returns PTX.  Lane ``4 g + t`` of a warp has the row g and the
columns 2 t and 2 t + 1 of 8 x 8 values (PTX ISA, fragments of ``mma.m16n8k16``).

One AND with an OR makes two numbers of two codes: with bits s to s + w - 1 of both halves kept and
the exponent of ``2^(10 - s)`` put over them, each half is ``2^(10 - s) + code``.  The offsets
are the same for every token, so their products leave the sums by the sum of the other operand.
"""

from __future__ import annotations

from triton.experimental import gluon

#: log2 of what P is multiplied by: small weights times small steps stay normal numbers in half.
P_SHIFT = 5

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
_ONES = 0x3C003C00


@gluon.constexpr_function
def regs(names):
    """Registers as one vector operand."""
    return "{" + ", ".join(names) + "}"


@gluon.constexpr_function
def planes_of(width):
    """Bits of the planes of a stored width."""
    return (2, 1) if width == 3 else (width,)


@gluon.constexpr_function
def _bits(value, exponent_bits, mantissa_bits):
    """The bits of a number that is not 0 and exact in this format."""
    sign, size, exponent = int(value < 0), abs(value), (1 << exponent_bits - 1) - 1
    while size >= 2.0:
        size, exponent = size / 2.0, exponent + 1
    while size < 1.0:
        size, exponent = size * 2.0, exponent - 1
    fraction = int((size - 1.0) * (1 << mantissa_bits))
    return (sign << exponent_bits | exponent) << mantissa_bits | fraction


@gluon.constexpr_function
def _half2(value):
    """A pair of equal halves."""
    return _bits(value, 5, 10) * 0x00010001


@gluon.constexpr_function
def _float(value):
    """A float32 as PTX writes it."""
    return f"0f{_bits(value, 8, 23):08X}"


@gluon.constexpr_function
def _start(bit, width):
    """Where a code that begins at a bit of its half shall begin in the number's mantissa.

    Two shifts serve a word; the offsets stay as small as that allows.
    """
    if width == 3:
        return bit % 8
    return bit + 2 if bit < 8 else bit - 6


@gluon.constexpr_function
def code_offset(bit, width):
    """What a number is above its code."""
    return 2.0 ** (10 - _start(bit, width))


@gluon.constexpr_function
def _name(word, by):
    """Of the register that holds a word shifted right."""
    return f"{word}{'n' if by < 0 else 'p'}{abs(by)}" if by else word


@gluon.constexpr_function
def _made(word, made, plane, width):
    """The register ``word``, which an instruction makes, and it shifted by all that is needed."""
    shifts = [-2, 6]
    if width == 3:
        shifts = [-2, -1, 6, 7] if plane else [8]
    lines = [f".reg .b32 {word};", made]
    for by in shifts:
        name, op = _name(word, by), "shl.b32" if by < 0 else "shr.u32"
        lines += [f".reg .b32 {name};", f"{op} {name}, {word}, {abs(by)};"]
    return "\n".join(lines)


@gluon.constexpr_function
def _numbers(out, words, bits, width):
    """``out``: two codes as two halves, of bits of one word for each plane."""
    start = _start(bits[0], width)
    magic, ones = (25 - start) * 0x04000400, (1 << min(width, 2 if width == 3 else 8)) - 1
    text = f"lop3.b32 {out}, {_name(words[0], bits[0] - start)}, {(ones << start) * 0x10001:#x}, "
    text += f"{magic:#x}, 0xEA;"
    if width == 3:
        source, mask = _name(words[1], bits[1] - start - 2), (4 << start) * 0x10001
        text += f" lop3.b32 {out}, {source}, {mask:#x}, {out}, 0xEA;"
    return text


@gluon.constexpr_function
def k_place(p, dim, odd, m):
    """Word (of a lane's) and bit of 16 channels' pair, of the even or odd of a lane's two g."""
    if p == 1:
        word, bit = k_place(2, dim, odd, m)
        if dim == 64:
            return 0, bit  # the lane has shifted it
        return word // 2, bit + word % 2
    per, count = 16 // p, dim // 16
    slot = odd * count + m
    return slot // per, p * (slot % per)


@gluon.constexpr_function
def v_place(p, dim, m):
    """The same of V, where a lane has one g."""
    if p == 1:
        word, bit = v_place(2, dim, m)
        return word // 2, bit + word % 2
    per = 16 // p
    return m // per, p * (m % per)


@gluon.constexpr_function
def _lane_shift(p, dim, key):
    """Sets ``sh`` to what a lane must shift its words by, where lanes share words; else ""."""
    if key:
        if p == 1 and dim == 64:  # t & 1
            return "mov.u32 sh, %laneid; and.b32 sh, sh, 1;"
        return ""
    g = "mov.u32 sh, %laneid; shr.u32 sh, sh, 2;"
    if p == 2 and dim == 64:  # 8 (g & 1)
        return g + " and.b32 sh, sh, 1; shl.b32 sh, sh, 3;"
    if p == 1 and dim == 128:  # g & 1
        return g + " and.b32 sh, sh, 1;"
    if p == 1 and dim == 64:  # 8 (g & 1) + (g >> 1 & 1)
        g += " shr.u32 sg, sh, 1; and.b32 sg, sg, 1; and.b32 sh, sh, 1;"
        return g + " shl.b32 sh, sh, 3; add.u32 sh, sh, sg;"
    return ""


@gluon.constexpr_function
def _own(number, p, names, dim, key):
    """A lane's words ``w{number}_{i}`` of a plane, shifted where lanes share them."""
    shift = _lane_shift(p, dim, key)
    lines = [f".reg .b32 w{number}_<{len(names)}>;", shift]
    for i, name in enumerate(names):
        if shift:
            lines.append(f"shr.u32 w{number}_{i}, {name}, sh;")
        else:
            lines.append(f"mov.b32 w{number}_{i}, {name};")
    return "\n".join(lines)


@gluon.constexpr_function
def halves(outputs, inputs):
    """Neighbours among float32 registers as two halves of a word."""
    words, values = outputs[0], inputs[0]
    return "\n".join(
        f"cvt.rn.f16x2.f32 {word}, {values[2 * i + 1]}, {values[2 * i]};"
        for i, word in enumerate(words)
    )


@gluon.constexpr_function
def _scores(width, symmetric, outputs, inputs):
    """Scores of a tile in log2 units: ``sum of q * (code * step + zero)`` over the channels.

    Args:
        width: stored bits of K.
        symmetric: levels - 1 where zeros follow from the steps, else 0.
    """
    (s,) = outputs
    count = len(planes_of(width))
    planes = inputs[:count]
    q, step, *zero = inputs[count:]
    dim = len(step) * 8
    blocks = len(q) // len(step)  # of 8 query rows
    tiles = len(s) // (4 * blocks)
    lines = [
        f"{{ .reg .b32 sh, sg, a<4>, r<{len(q)}>; .reg .f32 b<{4 * blocks}>;",
    ]
    sizes = planes_of(width)
    for number in range(count):
        lines.append(_own(number, sizes[number], planes[number], dim, True))
    for i, name in enumerate(q):  # q times step
        lines.append(f"mul.rn.f16x2 r{i}, {name}, {step[i % len(step)]};")
    for nb in range(blocks):
        b = [f"b{4 * nb + i}" for i in range(4)]
        lines += [f"mov.b32 {one}, 0;" for one in b]
        for m in range(dim // 16):
            at = nb * len(step) + 2 * m
            if zero:
                z0, z1 = zero[0][2 * m : 2 * m + 2]
                a = regs([z0, z0, z1, z1])
                lines.append(f"{_MMA} {regs(b)}, {a}, {regs(q[at : at + 2])}, {regs(b)};")
            offset = []
            for odd in range(2):
                _, bit = k_place(planes_of(width)[0], dim, odd, m)
                value = code_offset(bit, width) + symmetric / 2
                offset.append(f"a{odd}")
                lines.append(f"mov.b32 a{odd}, {_half2(-value):#x};")
            a = regs([offset[0], offset[0], offset[1], offset[1]])
            lines.append(f"{_MMA} {regs(b)}, {a}, {regs([f'r{at}', f'r{at + 1}'])}, {regs(b)};")
    row = [len(planes[number]) // (2 * tiles) for number in range(count)]  # words of a token
    for j in range(tiles):
        for number in range(count):
            for i in range(2 * j * row[number], 2 * (j + 1) * row[number]):
                made = f"mov.b32 k{number}_{i}, w{number}_{i};"
                lines.append(_made(f"k{number}_{i}", made, number, width))
        for m in range(dim // 16):
            for i in range(4):  # rows g, g + 8; then the lane's odd g
                up, odd = i % 2, i // 2
                places = [k_place(p, dim, odd, m) for p in sizes]
                words = [f"k{n}_{(2 * j + up) * row[n] + places[n][0]}" for n in range(count)]
                lines.append(_numbers(f"a{i}", words, [place[1] for place in places], width))
            for nb in range(blocks):
                out = s[4 * (j * blocks + nb) : 4 * (j * blocks + nb) + 4]
                start = out if m else [f"b{4 * nb + i}" for i in range(4)]
                at = nb * len(step) + 2 * m
                lines.append(
                    f"{_MMA} {regs(out)}, {{a0, a1, a2, a3}}, "
                    f"{regs([f'r{at}', f'r{at + 1}'])}, {regs(start)};"
                )
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _weigh(width, outputs, inputs):
    """A tile of the online softmax: weights from scores, and their products with V.

    Results: the sums of weight times code (with its offset), each lane's running maximum, and of
    P's columns: times gain, for every group of channels; times zero, and plain.
    """
    acc_out, top_out, gained_out, plain_out = outputs
    count = len(planes_of(width))
    planes = inputs[:count]
    s, acc, top, gained, plain, gain, *zero = inputs[count:]
    blocks = len(top) // 2
    tiles = len(s) // (4 * blocks)
    rows = len(acc) // (4 * blocks)  # 16 channels each
    groups = len(gained) // len(top)
    dim = 16 * rows
    lines = [
        "{ .reg .b32 sh, sg, a<4>, o<2>, one, none;",
        f".reg .b32 p<{2 * blocks * tiles}>, q<{2 * blocks}>, z<2>, gn<2>;",
        f".reg .f32 x, y, m<{len(top)}>, f<{len(top)}>;",
        f"mov.b32 one, {_ONES:#x}; mov.b32 none, 0;",
    ]
    sizes = planes_of(width)
    for number in range(count):
        lines.append(_own(number, sizes[number], planes[number], dim, False))
    for i in range(len(top)):
        column = [s[4 * (j * blocks + i // 2) + i % 2 + up] for j in range(tiles) for up in (0, 2)]
        lines.append(f"max.f32 {top_out[i]}, {top[i]}, {column[0]};")
        lines += [f"max.f32 {top_out[i]}, {top_out[i]}, {one};" for one in column[1:]]
        for lane in (4, 8, 16):
            lines.append(f"shfl.sync.bfly.b32 x, {top_out[i]}, {lane}, 31, -1;")
            lines.append(f"max.f32 {top_out[i]}, {top_out[i]}, x;")
        lines.append(f"sub.rn.f32 x, {top[i]}, {top_out[i]}; ex2.approx.ftz.f32 f{i}, x;")
        lines.append(f"sub.rn.f32 m{i}, {_float(1.0 * P_SHIFT)}, {top_out[i]};")
    for out, old in ((acc_out, acc), (gained_out, gained), (plain_out, plain)):
        for i, pair in enumerate(zip(out, old, strict=True)):
            new, before = pair
            nb = i // 2 % blocks if out is gained_out else i // 4 % blocks
            lines.append(f"mul.rn.f32 {new}, {before}, f{2 * nb + i % 2};")
    for j in range(tiles):
        for nb in range(blocks):
            for up in range(2):
                for i in range(2):
                    score = s[4 * (j * blocks + nb) + 2 * up + i]
                    out = "xy"[i]
                    lines.append(f"add.rn.f32 {out}, {score}, m{2 * nb + i};")
                    lines.append(f"ex2.approx.ftz.f32 {out}, {out};")
                name = f"p{2 * (j * blocks + nb) + up}"
                lines.append(f"cvt.rn.f16x2.f32 {name}, y, x;")
                lines.append(f"movmatrix.sync.aligned.m8n8.trans.b16 {name}, {name};")
    row = [len(planes[number]) // (4 * tiles) for number in range(count)]  # words of a token
    for j in range(tiles):
        for number in range(count):  # of words of two tokens: low and high halves
            for word in range(row[number]):
                for i in range(4):
                    at = (4 * j + 2 * (i // 2)) * row[number] + word
                    low, high = f"w{number}_{at}", f"w{number}_{at + row[number]}"
                    name, select = f"c{number}_{j}_{word}_{i}", "0x7632" if i % 2 else "0x5410"
                    made = f"prmt.b32 {name}, {low}, {high}, {select};"
                    lines.append(_made(name, made, number, width))
        p_words = [f"p{2 * j * blocks + i}" for i in range(2 * blocks)]
        a_plain = regs(["z0", "one", "z1", "one"] if zero else ["none", "one", "none", "one"])
        for up in range(2 if zero else 0):
            at = 4 * j + 2 * up
            lines.append(f"prmt.b32 z{up}, {zero[0][at]}, {zero[0][at + 1]}, 0x5410;")
        for nb in range(blocks):
            out = plain_out[4 * nb : 4 * nb + 4]
            lines.append(
                f"{_MMA} {regs(out)}, {a_plain}, {regs(p_words[2 * nb : 2 * nb + 2])}, {regs(out)};"
            )
        for group in range(groups):
            for up in range(2):  # of a token the groups stand side by side
                low, high = (gain[(4 * j + 2 * up + i) * groups + group] for i in range(2))
                lines.append(f"prmt.b32 gn{up}, {low}, {high}, 0x5410;")
            for i, name in enumerate(p_words):
                lines.append(f"mul.rn.f16x2 q{i}, {name}, gn{i % 2};")
            # Rows g of the product sum for the even group of a pair, rows g + 8 for the odd.
            a = ("none", "one") if group % 2 else ("one", "none")
            for nb in range(blocks):
                even, odd = (
                    2 * (blocks * one + nb) for one in (group - group % 2, group - group % 2 + 1)
                )
                if groups == 1:
                    lines.append("mov.b32 x, 0; mov.b32 y, 0;")
                pair = gained_out[odd : odd + 2] if groups > 1 else ("x", "y")
                out = regs([*gained_out[even : even + 2], *pair])
                b = regs([f"q{2 * nb}", f"q{2 * nb + 1}"])
                lines.append(f"{_MMA} {out}, {regs(a + a)}, {b}, {out};")
            for m in range(rows * group // groups, rows * (group + 1) // groups):
                places = [v_place(p, dim, m) for p in sizes]
                for i in range(4):  # halves of the words, then the second 8 tokens
                    words = [f"c{n}_{j}_{places[n][0]}_{i}" for n in range(count)]
                    lines.append(_numbers(f"a{i}", words, [place[1] for place in places], width))
                for nb in range(blocks):
                    at = 4 * (m * blocks + nb)
                    out = acc_out[at : at + 4]
                    b = regs([f"q{2 * nb}", f"q{2 * nb + 1}"])
                    lines.append(f"{_MMA} {regs(out)}, {{a0, a1, a2, a3}}, {b}, {regs(out)};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _finish(width, symmetric, outputs, inputs):
    """A warp's part of the output: offsets taken away, zeros added, times the warp's weight."""
    out, norm = outputs
    acc, gained, plain, weight = inputs
    blocks = len(weight) // 2
    rows = len(acc) // (4 * blocks)
    groups = len(gained) // len(weight)
    lines = [f"{{ .reg .b32 at; .reg .f32 z<{len(weight)}>, x;"]
    for i, name in enumerate(weight):
        lines.append(f"mul.rn.f32 {norm[i]}, {plain[4 * (i // 2) + 2 + i % 2]}, {name};")
    for group in range(groups):
        if not symmetric:  # lane 4 g + t has the sum of group g
            lines.append(f"mov.u32 at, %laneid; and.b32 at, at, 3; add.u32 at, at, {4 * group};")
            for i in range(len(weight)):
                lines.append(f"shfl.sync.idx.b32 z{i}, {plain[4 * (i // 2) + i % 2]}, at, 31, -1;")
        for m in range(rows * group // groups, rows * (group + 1) // groups):
            _, bit = v_place(planes_of(width)[0], 16 * rows, m)
            offset = code_offset(bit, width) + symmetric / 2
            for i in range(4 * blocks):
                at, column = 4 * m * blocks + i, 2 * (i // 4) + i % 2
                total = gained[len(weight) * group + column]
                lines.append(f"fma.rn.f32 x, {total}, {_float(-offset)}, {acc[at]};")
                if not symmetric:
                    lines.append(f"add.rn.f32 x, x, z{column};")
                lines.append(f"mul.rn.f32 {out[at]}, x, {weight[column]};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def scores_8(outputs, inputs):
    """:func:`_scores`."""
    return _scores(8, 0, outputs, inputs)


@gluon.constexpr_function
def scores_4(outputs, inputs):
    """:func:`_scores`."""
    return _scores(4, 0, outputs, inputs)


@gluon.constexpr_function
def scores_3(outputs, inputs):
    """:func:`_scores`."""
    return _scores(3, 0, outputs, inputs)


@gluon.constexpr_function
def scores_2(outputs, inputs):
    """:func:`_scores`."""
    return _scores(2, 0, outputs, inputs)


@gluon.constexpr_function
def scores_ternary(outputs, inputs):
    """:func:`_scores`."""
    return _scores(2, 2, outputs, inputs)


@gluon.constexpr_function
def scores_1(outputs, inputs):
    """:func:`_scores`."""
    return _scores(1, 1, outputs, inputs)


@gluon.constexpr_function
def weigh_8(outputs, inputs):
    """:func:`_weigh`."""
    return _weigh(8, outputs, inputs)


@gluon.constexpr_function
def weigh_4(outputs, inputs):
    """:func:`_weigh`."""
    return _weigh(4, outputs, inputs)


@gluon.constexpr_function
def weigh_3(outputs, inputs):
    """:func:`_weigh`."""
    return _weigh(3, outputs, inputs)


@gluon.constexpr_function
def weigh_2(outputs, inputs):
    """:func:`_weigh`."""
    return _weigh(2, outputs, inputs)


@gluon.constexpr_function
def weigh_1(outputs, inputs):
    """:func:`_weigh`."""
    return _weigh(1, outputs, inputs)


@gluon.constexpr_function
def finish_8(outputs, inputs):
    """:func:`_finish`."""
    return _finish(8, 0, outputs, inputs)


@gluon.constexpr_function
def finish_4(outputs, inputs):
    """:func:`_finish`."""
    return _finish(4, 0, outputs, inputs)


@gluon.constexpr_function
def finish_3(outputs, inputs):
    """:func:`_finish`."""
    return _finish(3, 0, outputs, inputs)


@gluon.constexpr_function
def finish_2(outputs, inputs):
    """:func:`_finish`."""
    return _finish(2, 0, outputs, inputs)


@gluon.constexpr_function
def finish_ternary(outputs, inputs):
    """:func:`_finish`."""
    return _finish(2, 2, outputs, inputs)


@gluon.constexpr_function
def finish_1(outputs, inputs):
    """:func:`_finish`."""
    return _finish(1, 1, outputs, inputs)
