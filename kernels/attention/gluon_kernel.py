"""Attention on INT4, INT8 or NVFP4 Q and K whose P never leaves the registers, in Gluon.

Semantics are those of :func:`.reference.attend_quantized`.  Scores are in log2 units; the range of
P's format is folded into the exponent and cancels in ``acc / total``.  ``docs/kernels.md`` explains
the register layouts.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..formats import LOG2E, TILE_N
from .gluon_asm import (
    add_row,
    finish_row,
    hide_columns,
    magic_words,
    scores_int4,
    scores_int8,
    values_fp8,
    values_int8,
)
from .gluon_fp4 import RANGE_FP4, scores_fp4, values_fp4, weigh_fp4
from .gluon_layouts import (
    channel_micro_layout,
    column_layout,
    copy_layout,
    micro_layout,
    swizzle,
)
from .reference import MASK_FLOOR

_TILE_N, _LOG2E, _MASK_FLOOR = gl.constexpr(TILE_N), gl.constexpr(LOG2E), gl.constexpr(MASK_FLOOR)
_MINUS_MAGIC = gl.constexpr(-12582912.0)

#: log2 of P's largest code.
_RANGE_FP8, _RANGE_INT8 = gl.constexpr(math.log2(448.0)), gl.constexpr(math.log2(127.0))

#: An INT8 tile's own maximum serves as reference down to 2^-32 of the row's largest weight; below
#: that its codes don't reach float32's last bit.
_LAG = gl.constexpr(32.0)


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
    p_mask,  # [BM, 64] pointers of tile 0
    k_ring,
    v_ring,
    EDGE: gl.constexpr,  # tiles with keys that are outside, or in the future
    QK: gl.constexpr,
    PV: gl.constexpr,
    BIAS: gl.constexpr,
    MASK: gl.constexpr,
    HIDES: gl.constexpr,
    CAUSAL: gl.constexpr,
    D: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    mma: gl.constexpr,
):
    """Steps of the online softmax, STEP tiles each; the copies run ``STAGES - 1`` steps ahead."""
    for j in range(first, last):
        async_copy.wait_group(STAGES - 2)
        gl.barrier()
        acc, total, top, reference, p_k, p_v, p_k_scale, p_bias, p_k_micro, p_v_micro = state
        p_k, p_v = _copy_step(
            p_k, p_v, k_ring, v_ring, j + (STAGES - 1), k_limit, limit, D, STEP, STAGES
        )
        state = (acc, total, top, reference, p_k, p_v, p_k_scale, p_bias, p_k_micro, p_v_micro)
        for i in gl.static_range(STEP):
            state = _attend_tile(
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
                p_mask,
                EDGE,
                QK,
                PV,
                BIAS,
                MASK,
                HIDES,
                CAUSAL,
                D,
                mma,
            )
    return state


@gluon.jit
def _attend_tile(
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
    p_mask,
    EDGE: gl.constexpr,
    QK: gl.constexpr,
    PV: gl.constexpr,
    BIAS: gl.constexpr,
    MASK: gl.constexpr,
    HIDES: gl.constexpr,
    CAUSAL: gl.constexpr,
    D: gl.constexpr,
    mma: gl.constexpr,
):
    """64 keys of the online softmax."""
    rhs: gl.constexpr = gl.DotOperandLayout(1, mma, 1)
    FP8: gl.constexpr = PV == "fp8"
    RANGE: gl.constexpr = _RANGE_FP8 if FP8 else _RANGE_INT8
    SCALED: gl.constexpr = BIAS or MASK == 2  # q_scale is applied to S, not within the exponent
    acc, total, top, reference, p_k, p_v, p_k_scale, p_bias, p_k_micro, p_v_micro = state

    s_type: gl.constexpr = gl.distributed_type(gl.float32, [q.shape[0], _TILE_N], mma)
    k = k_tile.permute((1, 0)).load(rhs)
    k_scale = gl.load(p_k_scale)
    p_k_scale += 2 * _TILE_N
    if BIAS:
        bias = gl.load(p_bias)
        p_bias += _TILE_N
    if QK == "fp4":
        if EDGE:
            rows: gl.constexpr = gl.SliceLayout(1, p_k_micro.type.layout)
            inside = tile * _TILE_N + gl.arange(0, _TILE_N, rows) < k_len
            k_micro = gl.load(p_k_micro, mask=inside[:, None], other=0)
        else:
            k_micro = gl.load(p_k_micro)
        p_k_micro += _TILE_N * p_k_micro.shape[1]
        if BIAS:
            s = gl.inline_asm(
                scores_fp4,
                ("=&f", "r", "r", "r", "r", "f", "f", "f"),
                [q, k, q_micro, k_micro, k_scale, q_scale, bias],
                s_type,
                is_pure=True,
            )
        else:
            s = gl.inline_asm(
                scores_fp4,
                ("=&f", "r", "r", "r", "r", "f"),
                [q, k, q_micro, k_micro, k_scale],
                s_type,
                is_pure=True,
            )
    else:
        # Issue slots are dearer than loads where a tile has more tensor-core work.
        WIDE: gl.constexpr = v_tile.shape[0] >= 128
        offset = gl.load(p_k_scale - _TILE_N) if WIDE else k_scale * _MINUS_MAGIC
        # Scales leave two mantissa bits free, so that the magic term cancels exactly.
        asm: gl.constexpr = scores_int4 if QK == "int4" else scores_int8
        if BIAS:
            s = gl.inline_asm(
                asm,
                ("=&f", "r", "r", "r", "f", "f", "f", "f"),
                [q, k, magic, k_scale, offset, q_scale, bias],
                s_type,
                is_pure=True,
            )
        else:
            s = gl.inline_asm(
                asm,
                ("=&f", "r", "r", "r", "f", "f"),
                [q, k, magic, k_scale, offset],
                s_type,
                is_pure=True,
            )
    if SCALED and not BIAS:
        s = s * q_scale[:, None]
    start = tile * _TILE_N
    if MASK:
        at = p_mask + start  # [BM, 64]
        if EDGE:
            o_n = start + gl.arange(0, _TILE_N, gl.SliceLayout(0, mma))
            inside = (o_n < k_len)[None, :] & (o_m >= 0)[:, None]
            added = gl.load(at, mask=inside, other=0)
        else:
            added = gl.load(at)
        if MASK == 1:
            s = gl.where(added != 0, s, -float("inf"))
        else:
            added = added.to(gl.float32)
            clamped = gl.minimum(gl.maximum(added * _LOG2E, _MASK_FLOOR), -_MASK_FLOOR)
            s += gl.where(added == -float("inf"), added, clamped)
    if EDGE:
        visible = gl.full([q.shape[0]], 0, gl.int32, gl.SliceLayout(1, mma)) + k_len
        if CAUSAL:
            visible = gl.minimum(visible, o_m + 1)
        s = gl.inline_asm(
            hide_columns, ("=f", "f", "r"), [s, visible - start], s_type, is_pure=True
        )

    if PV == "fp4":
        words, p_micro, total, alpha, top, reference = weigh_fp4(
            s, q_scale, total, top, reference, _LAG, HIDES, SCALED
        )
        if EDGE or v_tile.shape[0] != D:
            channel = gl.arange(0, v_tile.shape[0], p_v_micro.type.layout)
            v_micro = gl.load(p_v_micro, mask=(channel < D) & (start < k_len), other=0)
        else:
            v_micro = gl.load(p_v_micro)
        p_v_micro += D
        v = v_tile.permute((1, 0)).load(rhs)
        acc = gl.inline_asm(
            values_fp4,
            ("=&f", "r", "r", "r", "r", "f", "f"),
            [words, p_micro, v, v_micro, acc, alpha],
            acc.type,
            is_pure=True,
        )
        return acc, total, top, reference, p_k, p_v, p_k_scale, p_bias, p_k_micro, p_v_micro
    tile_top = gl.max(s, 1)
    if not SCALED:
        tile_top = tile_top * q_scale
    before = top if FP8 else reference
    top = gl.maximum(top, tile_top)
    now = top
    if not FP8:
        # P relative to the tile's own maximum fills the 127 codes, whatever came before.
        now = gl.maximum(tile_top, top - _LAG)
        reference = now
    safe = now
    if HIDES:  # 0 for a row that saw no key yet: exponents stay defined
        safe = gl.where(now == -float("inf"), 0.0, now)
    alpha = gl.exp2(before - safe)
    shift = safe - RANGE
    if SCALED:
        p = gl.exp2(s - shift[:, None])
    else:
        p = gl.exp2(gl.fma(s, _down(q_scale, s), _down(-shift, s)))
    total = gl.inline_asm(
        add_row, ("=&f", "f", "f", "f"), [p, total, alpha], total.type, is_pure=True
    )
    v = v_tile.permute((1, 0)).load(rhs)
    if FP8:
        acc = gl.inline_asm(
            values_fp8, ("=&f", "f", "r", "f", "f"), [p, v, acc, alpha], acc.type, is_pure=True
        )
    else:
        acc = gl.inline_asm(
            values_int8,
            ("=&f", "f", "r", "f", "f", "r"),
            [p, v, acc, alpha, magic],
            acc.type,
            is_pure=True,
        )
    return acc, total, top, reference, p_k, p_v, p_k_scale, p_bias, p_k_micro, p_v_micro


@gluon.jit
def _down(x, like):
    """[M] -> [M, N]"""
    return gl.broadcast(x[:, None], like)[0]


@gluon.jit
def _copy_step(
    p_k,
    p_v,
    k_ring,
    v_ring,
    step,
    k_limit,
    limit,
    D: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the step at the pointers into the rings, zeros where there is nothing to read."""
    for i in gl.static_range(STEP):
        slot = (step % STAGES) * STEP + i
        start = (step * STEP + i) * _TILE_N
        async_copy.async_load(k_ring.index(slot), p_k, mask=(start < k_limit)[:, None])
        wanted = start < limit
        if v_ring.shape[1] != D:
            o_d = gl.arange(0, v_ring.shape[1], gl.SliceLayout(1, p_v.type.layout))
            wanted = (wanted & (o_d < D))[:, None]
        async_copy.async_load(v_ring.index(slot), p_v, mask=wanted)
        p_k += _TILE_N * k_ring.shape[2]
        p_v += v_ring.shape[2]
    async_copy.commit_group()
    return p_k, p_v


