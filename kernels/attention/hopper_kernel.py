"""Attention on INT8 or FP8 Q and K for Hopper: ``wgmma``, with P an operand in registers.

Semantics are those of :func:`.reference.attend_quantized`.  What binds is the issue slots, so P
goes from the scores' accumulator to the second product without an exchange: V's tokens are stored
in the order in which a thread holds P (``docs/kernels.md``).
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..formats import LOG2E, TILE_N
from ..versions import async_load, barrier
from .gluon_layouts import column_layout, partial_layout
from .gluon_program import to_output
from .reference import MASK_FLOOR

_TILE_N, _LOG2E, _MASK_FLOOR = gl.constexpr(TILE_N), gl.constexpr(LOG2E), gl.constexpr(MASK_FLOOR)

#: log2 of P's largest code.
_RANGE = gl.constexpr(math.log2(448.0))


@gluon.constexpr_function
def _rows_shared(width):
    """Shared memory of rows of bytes that ``wgmma`` reads without conflicts."""
    return gl.NVMMASharedLayout(min(width, 128), 8, 2)


@gluon.constexpr_function
def _bytes_layout(width, warps):
    """16 bytes a thread, rows of ``width`` bytes contiguous."""
    threads = width // 16
    return gl.BlockedLayout([1, 16], [32 // threads, threads], [warps, 1], [1, 0])


@gluon.jit
def _thread_sums(p, like):
    """``[BM, 64]`` -> ``[BM, 4]``, each thread's columns added; no value leaves a thread."""
    x = p.reshape([p.shape[0], 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(x, 3), 1), like.type.layout, assert_trivial=True)


