"""Attention on INT4, INT8 or NVFP4 Q and K whose P never leaves the registers, in Gluon.

Semantics are those of :func:`.reference.attend_quantized`.  Scores are in log2 units; the range of
P's format is folded into the exponent and cancels in ``acc / total``.  ``docs/kernels.md`` explains
the register layouts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..formats import LOG2E, TILE_N
from ..versions import async_load, barrier, distributed_type, inline_asm
from .gluon_asm import magic_words
from .gluon_fp4 import RANGE_FP4
from .gluon_layouts import (
    channel_micro_layout,
    copy_layout,
    micro_layout,
    partial_layout,
    swizzle,
    thread_layout,
)
from .gluon_program import (
    extent,
    lane_columns,
    lane_scales,
    mask_span,
    mask_words,
    place,
    program_at_end,
    program_number,
    to_output,
)
from .gluon_support import SCALE_SHIFT
from .gluon_tile import RANGE_FP8, RANGE_INT8, RANGE_UINT8, State, attend_tile, copied

_TILE_N, _LOG2E = gl.constexpr(TILE_N), gl.constexpr(LOG2E)

_SCALE_SHIFT = gl.constexpr(SCALE_SHIFT)

#: Below every score and mask, and finite, so that the online softmax's differences are defined.
_NOTHING = gl.constexpr(-3.3e38)

#: A hidden score is -12582912 times q_scale, which is at least this where keys may be hidden.
#: Scores don't come near half of it: a product is at most 2^22 of K's steps, and K's largest scale
#: by 2^-60 is below 2^-20.
_SMALLEST_SCALE, _HIDDEN = gl.constexpr(1024.0), gl.constexpr(-6.0e6)


@gluon.jit
def _attend_range(
    state,
    first,  # step
    last,
    k_limit,  # [64] keys to copy, counted from each row of a tile
    limit,  # keys to copy
    k_len,
    q,  # [BM, words] int32
    q_micro,  # [BM, DP / 64] int32, FP4 only
    q_scale,  # [BM] float32, positive
    o_m,  # [BM] query indices
    magic,  # four words
    k_ring,
    v_ring,
    EDGE: gl.constexpr,  # tiles with keys that are outside, or in the future
    QK: gl.constexpr,
    PV: gl.constexpr,
    BIAS: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    TILED: gl.constexpr,
    BY_TILE: gl.constexpr,
    D: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    mma: gl.constexpr,
):
    """Steps of the online softmax, STEP tiles each; the copies run ``STAGES - 1`` steps ahead."""
    for j in range(first, last):
        async_copy.wait_group(STAGES - 2)
        barrier()
        p_k, p_v = _copy_step(
            state.p_k, state.p_v, k_ring, v_ring, j, STAGES - 1, k_limit, limit, D, STEP, STAGES
        )
        state = copied(state, p_k, p_v)
        for i in gl.static_range(STEP):
            state = attend_tile(
                state,
                j * STEP + i,
                k_ring.index((j % STAGES) * STEP + i),
                v_ring.index((j % STAGES) * STEP + i),
                k_len,
                q,
                q_micro,
                q_scale,
                o_m,
                magic,
                EDGE,
                QK,
                PV,
                BIAS,
                MASK,
                CAUSAL,
                TILED,
                BY_TILE,
                D,
                STEP,
                mma,
            )
    return state


@gluon.jit
def _copy_step(
    p_k,
    p_v,
    k_ring,
    v_ring,
    step,
    AHEAD: gl.constexpr,
    k_limit,
    limit,
    D: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the step at the pointers into the rings, zeros where there is nothing to read."""
    for i in gl.static_range(STEP):
        slot = ((step + AHEAD) % STAGES) * STEP + i
        start = (step * STEP + i) * _TILE_N
        async_load(k_ring.index(slot), p_k, mask=(start < k_limit)[:, None])
        wanted = start < limit
        if v_ring.shape[1] != D:
            o_d = gl.arange(0, v_ring.shape[1], gl.SliceLayout(1, p_v.type.layout))
            wanted = (wanted & (o_d < D))[:, None]
        async_load(v_ring.index(slot), p_v, mask=wanted)
        p_k += _TILE_N * k_ring.shape[2]
        p_v += v_ring.shape[2]
    async_copy.commit_group()
    return p_k, p_v


