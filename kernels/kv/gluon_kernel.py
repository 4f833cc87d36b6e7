"""Attention of few queries on packed keys and values, in Gluon: no code ever leaves its lane.

Each warp has tokens of its own and its own running maximum; warps meet after the last tile.  Scores
are in log2 units.  ``docs/kernels.md`` explains the register layouts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import LOG2E
from ..versions import distributed_type, inline_asm
from .asm import (
    P_SHIFT,
    finish_1,
    finish_2,
    finish_3,
    finish_4,
    finish_8,
    finish_ternary,
    halves,
    scores_1,
    scores_2,
    scores_3,
    scores_4,
    scores_8,
    scores_ternary,
    weigh_1,
    weigh_2,
    weigh_3,
    weigh_4,
    weigh_8,
)
from .gluon_layouts import (
    key_layout,
    plain_layout,
    query_layout,
    query_word_layout,
    row_layout,
    score_layout,
    step_layout,
    sum_layout,
    value_layout,
)

_P_SHIFT, _LOG2E = gl.constexpr(float(P_SHIFT)), gl.constexpr(LOG2E)

#: Below every score, and finite, so that differences are defined.
_NOTHING = gl.constexpr(-1.0e30)

#: 256 in both halves.
_BYTE_SCALE = gl.constexpr(0x5C005C00)


@gluon.constexpr_function
def _constraints(outputs, words, sums=0, more=0):
    return ("=&f",) * outputs + ("r",) * words + ("f",) * sums + ("r",) * more


@gluon.constexpr_function
def stored_bits(width):
    """Bits of a code as stored."""
    return 2 if width == "ternary" else width


@gluon.constexpr_function
def _symmetric(width):
    return width == "ternary" or width == 1


@gluon.jit
def _token_of_tile(tile, tiles, TILE: gl.constexpr, GROUP: gl.constexpr):
    """First token of a tile; the last tile stands for those that do not exist."""
    PER: gl.constexpr = (GROUP + TILE - 1) // TILE
    tile = gl.minimum(tile, tiles - 1)
    return tile * TILE if PER * TILE == GROUP else tile // PER * GROUP + tile % PER * TILE


@gluon.jit
def _pointers(
    p,
    first,
    tiles,
    last,
    ROW: gl.constexpr,
    COLUMNS: gl.constexpr,  # of a row that there are; the layout's others repeat the last
    TILE: gl.constexpr,
    GROUP: gl.constexpr,
    CLAMP: gl.constexpr,
    layout: gl.constexpr,
):
    """Of the tiles' rows, a tile a warp; if CLAMP, rows after the last repeat it."""
    o_r = gl.arange(0, layout.shape[0], gl.SliceLayout(1, layout))
    o_c = gl.arange(0, layout.shape[1], gl.SliceLayout(0, layout))
    if layout.shape[1] > COLUMNS:
        o_c = gl.minimum(o_c, COLUMNS - 1)
    token = _token_of_tile(first + o_r // TILE, tiles, TILE, GROUP)
    row = o_r % TILE
    if CLAMP:
        row = gl.minimum(row, last - token)
    rows = p + token.to(gl.int64) * ROW
    return rows[:, None] + ((row * ROW)[:, None] + o_c[None, :])


@gluon.jit
def _words(
    p,
    first,
    tiles,
    last,
    BITS: gl.constexpr,
    TILE: gl.constexpr,
    GROUP: gl.constexpr,
    CLAMP: gl.constexpr,
    low: gl.constexpr,
    high: gl.constexpr,
):
    """Words of the tiles' rows, a tensor for each plane."""
    WORDS: gl.constexpr = low.shape[1]
    MORE: gl.constexpr = high.shape[1] if BITS == 3 else 0
    ROW: gl.constexpr = WORDS + MORE
    words = (gl.load(_pointers(p, first, tiles, last, ROW, WORDS, TILE, GROUP, CLAMP, low)),)
    if BITS == 3:
        at = _pointers(p + WORDS, first, tiles, last, ROW, MORE, TILE, GROUP, CLAMP, high)
        words = words + (gl.load(at),)  # type: ignore[assignment]  # noqa: RUF005
    return words


@gluon.jit
def _times(x, y):
    """Products of two halves in words."""
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], gl.int32, True, 1
    )