@gluon.jit
def _like_rows(x, like):
    """A value per row where ``[BM, 4]`` partial sums have them."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)


@gluon.jit
def _operand(p, layout: gl.constexpr):
    """P as the second product's operand.  No byte moves: the keys are renamed."""
    bm: gl.constexpr = p.shape[0]
    #: key = 16 a + 8 h + 2 t + e stands at 16 a + 4 t + 2 h + e (quantize.permute.token_order)
    x = p.reshape([bm, 4, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([bm, _TILE_N])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _columns(x, layout: gl.constexpr):
    """A list in column order as a row vector of the scores."""
    y = x.reshape([4, 8, 2]).permute((1, 0, 2)).reshape([_TILE_N])
    return gl.convert_layout(y, layout, assert_trivial=True)


@gluon.jit
def _copy_tile(
    p_k, p_v, k_ring, v_ring, tile, k_limit, limit, D: gl.constexpr, STAGES: gl.constexpr
):
    """Copy the tile at the pointers into the rings, zeros where there is nothing to read."""
    slot, start = tile % STAGES, tile * _TILE_N
    async_load(k_ring.index(slot), p_k, mask=(start < k_limit)[:, None])
    wanted = start < limit
    if v_ring.shape[1] != D:
        o_d = gl.arange(0, v_ring.shape[1], gl.SliceLayout(1, p_v.type.layout))
        wanted = (wanted & (o_d < D))[:, None]
    async_load(v_ring.index(slot), p_v, mask=wanted)
    async_copy.commit_group()
    return p_k + _TILE_N * k_ring.shape[2], p_v + _TILE_N


@gluon.jit
def _scores(q_tile, k_tile, layout: gl.constexpr, IS_ASYNC: gl.constexpr):
    """Q K^T of one tile, not scaled."""
    INTEGER: gl.constexpr = q_tile.dtype == gl.int8
    return warpgroup_mma(
        q_tile,
        k_tile.permute((1, 0)),
        gl.full([q_tile.shape[0], _TILE_N], 0, gl.int32 if INTEGER else gl.float32, layout),
        use_acc=False,
        max_num_imprecise_acc=0 if INTEGER else q_tile.shape[1],
        is_async=IS_ASYNC,
    )


@gluon.jit
def _attend_range(
    state,
    first,  # tile
    last,
    k_limit,  # [64] keys to copy, counted from each row of a tile
    limit,  # keys to copy
    k_len,
    q_tile,  # [BM, DP] in shared memory
    q_scale,  # [BM] float32, positive
    o_m,  # [BM] query indices
    p_mask,  # [BM, 64] pointers of tile 0
    k_ring,
    v_ring,
    EDGE: gl.constexpr,  # tiles with keys that are outside, or in the future
    BIAS: gl.constexpr,
    MASK: gl.constexpr,
    HIDES: gl.constexpr,
    CAUSAL: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Tiles of the online softmax; the scores of the next tile are computed meanwhile."""
    scores: gl.constexpr = o_m.type.layout.parent
    col: gl.constexpr = gl.SliceLayout(0, scores)
    for tile in range(first, last):
        s, acc, total, top, p_k, p_v, p_k_scale, p_bias = state
        p_k, p_v = _copy_tile(
            p_k, p_v, k_ring, v_ring, tile + (STAGES - 1), k_limit, limit, D, STAGES
        )
        fence_async_shared()
        s_next = _scores(q_tile, k_ring.index((tile + 1) % STAGES), scores, True)
        k_scale = gl.load(p_k_scale)
        p_k_scale += 2 * _TILE_N
        start = tile * _TILE_N
        if BIAS or MASK == 2:
            s = s * q_scale[:, None]
        if BIAS:
            s += _columns(gl.load(p_bias), col)[None, :]
            p_bias += _TILE_N
        if MASK:
            at = p_mask + start
            if EDGE:
                o_n = start + gl.arange(0, _TILE_N, col)
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
            o_n = gl.arange(0, _TILE_N, col)
            s = gl.where(o_n[None, :] < (visible - start)[:, None], s, -float("inf"))
        tile_top = gl.max(s, 1)
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
            max_num_imprecise_acc=_TILE_N,
            is_async=True,
        )
        s_next = warpgroup_mma_wait(1, deps=[s_next])
        s = s_next.to(gl.float32) * _columns(k_scale, col)[None, :]
        product = warpgroup_mma_wait(0, deps=[product])
        barrier()
        async_copy.wait_group(STAGES - 3)
        barrier()
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
        # A fresh accumulator per tile: Hopper keeps 14 bits of a float32 sum of FP8 products.
        acc = gl.fma(acc, _down(alpha, acc), product)
        state = s, acc, total, top, p_k, p_v, p_k_scale, p_bias
    return state


@gluon.jit
def _down(x, like):
    """[M] -> [M, N]"""
    return gl.broadcast(x[:, None], like)[0]


@gluon.jit
def attention_kernel(
    p_q,  # [B, H, Lq, DP] int8 or E4M3
    p_k,  # [B, Hkv, Lk, DP] int8 or E4M3
    p_v,  # [B, Hkv, D, Lp] E4M3, tokens permuted
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
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, _TILE_N, 32])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, DP, 32])
    row: gl.constexpr = gl.SliceLayout(1, scores)
    code: gl.constexpr = p_q.dtype.element_ty
    k_copy: gl.constexpr = _bytes_layout(DP, num_warps)
    v_copy: gl.constexpr = _bytes_layout(_TILE_N, num_warps)

    blocks = gl.cdiv(q_len, BM)
    i_m = gl.program_id(0) % blocks
    if CAUSAL:
        i_m = blocks - 1 - i_m  # the longest first
    i_bh = (gl.program_id(0) // blocks).to(gl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_bkv = i_b * (heads // group) + i_h // group
    start_m = i_m * BM

    rows = start_m + gl.arange(0, BM, gl.SliceLayout(1, k_copy))
    columns = gl.arange(0, DP, gl.SliceLayout(0, k_copy))
    p_q += i_bh * q_len * DP
    at_q = p_q + (rows[:, None].to(gl.int64) * DP + columns[None, :])
    q_tile = gl.allocate_shared_memory(code, [BM, DP], _rows_shared(DP))
    inside_q = (rows < q_len)[:, None] & (columns >= 0)[None, :]
    async_load(q_tile, at_q, mask=inside_q)
    o_m = start_m + gl.arange(0, BM, row)
    at = gl.minimum(o_m, q_len - 1)
    q_scale = gl.load(p_q_scale + i_bh * q_scales + at // Q_BLOCK)

    o_c = gl.arange(0, _TILE_N, column_layout(num_warps))
    p_k_scale = p_k_scale + i_bkv * ((padded + 2 * _TILE_N) * 2) + o_c
    if BIAS:
        p_bias = p_bias + i_b * stride_bias_b + i_h * stride_bias_h + o_c
    if MASK:
        p_mask = p_mask + i_b * stride_mb + i_h * stride_mh
        p_mask = p_mask + at[:, None].to(gl.int64) * stride_mm
        p_mask = p_mask + gl.arange(0, _TILE_N, gl.SliceLayout(0, scores))[None, :]
    end = k_len
    whole = k_len // _TILE_N  # tiles without a check
    if CAUSAL:
        whole = gl.minimum(whole, (start_m + 1) // _TILE_N)
        end = gl.minimum(end, start_m + BM)
    tiles = gl.cdiv(end, _TILE_N)

    k_ring = gl.allocate_shared_memory(code, [STAGES, _TILE_N, DP], _rows_shared(DP))
    v_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, DP, _TILE_N], _rows_shared(_TILE_N))
    k_rows = gl.arange(0, _TILE_N, gl.SliceLayout(1, k_copy))
    v_columns = gl.arange(0, _TILE_N, gl.SliceLayout(0, v_copy))
    v_rows = gl.arange(0, DP, gl.SliceLayout(1, v_copy))
    p_k = p_k + i_bkv * k_len * DP + (k_rows[:, None] * DP + columns[None, :])
    p_v = p_v + i_bkv * D * padded
    p_v = p_v + v_rows[:, None].to(gl.int64) * padded + v_columns[None, :]
    limit = gl.minimum(k_len, tiles * _TILE_N)
    k_limit = limit - k_rows
    for i in gl.static_range(STAGES - 1):
        p_k, p_v = _copy_tile(p_k, p_v, k_ring, v_ring, i, k_limit, limit, D, STAGES)
    async_copy.wait_group(STAGES - 3)
    barrier()
    fence_async_shared()
    s = _scores(q_tile, k_ring.index(0), scores, False).to(gl.float32)
    s = s * _columns(gl.load(p_k_scale), gl.SliceLayout(0, scores))[None, :]
    p_k_scale += 2 * _TILE_N
    barrier()
    state = (
        s,
        gl.zeros([BM, DP], gl.float32, output),
        gl.zeros([BM, 4], gl.float32, partial_layout(num_warps)),
        gl.full([BM], -float("inf"), gl.float32, row),
        p_k,
        p_v,
        p_k_scale,
        p_bias if BIAS else p_k_scale,
    )
    for EDGE in gl.static_range(2):
        state = _attend_range(
            state,
            whole * EDGE,
            tiles if EDGE else whole,
            k_limit,
            limit,
            k_len,
            q_tile,
            q_scale,
            o_m,
            p_mask,
            k_ring,
            v_ring,
            EDGE,
            BIAS,
            MASK,
            HIDES,
            CAUSAL,
            D,
            STAGES,
        )
    s, acc, total, top, p_k, p_v, p_k_scale, p_bias = state
    async_copy.wait_group(0)

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