@gluon.jit
def _place(blocks, heads, group, CAUSAL: gl.constexpr):
    """Which head and which query block this program has.

    Read from the hardware each time: kept from the kernel's begin to its end, these would cost
    registers in the loop, which has none to spare.
    """
    program = gl.inline_asm("mov.u32 $0, %ctaid.x;", "=r", [], gl.int32, is_pure=False)
    i_m = program % blocks
    if CAUSAL:
        i_m = blocks - 1 - i_m  # the longest first
    i_bh = (program // blocks).to(gl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    return i_bh, i_b, i_h, i_b * (heads // group) + i_h // group, i_m


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
    p_v_scale,  # [B, Hkv, D] float32
    p_v_mean,  # [B, Hkv, D] float32, or None
    p_bias,  # [B, H, 128-row blocks of the launch, Lp + 128] float32, column order, or None
    p_mask,  # uint8 or float, or None
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
    stride_mb,
    stride_mh,
    stride_mm,
    D: gl.constexpr,
    WORDS: gl.constexpr,
    DP: gl.constexpr,
    QK: gl.constexpr,  # "int4", "int8", "fp4"
    PV: gl.constexpr,  # "int8", "fp8", "fp4"
    Q_BLOCK: gl.constexpr,
    MASK: gl.constexpr,  # of its own for every query: 0 none, 1 boolean, 2 additive
    HIDES: gl.constexpr,  # mask or bias may hide all keys from a row
    CAUSAL: gl.constexpr,
    BM: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One block of query rows of one head."""
    BIAS: gl.constexpr = p_bias is not None
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    row: gl.constexpr = gl.SliceLayout(1, mma)
    col: gl.constexpr = gl.SliceLayout(0, mma)
    V_WORDS: gl.constexpr = _TILE_N // (8 if PV == "fp4" else 4)
    k_copy: gl.constexpr = copy_layout(WORDS, num_warps)
    v_copy: gl.constexpr = copy_layout(V_WORDS, num_warps)

    i_bh, i_b, i_h, i_bkv, i_m = _place(blocks, heads, group, CAUSAL)
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
    q_scale = gl.load(p_q_scale + i_bh * q_scales + at // Q_BLOCK)

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
    o_c = gl.arange(0, _TILE_N, column_layout(num_warps))
    p_k_scale = p_k_scale + i_bkv * ((padded + 2 * _TILE_N) * 2) + o_c
    if BIAS:
        p_bias = p_bias + i_b * stride_bias_b + i_h * stride_bias_h + o_c
        p_bias += (i_m * BM // 128).to(gl.int64) * stride_bias_m
    if MASK:
        p_mask = p_mask + i_b * stride_mb + i_h * stride_mh
        p_mask = p_mask + at[:, None].to(gl.int64) * stride_mm
        p_mask = p_mask + gl.arange(0, _TILE_N, col)[None, :]
    end = k_len
    whole = k_len // (STEP * _TILE_N)  # steps without a check
    if CAUSAL:
        whole = gl.minimum(whole, (start_m + 1) // (STEP * _TILE_N))
        end = gl.minimum(end, start_m + BM)
    steps = gl.cdiv(end, STEP * _TILE_N)

    k_ring = gl.allocate_shared_memory(gl.int32, [STAGES * STEP, _TILE_N, WORDS], swizzle(WORDS))
    v_ring = gl.allocate_shared_memory(gl.int32, [STAGES * STEP, DP, V_WORDS], swizzle(V_WORDS))
    k_rows = gl.arange(0, _TILE_N, gl.SliceLayout(1, k_copy))
    v_words = gl.arange(0, V_WORDS, gl.SliceLayout(0, v_copy))
    v_rows = gl.arange(0, DP, gl.SliceLayout(1, v_copy))
    v_stride = padded // _TILE_N * V_WORDS
    p_k = p_k + i_bkv * k_len * WORDS + (k_rows[:, None] * WORDS + words[None, :])
    p_v = p_v + i_bkv * D * v_stride
    p_v = p_v + v_rows[:, None].to(gl.int64) * v_stride + v_words[None, :]
    limit = gl.minimum(k_len, gl.cdiv(end, _TILE_N) * _TILE_N)
    k_limit = limit - k_rows
    for i in gl.static_range(STAGES - 1):
        p_k, p_v = _copy_step(p_k, p_v, k_ring, v_ring, i, k_limit, limit, D, STEP, STAGES)

    state = (
        gl.zeros([BM, DP], gl.float32, mma),
        gl.zeros([BM], gl.float32, row),
        gl.full([BM], -float("inf"), gl.float32, row),
        gl.full([BM], -float("inf"), gl.float32, row),
        p_k,
        p_v,
        p_k_scale,
        p_bias if BIAS else p_k_scale,
        p_k_micro if QK == "fp4" else p_k_scale,
        p_v_micro if PV == "fp4" else p_k_scale,
    )
    words_type: gl.constexpr = gl.distributed_type(
        gl.int32, [4], gl.BlockedLayout([4], [32], [num_warps], [0])
    )
    magic = gl.inline_asm(
        magic_words,
        ("=r", "r", "r", "r", "r"),
        [heads, q_len, k_len, padded],
        words_type,
        is_pure=True,
    )
    for EDGE in gl.static_range(2):
        state = _attend_range(
            state,
            whole * EDGE,
            steps if EDGE else whole,
            k_limit,
            limit,
            k_len,
            q,
            q_micro,
            q_scale,
            o_m,
            magic,
            p_mask,
            k_ring,
            v_ring,
            EDGE,
            QK,
            PV,
            BIAS,
            MASK,
            HIDES,
            CAUSAL,
            D,
            STEP,
            STAGES,
            mma,
        )
    acc, total, top, reference, p_k, p_v, p_k_scale, p_bias, p_k_micro, p_v_micro = state
    async_copy.wait_group(0)

    total = gl.inline_asm(finish_row, ("=&f", "f"), [total], total.type, is_pure=True)
    i_bh, i_b, i_h, i_bkv, i_m = _place(blocks, heads, group, CAUSAL)
    o_m = (first_block + i_m) * BM + gl.arange(0, BM, row)
    seen = total > 0.0
    total = gl.where(seen, total, 1.0)
    o_d = gl.arange(0, DP, col)
    out = acc * (1.0 / total)[:, None]
    i_d = i_bkv * D + o_d
    out = out * gl.load(p_v_scale + i_d, mask=o_d < D, other=0.0)[None, :]
    if p_v_mean is not None:
        out = out + gl.load(p_v_mean + i_d, mask=o_d < D, other=0.0)[None, :]
    out = gl.where(seen[:, None], out, 0.0)
    p_out += i_bh * q_len * D
    inside = (o_m < q_len)[:, None] & (o_d < D)[None, :]
    gl.store(
        p_out + (o_m[:, None].to(gl.int64) * D + o_d[None, :]),
        out.to(p_out.dtype.element_ty),
        mask=inside,
    )
    if p_lse is not None:
        RANGE: gl.constexpr = (
            _RANGE_FP8 if PV == "fp8" else RANGE_FP4 if PV == "fp4" else _RANGE_INT8
        )
        lse = gl.where(
            seen,
            ((top if PV == "fp8" else reference) + (gl.log2(total) - RANGE)) / _LOG2E,
            -float("inf"),
        )
        gl.store(p_lse + i_bh * q_len + o_m, lse, mask=o_m < q_len)