@gluon.jit
def attention_kernel(
    p_q,  # [B, H, Lq, words] int32
    p_k,  # [B, Hkv, Lk, words] int32
    p_v,  # [B, Hkv, D, words] int32, tokens permuted
    p_q_scale,  # [B, H, ceil(Lq / Q_BLOCK)] float32
    p_k_scale,  # [B, Hkv, Lp / 64 + 2, 2, 64] float32 of ``key_scales``
    p_q_micro,  # [B, H, Lq, DP / 64] int32, or None
    p_k_micro,  # [B, Hkv, Lk, DP / 64] int32, or None
    p_v_micro,  # [B, Hkv, Lp / 64, D] int32, or None
    p_v_scale,  # [B, Hkv, D] float32, or [B, Hkv, Lp / 64, DP / 2] int32 of ``permute_scales``
    p_v_mean,  # [B, Hkv, D] float32, or None
    p_v_tiles,  # [B, Hkv, Lp / 64 + 2, 2] float32, or None
    p_bias,  # [B, H, 128-row blocks of the launch, Lp + 128] float32, column order, or None
    p_mask,  # words of ``gluon_masks.PackedMask``, or None
    p_span,  # its spans, or None
    p_out,  # [B, H, Lq, D]
    p_lse,  # [B, H, Lq] float32, or None
    heads,
    group,  # query heads of a KV head
    q_len,
    k_len,
    q_scales,  # per head
    padded,  # Lp
    first_block,  # of this launch
    blocks,  # of this launch
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_mb,  # of the mask, in heads
    stride_mh,
    D: gl.constexpr,
    WORDS: gl.constexpr,
    DP: gl.constexpr,
    QK: gl.constexpr,  # "int4", "int8", "fp4"
    PV: gl.constexpr,  # "int8", "uint8" (an unsigned P), "fp8", "fp4"
    Q_BLOCK: gl.constexpr,
    MASK: gl.constexpr,  # of its own for every query: "none" or a kind of PackedMask
    CAUSAL: gl.constexpr,
    BM: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One block of query rows of one head."""
    BIAS: gl.constexpr = p_bias is not None
    TILED: gl.constexpr = p_v_tiles is not None
    BY_TILE: gl.constexpr = p_v_scale.dtype.element_ty == gl.int32
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    row: gl.constexpr = gl.SliceLayout(1, mma)
    col: gl.constexpr = gl.SliceLayout(0, mma)
    V_WORDS: gl.constexpr = _TILE_N // (8 if PV == "fp4" else 4)
    k_copy: gl.constexpr = copy_layout(WORDS, num_warps)
    v_copy: gl.constexpr = copy_layout(V_WORDS, num_warps)

    i_bh, i_b, i_h, i_bkv, i_m = place(program_number(), blocks, heads, group, CAUSAL)
    start_m = (first_block + i_m) * BM

    # Q stays in registers in the operand's order.
    rows = start_m + gl.arange(0, BM, gl.SliceLayout(1, k_copy))
    words = gl.arange(0, WORDS, gl.SliceLayout(0, k_copy))
    p_q += i_bh * q_len * WORDS
    q_words = gl.load(
        p_q + (rows[:, None].to(gl.int64) * WORDS + words[None, :]),
        mask=(rows < q_len)[:, None] & (words >= 0)[None, :],
        other=0,
    )
    q_shared = gl.allocate_shared_memory(gl.int32, [BM, WORDS], swizzle(WORDS), q_words)
    q = q_shared.load(gl.DotOperandLayout(0, mma, 1))
    o_m = start_m + gl.arange(0, BM, row)
    at = gl.minimum(o_m, q_len - 1)
    q_scale = gl.load(p_q_scale + i_bh * q_scales + at // Q_BLOCK) * _SCALE_SHIFT
    if MASK == "bool":
        q_scale = gl.maximum(q_scale, _SMALLEST_SCALE)

    q_micro = q
    if QK == "fp4":
        q_layout: gl.constexpr = micro_layout(DP // 64, num_warps, 0)
        k_layout: gl.constexpr = micro_layout(DP // 64, num_warps, 1)
        m_rows = start_m + gl.arange(0, BM, gl.SliceLayout(1, q_layout))
        group_q = gl.arange(0, DP // 64, gl.SliceLayout(0, q_layout))
        at_q = (i_bh * q_len + gl.minimum(m_rows, q_len - 1)) * (DP // 64)
        q_micro = gl.load(p_q_micro + (at_q[:, None] + group_q[None, :]))
        n_rows = gl.arange(0, _TILE_N, gl.SliceLayout(1, k_layout))
        group_k = gl.arange(0, DP // 64, gl.SliceLayout(0, k_layout))
        p_k_micro += i_bkv * k_len * (DP // 64)
        p_k_micro = p_k_micro + (n_rows[:, None] * (DP // 64) + group_k[None, :])
    if PV == "fp4":
        channels = gl.arange(0, DP, channel_micro_layout(DP, num_warps))
        p_v_micro += i_bkv * (padded // _TILE_N) * D
        p_v_micro = p_v_micro + channels
    p_k_scale = p_k_scale + i_bkv * ((padded + 2 * _TILE_N) * 2) + lane_columns(num_warps)
    if BIAS:
        p_bias = p_bias + i_b * stride_bias_b + i_h * stride_bias_h + lane_columns(num_warps)
        p_bias += (i_m * BM // 128).to(gl.int64) * stride_bias_m
    if TILED:
        p_v_tiles += i_bkv * ((padded // _TILE_N + 2) * 2)
    p_scales = p_k_scale
    if BY_TILE:
        p_scales = p_v_scale + i_bkv * (padded // _TILE_N * (DP // 2)) + lane_scales(DP, num_warps)
    first, stop = 0, gl.cdiv(k_len, STEP * _TILE_N)
    if MASK != "none":
        # A warp's 16 rows are a group of the mask.
        i_group = (i_b * stride_mb + i_h * stride_mh) * (gl.cdiv(q_len, 128) * 8) + start_m // 16
        tiles = gl.cdiv(padded, 2 * _TILE_N) * 2
        first, stop = mask_span(p_span + i_group * 2, tiles, STEP, num_warps)
        p_mask = mask_words(p_mask, i_group, tiles, first * STEP, MASK, num_warps)
        # Keys count from the first one that may be seen.
        skipped = first * (STEP * _TILE_N)
        p_k += skipped.to(gl.int64) * WORDS
        p_v += skipped // _TILE_N * V_WORDS
        p_k_scale += skipped * 2
        if BIAS:
            p_bias += skipped
        if TILED:
            p_v_tiles += skipped // _TILE_N * 2
        if BY_TILE:
            p_scales += skipped // _TILE_N * (DP // 2)
        if QK == "fp4":
            p_k_micro += skipped.to(gl.int64) * (DP // 64)
        if PV == "fp4":
            p_v_micro += skipped // _TILE_N * D
    whole, end = extent(start_m, first, stop, k_len, BM, STEP, CAUSAL)

    k_ring = gl.allocate_shared_memory(gl.int32, [STAGES * STEP, _TILE_N, WORDS], swizzle(WORDS))
    v_ring = gl.allocate_shared_memory(gl.int32, [STAGES * STEP, DP, V_WORDS], swizzle(V_WORDS))
    k_rows = gl.arange(0, _TILE_N, gl.SliceLayout(1, k_copy))
    v_words = gl.arange(0, V_WORDS, gl.SliceLayout(0, v_copy))
    v_rows = gl.arange(0, DP, gl.SliceLayout(1, v_copy))
    v_stride = padded // _TILE_N * V_WORDS
    p_k = p_k + i_bkv * k_len * WORDS + (k_rows[:, None] * WORDS + words[None, :])
    p_v = p_v + i_bkv * D * v_stride
    p_v = p_v + v_rows[:, None].to(gl.int64) * v_stride + v_words[None, :]
    limit = gl.minimum(k_len - first * (STEP * _TILE_N), gl.cdiv(end, _TILE_N) * _TILE_N)
    k_limit = limit - k_rows
    for i in gl.static_range(STAGES - 1):
        p_k, p_v = _copy_step(p_k, p_v, k_ring, v_ring, i, 0, k_limit, limit, D, STEP, STAGES)
    k_limit -= (STAGES - 1) * STEP * _TILE_N
    limit -= (STAGES - 1) * STEP * _TILE_N

    state = State(
        gl.zeros([BM, DP], gl.float32, mma),
        gl.zeros([BM, 4], gl.float32, partial_layout(num_warps)),
        gl.full([BM], _NOTHING, gl.float32, row),
        gl.full([BM], _NOTHING, gl.float32, row),
        p_k,
        p_v,
        p_k_scale,
        p_bias if BIAS else p_k_scale,
        p_k_micro if QK == "fp4" else p_k_scale,
        p_v_micro if PV == "fp4" else p_k_scale,
        p_k_scale if MASK == "none" else p_mask,
        p_v_tiles if TILED else p_k_scale,
        gl.to_tensor(1.0) if TILED else k_len,
        p_scales,
    )
    words_type: gl.constexpr = distributed_type(
        gl.int32, [32 * num_warps, 4], thread_layout(num_warps)
    )
    magic = inline_asm(
        magic_words,
        ("=r", "r", "r", "r", "r"),
        [heads, q_len, k_len, padded],
        words_type,
        is_pure=True,
    )
    k_len -= first * (STEP * _TILE_N)
    o_m -= first * (STEP * _TILE_N)
    for EDGE in gl.static_range(2):
        state = _attend_range(
            state,
            whole * EDGE,
            gl.cdiv(end, STEP * _TILE_N) if EDGE else whole,
            k_limit,
            limit,
            k_len,
            q,
            q_micro,
            q_scale,
            o_m,
            magic,
            k_ring,
            v_ring,
            EDGE,
            QK,
            PV,
            BIAS,
            MASK,
            CAUSAL,
            TILED,
            BY_TILE,
            D,
            STEP,
            STAGES,
            mma,
        )
    acc, total, top, reference = state.acc, state.total, state.top, state.reference
    async_copy.wait_group(0)

    total = gl.convert_layout(gl.sum(total, 1), row, assert_trivial=True)
    i_bh, i_b, i_h, i_bkv, i_m = place(program_at_end(state.p_k), blocks, heads, group, CAUSAL)
    o_m = (first_block + i_m) * BM + gl.arange(0, BM, row)
    seen = total > 0.0
    if MASK == "bool":
        seen &= top > q_scale * _HIDDEN
    total = gl.where(seen, total, 1.0)
    o_d = gl.arange(0, DP, col)
    inverse = 1.0 / total
    if TILED:
        inverse *= state.factor
    out = acc * inverse[:, None]
    i_d = i_bkv * D + o_d
    if not BY_TILE:
        out = out * gl.load(p_v_scale + i_d, mask=o_d < D, other=0.0)[None, :]
    if p_v_mean is not None:
        out = out + gl.load(p_v_mean + i_d, mask=o_d < D, other=0.0)[None, :]
    out = gl.where(seen[:, None], out, 0.0)
    p_out += i_bh * q_len * D
    inside = (o_m < q_len)[:, None] & (o_d < D)[None, :]
    gl.store(
        p_out + (o_m[:, None].to(gl.int64) * D + o_d[None, :]),
        to_output(out, p_out),
        mask=inside,
    )
    if p_lse is not None:
        INTEGER: gl.constexpr = RANGE_UINT8 if PV == "uint8" else RANGE_INT8
        RANGE: gl.constexpr = RANGE_FP8 if PV == "fp8" else RANGE_FP4 if PV == "fp4" else INTEGER
        lse = gl.where(
            seen,
            ((top if PV == "fp8" else reference) + (gl.log2(total) - RANGE)) / _LOG2E,
            -float("inf"),
        )
        gl.store(p_lse + i_bh * q_len + o_m, lse, mask=o_m < q_len)
