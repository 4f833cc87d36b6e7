"""Which lane of a warp has what in the decode kernel: fragments of ``mma.m16n8k16``.

A warp's tokens, and what it sums, stand after those of the warp before.  Of lane ``4 g + t`` the
docstrings name g and t.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _layout(registers, lanes, warp, warps, shape):
    """Bases of registers and lanes; warps follow each other ``warp`` rows apart."""
    far = [[warp << i, 0] for i in range(_log2(warps))]
    return gl.DistributedLinearLayout(registers, lanes, far, [], shape)


@gluon.constexpr_function
def _columns(count, stride):
    """``(registers, lanes)``: columns of which ``stride`` lanes (a power of two) have equal parts.

    Fewer columns than lanes: neighbouring lanes share one.
    """
    each = max(0, _log2(count) - _log2(stride))
    shared = max(0, _log2(stride) - _log2(count))
    lanes = [[0, 0]] * shared + [[0, 1 << each + i] for i in range(_log2(stride) - shared)]
    return [[0, 1 << i] for i in range(each)], lanes


@gluon.constexpr_function
def key_layout(tokens, words, warps):
    """K's words: rows g and g + 8 of 16 tokens; a quarter of the columns a lane."""
    registers, lanes = _columns(words, 4)
    registers = [*registers, *([1 << i, 0] for i in range(3, _log2(tokens)))]
    lanes = [*lanes, [1, 0], [2, 0], [4, 0]]
    return _layout(registers, lanes, tokens, warps, [tokens * warps, words])


@gluon.constexpr_function
def value_layout(tokens, columns, lanes_of_columns, warps):
    """V's words, gains and zeros: tokens 2 t, 2 t + 1, and those 8 further; columns by g."""
    if lanes_of_columns:
        registers, lanes = _columns(columns, 8)
    else:
        registers, lanes = [[0, 1 << i] for i in range(_log2(columns))], [[0, 0]] * 3
    registers = [*registers, [1, 0], *([1 << i, 0] for i in range(3, _log2(tokens)))]
    lanes = [[2, 0], [4, 0], *lanes]
    return _layout(registers, lanes, tokens, warps, [tokens * warps, columns])


@gluon.constexpr_function
def query_layout(dim, rows, warps):
    """Q: channels 4 t .. 4 t + 3 of 16, of the row g; the same in each warp."""
    registers = [[0, 1], [0, 2]] + [[0, 1 << i] for i in range(4, _log2(dim))]
    registers = registers + [[8 << i, 0] for i in range(_log2(rows // 8))]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return _layout(registers, lanes, rows, warps, [rows * warps, dim])


@gluon.constexpr_function
def query_word_layout(dim, rows, warps):
    """The same in words of two channels."""
    registers = [[0, 1]] + [[0, 1 << i] for i in range(3, _log2(dim // 2))]
    registers = registers + [[8 << i, 0] for i in range(_log2(rows // 8))]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return _layout(registers, lanes, rows, warps, [rows * warps, dim // 2])


@gluon.constexpr_function
def step_layout(dim, warps):
    """K's steps and zeros, a row for each warp."""
    registers = [[0, 1]] + [[0, 1 << i] for i in range(3, _log2(dim // 2))]
    return _layout(registers, [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]], 1, warps, [warps, dim // 2])


@gluon.constexpr_function
def score_layout(tokens, rows, warps):
    """Scores ``[tokens, rows of Q]`` as a product leaves them."""
    registers = [[0, 1], [8, 0]] + [[0, 8 << i] for i in range(_log2(rows // 8))]
    registers = registers + [[1 << i, 0] for i in range(4, _log2(tokens))]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return _layout(registers, lanes, tokens, warps, [tokens * warps, rows])


@gluon.constexpr_function
def sum_layout(dim, rows, warps):
    """The transposed output ``[D, rows of Q]``: channels 2 g and 2 g + 1 of 16."""
    registers = [[0, 1], [1, 0]] + [[0, 8 << i] for i in range(_log2(rows // 8))]
    registers = registers + [[1 << i, 0] for i in range(4, _log2(dim))]
    lanes = [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
    return _layout(registers, lanes, dim, warps, [dim * warps, rows])


@gluon.constexpr_function
def row_layout(columns, warps):
    """What every g of a warp has for itself: 2 of each 8 columns a lane."""
    registers = [[0, 1]] + [[0, 8 << i] for i in range(_log2(columns // 8))]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return _layout(registers, lanes, 8, warps, [8 * warps, columns])


@gluon.constexpr_function
def plain_layout(rows, warps):
    """The same with two values for each: C's rows g (columns 0 ..) and g + 8 (columns rows ..)."""
    registers = [[0, 1], [0, rows]] + [[0, 8 << i] for i in range(_log2(rows // 8))]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return _layout(registers, lanes, 8, warps, [8 * warps, 2 * rows])