@gluon.jit
def _step_words(x, EIGHT: gl.constexpr):
    """Steps as halves in words; of 8 bits (E5M3) they are a half's bits 14 to 7."""
    x = x.to(gl.int32)
    if EIGHT:
        x = ((x & 0xFF) << 7) | ((x & 0xFF00) << 15)
    return x


@gluon.jit
def _zero_words(x, step, EIGHT: gl.constexpr):
    """Zeros as halves in words; of 8 bits (E4M3) they are by 2^-8 smaller and count steps."""
    x = x.to(gl.int32)
    if EIGHT:
        x = ((x & 0x80) << 8) | ((x & 0x7F) << 7) | ((x & 0x8000) << 16) | ((x & 0x7F00) << 15)
        x = _times(_times(x, _BYTE_SCALE), step)
    return x


@gluon.jit
def _scores(
    p_k,
    p_step,
    p_zero,
    q,
    first,
    tiles,
    last,
    D: gl.constexpr,
    K: gl.constexpr,
    TILE: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    CLAMP: gl.constexpr,
    EIGHT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Scores of a tile of every warp."""
    BITS: gl.constexpr = stored_bits(K)
    LOW: gl.constexpr = 2 if BITS == 3 else BITS
    PER: gl.constexpr = (GROUP + TILE - 1) // TILE
    low: gl.constexpr = key_layout(TILE, D * LOW // 32, num_warps)
    high: gl.constexpr = key_layout(TILE, D // 32, num_warps)
    steps: gl.constexpr = step_layout(D, num_warps)
    words = _words(p_k, first, tiles, last, BITS, TILE, GROUP, CLAMP, low, high)
    o_w = gl.arange(0, num_warps, gl.SliceLayout(1, steps))
    o_d = gl.arange(0, D // 2, gl.SliceLayout(0, steps))
    group = gl.minimum(first + o_w, tiles - 1) // PER
    at = (group * (D // 2))[:, None] + o_d[None, :]
    step = _step_words(gl.load(p_step + at), EIGHT)
    words = words + (q, step)  # noqa: RUF005
    if not _symmetric(K):
        words = words + (_zero_words(gl.load(p_zero + at), step, EIGHT),)  # noqa: RUF005
    FN: gl.constexpr = (
        scores_8
        if K == 8
        else scores_4
        if K == 4
        else scores_3
        if K == 3
        else scores_2
        if K == 2
        else scores_ternary
        if K == "ternary"
        else scores_1
    )
    layout: gl.constexpr = score_layout(TILE, ROWS, num_warps)
    kind: gl.constexpr = distributed_type(gl.float32, [TILE * num_warps, ROWS], layout)
    return inline_asm(FN, _constraints(1, len(words)), words, kind, is_pure=True)


@gluon.jit
def _hidden(
    s,
    p_mask,
    first,
    tiles,
    tokens,
    mask_rows,
    mask_t,
    MASK: gl.constexpr,
    TILE: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Scores with the mask, and without what is no token of the tile."""
    layout: gl.constexpr = s.type.layout
    o_r = gl.arange(0, s.shape[0], gl.SliceLayout(1, layout))
    PER: gl.constexpr = (GROUP + TILE - 1) // TILE
    tile = first + o_r // TILE
    start = _token_of_tile(tile, tiles, TILE, GROUP)
    count = tokens - start
    if PER * TILE != GROUP:
        count = gl.minimum(count, GROUP - tile % PER * TILE)
    count = gl.where(tile < tiles, count, 0)
    seen = o_r % TILE < count
    if MASK == "none":
        s = gl.where(seen[:, None], s, float("-inf"))
    else:
        token = (start + o_r % TILE).to(gl.int64) * mask_t
        at = p_mask + (token[:, None] + mask_rows[None, :])
        if MASK == "bool":
            shown = gl.load(at, mask=seen[:, None], other=0) != 0
            s = gl.where(shown, s, float("-inf"))
        else:
            more = gl.load(at, mask=seen[:, None], other=float("-inf")).to(gl.float32)
            s = s + more * _LOG2E
    return s


@gluon.jit
def _weigh(
    s,
    p_v,
    p_gain,
    p_zero,
    acc,
    top,
    gained,
    plain,
    first,
    tiles,
    last,
    D: gl.constexpr,
    V: gl.constexpr,
    TILE: gl.constexpr,
    GROUP: gl.constexpr,
    GAINS: gl.constexpr,
    CLAMP: gl.constexpr,
    EIGHT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """What the tiles of all warps add to their sums."""
    BITS: gl.constexpr = stored_bits(V)
    LOW: gl.constexpr = 2 if BITS == 3 else BITS
    low: gl.constexpr = value_layout(TILE, D * LOW // 32, True, num_warps)
    high: gl.constexpr = value_layout(TILE, D // 32, True, num_warps)
    gains: gl.constexpr = value_layout(TILE, GAINS, False, num_warps)
    zeros: gl.constexpr = value_layout(TILE, 8, True, num_warps)
    words = _words(p_v, first, tiles, last, BITS, TILE, GROUP, CLAMP, low, high)
    at = _pointers(p_gain, first, tiles, last, GAINS, GAINS, TILE, GROUP, CLAMP, gains)
    more = (s, acc, top, gained, plain, _step_words(gl.load(at), EIGHT))
    SYMMETRIC: gl.constexpr = _symmetric(V)
    if not SYMMETRIC:
        at = _pointers(p_zero, first, tiles, last, GAINS, GAINS, TILE, GROUP, CLAMP, zeros)
        zero = gl.load(at)
        step = zero
        if EIGHT:
            at = _pointers(p_gain, first, tiles, last, GAINS, GAINS, TILE, GROUP, CLAMP, zeros)
            step = _step_words(gl.load(at), EIGHT)
        more = more + (_zero_words(zero, step, EIGHT),)  # type: ignore[assignment]  # noqa: RUF005
    FN: gl.constexpr = (
        weigh_8
        if BITS == 8
        else weigh_4
        if BITS == 4
        else weigh_3
        if BITS == 3
        else weigh_2
        if BITS == 2
        else weigh_1
    )
    kinds: gl.constexpr = (acc.type, top.type, gained.type, plain.type)
    MORE: gl.constexpr = 1 if SYMMETRIC else 2
    return inline_asm(FN, _constraints(4, len(words), 5, MORE), words + more, kinds, is_pure=True)


@gluon.jit
def decode_kernel(
    p_q,  # [B, H, rows, D]
    p_k,  # [B, H, >= tokens, D * bits / 32] int32
    p_k_step,  # [B, H, groups, D / 2] int32 or int16: two of 16 or 8 bits
    p_k_zero,  # the same, or None
    p_v,  # [B, H, >= tokens, D * bits / 32] int32
    p_v_gain,  # [B, H, >= tokens, GAINS] int16 or uint8
    p_v_zero,  # the same, or None
    p_mask,  # [B, heads of Q, queries, tokens], by strides, or None
    p_out,  # [splits, B, H, rows, D] float32
    p_lse,  # [splits, B, H, rows] float32, log2 units
    scale,  # times log2(e)
    heads,
    rows,
    queries,
    tokens,
    tiles,
    span,  # tiles of a split
    stride_k,  # of a head
    stride_k_step,
    stride_v,
    stride_gain,
    stride_mask_b,
    stride_mask_h,
    stride_mask_q,
    stride_mask_t,
    D: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    TILE: gl.constexpr,  # tokens of a warp at a time
    GROUP: gl.constexpr,  # tokens that share a step of K
    GAINS: gl.constexpr,  # groups of channels of a token of V
    ROWS: gl.constexpr,  # rows of Q of a program, 8 or 16
    MASK: gl.constexpr,  # "none", "bool" or "additive"
    CLAMP: gl.constexpr,  # tiles end before their last row
    K_EIGHT: gl.constexpr,  # steps and zeros of 8 bits
    V_EIGHT: gl.constexpr,
    num_warps: gl.constexpr,
):
    i_s, i_bh, i_r = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    i_b, i_h = i_bh // heads, i_bh % heads
    head = i_bh.to(gl.int64)
    p_k += head * stride_k
    p_v += head * stride_v
    p_v_gain += head * stride_gain
    p_k_step += head * stride_k_step
    if not _symmetric(K):
        p_k_zero += head * stride_k_step
    if not _symmetric(V):
        p_v_zero += head * stride_gain

    q_layout: gl.constexpr = query_layout(D, ROWS, num_warps)
    o_q = gl.arange(0, ROWS * num_warps, gl.SliceLayout(1, q_layout)) % ROWS + i_r * ROWS
    o_d = gl.arange(0, D, gl.SliceLayout(0, q_layout))
    at = (head * rows + gl.minimum(o_q, rows - 1)) * D
    q = gl.load(p_q + (at[:, None] + o_d[None, :])).to(gl.float32) * scale
    w_layout: gl.constexpr = query_word_layout(D, ROWS, num_warps)
    kind: gl.constexpr = distributed_type(gl.int32, [ROWS * num_warps, D // 2], w_layout)
    q = inline_asm(halves, ("=r", "f"), (q,), kind, is_pure=True)

    s_layout: gl.constexpr = score_layout(TILE, ROWS, num_warps)
    o_m = gl.arange(0, ROWS, gl.SliceLayout(0, s_layout)) + i_r * ROWS
    o_m = gl.minimum(o_m, rows - 1)
    mask_rows = o_m.to(gl.int64)
    if MASK != "none":
        i_q = i_h * (rows // queries) + o_m // queries
        mask_rows = i_q.to(gl.int64) * stride_mask_h + (o_m % queries) * stride_mask_q
        p_mask += i_b.to(gl.int64) * stride_mask_b

    o_layout: gl.constexpr = sum_layout(D, ROWS, num_warps)
    r_layout: gl.constexpr = row_layout(ROWS, num_warps)
    g_layout: gl.constexpr = row_layout(ROWS * GAINS, num_warps)
    z_layout: gl.constexpr = plain_layout(ROWS, num_warps)
    acc = gl.full([D * num_warps, ROWS], 0.0, gl.float32, o_layout)
    top = gl.full([8 * num_warps, ROWS], _NOTHING, gl.float32, r_layout)
    gained = gl.full([8 * num_warps, ROWS * GAINS], 0.0, gl.float32, g_layout)
    plain = gl.full([8 * num_warps, 2 * ROWS], 0.0, gl.float32, z_layout)

    last = tokens - 1
    for first in range(i_s * span, gl.minimum(i_s * span + span, tiles), num_warps):
        s = _scores(
            p_k,
            p_k_step,
            p_k_zero,
            q,
            first,
            tiles,
            last,
            D,
            K,
            TILE,
            GROUP,
            ROWS,
            CLAMP,
            K_EIGHT,
            num_warps,
        )
        s = _hidden(s, p_mask, first, tiles, tokens, mask_rows, stride_mask_t, MASK, TILE, GROUP)
        acc, top, gained, plain = _weigh(
            s,
            p_v,
            p_v_gain,
            p_v_zero,
            acc,
            top,
            gained,
            plain,
            first,
            tiles,
            last,
            D,
            V,
            TILE,
            GROUP,
            GAINS,
            CLAMP,
            V_EIGHT,
            num_warps,
        )

    highest = gl.max(top, 0)
    weight = gl.exp2(top - highest[None, :])
    FN: gl.constexpr = (
        finish_8
        if V == 8
        else finish_4
        if V == 4
        else finish_3
        if V == 3
        else finish_2
        if V == 2
        else finish_ternary
        if V == "ternary"
        else finish_1
    )
    kinds: gl.constexpr = (acc.type, top.type)
    acc, norm = inline_asm(
        FN, _constraints(2, 0, 4), (acc, gained, plain, weight), kinds, is_pure=True
    )
    out_layout: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, num_warps], [0, 1])
    columns: gl.constexpr = gl.SliceLayout(0, out_layout)
    norm = gl.convert_layout(gl.sum(norm, 0) * 0.125, columns)  # each g has it
    highest = gl.convert_layout(highest, columns)
    acc = gl.sum(gl.reshape(acc, [num_warps, D, ROWS]), 0)
    acc = gl.convert_layout(acc, out_layout)
    lse = gl.where(norm > 0.0, highest + gl.log2(norm) - _P_SHIFT, float("-inf"))
    acc = acc / gl.where(norm > 0.0, norm, 1.0)[None, :]
    o_m = gl.arange(0, ROWS, columns) + i_r * ROWS
    o_d = gl.arange(0, D, gl.SliceLayout(1, out_layout))
    at = (i_s * gl.num_programs(1) + i_bh).to(gl.int64) * rows + o_m
    gl.store(p_out + (at[None, :] * D + o_d[:, None]), acc, mask=(o_m < rows)[None, :])
    gl.store(p_lse + at, lse, mask=o_m < rows)
