"""Attention on INT8 or FP8 Q and K for Hopper: ``wgmma``, with P an operand in registers.

Semantics are those of :func:`.reference.attend_quantized`.  What binds is the issue slots, so P
goes from the scores' accumulator to the second product without an exchange: V's tokens are stored
in the order in which a thread holds P (``docs/kernels.md``).
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..formats import LOG2E, TILE_N
from ..versions import barrier, tma_load
from .gluon_layouts import partial_layout
from .gluon_program import to_output
from .hopper_support import TILE_KEYS
from .terms import MASK_FLOOR

_LOG2E, _MASK_FLOOR = gl.constexpr(LOG2E), gl.constexpr(MASK_FLOOR)

#: Keys of a tile, and of a tile in the lists of scales and masks.
_KEYS, _LISTED = gl.constexpr(TILE_KEYS), gl.constexpr(TILE_N)

#: log2 of P's largest code.
_RANGE = gl.constexpr(math.log2(448.0))


@gluon.constexpr_function
def _column_layout(warps):
    """The columns of a tile that belong to a thread, 16 side by side of every 64."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [4], [8], [64]],
        lane_bases=[[16], [32], [0], [0], [0]],
        warp_bases=[[0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[TILE_KEYS],
    )


@gluon.jit
def _thread_sums(p, like):
    """``[BM, 128]`` -> ``[BM, 4]``, each thread's columns added; no value leaves a thread."""
    x = p.reshape([p.shape[0], _KEYS // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(x, 3), 1), like.type.layout, assert_trivial=True)


@gluon.jit
def _row_max(s):
    """``[BM, 128]`` -> ``[BM]``; pairs first, so that maxima don't wait for each other."""
    x = s.reshape([s.shape[0], _KEYS // 8, 4, 2])
    x = gl.max(gl.max(gl.max(x, 3), 1), 1)
    return gl.convert_layout(x, gl.SliceLayout(1, s.type.layout), assert_trivial=True)


@gluon.jit
def _like_rows(x, like):
    """A value per row where ``[BM, 4]`` partial sums have them."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)


@gluon.jit
def _operand(p, layout: gl.constexpr):
    """P as the second product's operand.  No byte moves: the keys are renamed."""
    bm: gl.constexpr = p.shape[0]
    #: key = 16 a + 8 h + 2 t + e stands at 16 a + 4 t + 2 h + e (quantize.permute.token_order)
    x = p.reshape([bm, _KEYS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([bm, _KEYS])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _columns(x, layout: gl.constexpr):
    """A list in column order as a row vector of the scores."""
    y = x.reshape([_KEYS // 64, 4, 8, 2]).permute((0, 2, 1, 3)).reshape([_KEYS])
    return gl.convert_layout(y, layout, assert_trivial=True)


@gluon.jit
def _copy_tile(tiles_of_k, tiles_of_v, rings, tile, tiles, k_row, v_row, MORE: gl.constexpr = 0):
    """Start copying a tile, where there is one, into its slot of the rings."""
    k_ring, v_ring, ready = rings
    slot, wanted = tile % k_ring.shape[0], tile < tiles
    bytes_of_tile: gl.constexpr = _KEYS * (k_ring.shape[2] + v_ring.shape[1]) + MORE
    mbarrier.expect(ready.index(slot), bytes_of_tile, pred=wanted)
    start = tile * _KEYS
    tma_load(tiles_of_k, [k_row + start, 0], ready.index(slot), k_ring.index(slot), pred=wanted)
    tma_load(tiles_of_v, [v_row, start], ready.index(slot), v_ring.index(slot), pred=wanted)


@gluon.jit
def _scores(q_tile, k_tile, layout: gl.constexpr):
    """Q K^T of one tile, not scaled, begun."""
    INTEGER: gl.constexpr = q_tile.dtype == gl.int8
    return warpgroup_mma(
        q_tile,
        k_tile.permute((1, 0)),
        gl.full([q_tile.shape[0], _KEYS], 0, gl.int32 if INTEGER else gl.float32, layout),
        use_acc=False,
        max_num_imprecise_acc=0 if INTEGER else q_tile.shape[1],
        is_async=True,
    )


@gluon.jit
def _attend_range(
    state,
    first,  # tile
    last,
    tiles,
    tiles_of_k,  # descriptors, and the first row of this head
    tiles_of_v,
    k_row,
    v_row,
    k_len,
    q_tile,  # [BM, DP] in shared memory
    q_scale,  # [BM] float32, positive
    o_m,  # [BM] query indices
    p_mask,  # [BM, 128] pointers of tile 0
    rings,  # of K, of V, and of the barriers that say when a slot is full
    EDGE: gl.constexpr,  # tiles with keys that are outside, or in the future
    BIAS: gl.constexpr,
    MASK: gl.constexpr,
    HIDES: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Tiles of the online softmax, one after the other: other programs fill the waits."""
    scores: gl.constexpr = o_m.type.layout.parent
    col: gl.constexpr = gl.SliceLayout(0, scores)
    k_ring, v_ring, ready = rings
    STAGES: gl.constexpr = k_ring.shape[0]
    for tile in range(first, last):
        acc, total, top, p_k_scale, p_bias = state
        slot = tile % STAGES
        mbarrier.wait(ready.index(slot), (tile // STAGES) & 1)
        s = _scores(q_tile, k_ring.index(slot), scores)
        k_scale = gl.load(p_k_scale)
        p_k_scale += 2 * _KEYS
        start = tile * _KEYS
        s = warpgroup_mma_wait(0, deps=[s])
        s = s.to(gl.float32) * _columns(k_scale, col)[None, :]
        if BIAS or MASK == 2:
            s = s * q_scale[:, None]
        if BIAS:
            s += _columns(gl.load(p_bias), col)[None, :]
            p_bias += _KEYS
        if MASK:
            at = p_mask + start
            if EDGE:
                o_n = start + gl.arange(0, _KEYS, col)
                inside = (o_n < k_len)[None, :] & (o_m >= 0)[:, None]
                added = gl.load(at, mask=inside, other=0)
            else:
                added = gl.load(at)
            if MASK == 1:
                s = gl.where(added != 0, s, -float("inf"))
            else:
                scaled = gl.minimum(added.to(gl.float32) * _LOG2E, -_MASK_FLOOR)
                if added.dtype != gl.float16:  # whose least finite value is above the floor
                    floored = gl.maximum(scaled, _MASK_FLOOR)
                    scaled = gl.where(added == -float("inf"), added.to(gl.float32), floored)
                s += scaled
        if EDGE:
            visible = gl.full([o_m.shape[0]], 0, gl.int32, o_m.type.layout) + k_len
            if CAUSAL:
                visible = gl.minimum(visible, o_m + 1)
            o_n = gl.arange(0, _KEYS, col)
            s = gl.where(o_n[None, :] < (visible - start)[:, None], s, -float("inf"))
        tile_top = _row_max(s)
        if not (BIAS or MASK == 2):
            tile_top = tile_top * q_scale
        before = top
        top = gl.maximum(top, tile_top)
        safe = top
        if HIDES:  # 0 for a row that saw no key yet: exponents stay defined
            safe = gl.where(top == -float("inf"), 0.0, top)
        alpha = gl.exp2(before - safe)
        shift = safe - _RANGE
        if BIAS or MASK == 2:
            p = gl.exp2(s - shift[:, None])
        else:
            p = gl.exp2(gl.fma(s, _down(q_scale, s), _down(-shift, s)))
        total = gl.fma(total, _down(_like_rows(alpha, total), total), _thread_sums(p, total))
        lhs: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 4)
        codes = _operand(p, lhs).to(gl.float8e4nv)
        product = warpgroup_mma(
            codes,
            v_ring.index(tile % STAGES).permute((1, 0)),
            gl.full(acc.shape, 0.0, gl.float32, acc.type.layout),
            use_acc=False,
            max_num_imprecise_acc=_KEYS,
            is_async=True,
        )
        product = warpgroup_mma_wait(0, deps=[product])
        barrier()  # nobody reads this slot any more
        _copy_tile(tiles_of_k, tiles_of_v, rings, tile + STAGES, tiles, k_row, v_row)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
        # A fresh accumulator per tile: Hopper keeps 14 bits of a float32 sum of FP8 products.
        acc = gl.fma(acc, _down(alpha, acc), product)
        state = acc, total, top, p_k_scale, p_bias
    return state


@gluon.jit
def _down(x, like):
    """[M] -> [M, N]"""
    return gl.broadcast(x[:, None], like)[0]


@gluon.jit
def attention_kernel(
    blocks_of_q,  # descriptor of [B * H * Lq, DP] int8 or E4M3
    tiles_of_k,  # descriptor of [B * Hkv * Lk, DP] int8 or E4M3
    tiles_of_v,  # descriptor of [B * Hkv * D, Lp] E4M3, tokens permuted
    p_q_scale,  # [B, H, ceil(Lq / Q_BLOCK)] float32
    p_k_scale,  # [B, Hkv, Lp / 64 + 2, 2, 64] float32 of ``key_scales``
    p_v_scale,  # [B, Hkv, D] float32
    p_v_mean,  # [B, Hkv, D] float32, or None
    p_bias,  # [B, H, 128-row blocks, Lp + 128] float32, column order, or None
    p_mask,  # uint8 or float, or None
    p_out,  # [B, H, Lq, D]
    p_lse,  # [B, H, Lq] float32, or None
    heads,
    group,  # query heads of a KV head
    q_len,
    k_len,
    q_scales,  # per head
    padded,  # Lp
    stride_bias_b,
    stride_bias_h,
    stride_mb,
    stride_mh,
    stride_mm,
    D: gl.constexpr,
    DP: gl.constexpr,
    Q_BLOCK: gl.constexpr,
    MASK: gl.constexpr,  # of its own for every query: 0 none, 1 boolean, 2 additive
    HIDES: gl.constexpr,  # mask or bias may hide all keys from a row
    CAUSAL: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One block of query rows of one head."""
    BIAS: gl.constexpr = p_bias is not None
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, _KEYS, 32])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, DP, 32])
    row: gl.constexpr = gl.SliceLayout(1, scores)

    blocks = gl.cdiv(q_len, BM)
    i_m = gl.program_id(0) % blocks
    if CAUSAL:
        i_m = blocks - 1 - i_m  # the longest first
    i_bh = (gl.program_id(0) // blocks).to(gl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_bkv = i_b * (heads // group) + i_h // group
    start_m = i_m * BM

    o_m = start_m + gl.arange(0, BM, row)
    at = gl.minimum(o_m, q_len - 1)
    q_scale = gl.load(p_q_scale + i_bh * q_scales + at // Q_BLOCK)

    o_c = gl.arange(0, _KEYS, _column_layout(num_warps))
    p_k_scale = p_k_scale + i_bkv * ((padded + 2 * _LISTED) * 2)
    p_k_scale = p_k_scale + ((o_c // _LISTED) * (2 * _LISTED) + o_c % _LISTED)
    if BIAS:
        p_bias = p_bias + i_b * stride_bias_b + i_h * stride_bias_h + o_c
    if MASK:
        p_mask = p_mask + i_b * stride_mb + i_h * stride_mh
        p_mask = p_mask + at[:, None].to(gl.int64) * stride_mm
        p_mask = p_mask + gl.arange(0, _KEYS, gl.SliceLayout(0, scores))[None, :]
    end = k_len
    whole = k_len // _KEYS  # tiles without a check
    if CAUSAL:
        whole = gl.minimum(whole, (start_m + 1) // _KEYS)
        end = gl.minimum(end, start_m + BM)
    tiles = gl.cdiv(end, _KEYS)

    q_tile = gl.allocate_shared_memory(blocks_of_q.dtype, [BM, DP], blocks_of_q.layout)
    k_ring = gl.allocate_shared_memory(tiles_of_k.dtype, [STAGES, _KEYS, DP], tiles_of_k.layout)
    v_ring = gl.allocate_shared_memory(tiles_of_v.dtype, [STAGES, DP, _KEYS], tiles_of_v.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()
    rings = k_ring, v_ring, ready
    k_row, v_row = (i_bkv * k_len).to(gl.int32), (i_bkv * D).to(gl.int32)
    q_row = (i_bh * q_len).to(gl.int32) + start_m
    _copy_tile(tiles_of_k, tiles_of_v, rings, 0, tiles, k_row, v_row, BM * DP)
    tma_load(blocks_of_q, [q_row, 0], ready.index(0), q_tile)
    for i in gl.static_range(1, STAGES):
        _copy_tile(tiles_of_k, tiles_of_v, rings, i, tiles, k_row, v_row)
    state = (
        gl.zeros([BM, DP], gl.float32, output),
        gl.zeros([BM, 4], gl.float32, partial_layout(num_warps)),
        gl.full([BM], -float("inf"), gl.float32, row),
        p_k_scale,
        p_bias if BIAS else p_k_scale,
    )
    for EDGE in gl.static_range(2):
        state = _attend_range(
            state,
            whole * EDGE,
            tiles if EDGE else whole,
            tiles,
            tiles_of_k,
            tiles_of_v,
            k_row,
            v_row,
            k_len,
            q_tile,
            q_scale,
            o_m,
            p_mask,
            rings,
            EDGE,
            BIAS,
            MASK,
            HIDES,
            CAUSAL,
        )
    acc, total, top, p_k_scale, p_bias = state

    total = gl.convert_layout(gl.sum(total, 1), row, assert_trivial=True)
    seen = total > 0.0
    total = gl.where(seen, total, 1.0)
    if p_lse is not None:
        lse = gl.where(seen, (top + (gl.log2(total) - _RANGE)) / _LOG2E, -float("inf"))
        gl.store(p_lse + i_bh * q_len + o_m, lse, mask=o_m < q_len)
    out_row: gl.constexpr = gl.SliceLayout(1, output)
    inverse = gl.convert_layout(gl.where(seen, 1.0 / total, 0.0), out_row, assert_trivial=True)
    o_m = start_m + gl.arange(0, BM, out_row)
    o_d = gl.arange(0, DP, gl.SliceLayout(0, output))
    out = acc * inverse[:, None]
    i_d = i_bkv * D + o_d
    out = out * gl.load(p_v_scale + i_d, mask=o_d < D, other=0.0)[None, :]
    if p_v_mean is not None:
        mean = gl.load(p_v_mean + i_d, mask=o_d < D, other=0.0)
        out = gl.where((inverse > 0.0)[:, None], out + mean[None, :], 0.0)
    p_out += i_bh * q_len * D
    inside = (o_m < q_len)[:, None] & (o_d < D)[None, :]
    gl.store(
        p_out + (o_m[:, None].to(gl.int64) * D + o_d[None, :]),
        to_output(out, p_out),
        mask=inside,
    )
