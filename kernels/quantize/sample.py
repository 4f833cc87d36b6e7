"""What one token in sixteen says of Q, K and V, in Triton; twin: :func:`.reference.sample`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Q_BLOCK, Precision, Sample, cdiv, padded_dim
from ..rope import Rope
from ..spec import AttentionSpec
from ..start import start_kernel
from ..tiles import round_to_int
from .limits import (
    LARGEST_SHIFT,
    SAMPLE_BLOCK,
    SMALLEST_POWER,
    V_SMALLEST_SHARE,
    sample_block,
    sampled_top,
)
from .rope import TABLES, Tables, load_rotated_rows, load_rows, rope_arguments
from .stats import STATS_CHUNK
from .triton_value import scale_of

_BLOCK, _Q_BLOCK = tl.constexpr(SAMPLE_BLOCK), tl.constexpr(Q_BLOCK)
_POWER, _SHIFT = tl.constexpr(SMALLEST_POWER), tl.constexpr(LARGEST_SHIFT)
_SMALLEST_SHARE = tl.constexpr(V_SMALLEST_SHARE)


@triton.jit
def _tokens(i, length, EVERY: tl.constexpr):
    """As :func:`.reference.sampled_tokens`; beyond the last sample ``length``, which is outside."""
    offset = ((i.to(tl.uint32) * 0x9E3779B1) >> 28).to(tl.int32) * EVERY // _BLOCK
    token = tl.minimum(i * EVERY + offset, length - 1)
    return tl.where(i * EVERY < length, token, length)


@triton.jit
def _centred(x, inside, SOME: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Minus the mean of every ``SOME`` samples, which 128 rows of Q have."""
    groups = tl.reshape(x, [ROWS // SOME, SOME, DIM])
    valid = tl.reshape(inside, [ROWS // SOME, SOME, DIM])
    counts = tl.maximum(tl.sum(valid.to(tl.float32), 1), 1.0)
    mean = tl.div_rn(tl.sum(groups, 1), counts)
    return tl.reshape(tl.where(valid, groups - mean[:, None, :], 0.0), [ROWS, DIM])


@triton.jit
def _balance(
    program,
    programs,  # KV heads of all entries of the batch
    p_q,
    p_k,
    p_k_mean,  # [B, Hkv, D], or None
    p_factors,  # [2, B, Hkv, D]: Q's, K's
    kv_heads,
    group,
    q_len,
    k_len,
    q_b,  # strides
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    q_rope,  # Tables
    k_rope,
    D: tl.constexpr,
    DP: tl.constexpr,
    SMOOTH_Q: tl.constexpr,
    Q_EVERY: tl.constexpr,  # tokens of which one is sampled
    K_EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
    Q_ROPE: tl.constexpr,  # columns of the tables, 0 without
    Q_INTERLEAVED: tl.constexpr,
    K_ROPE: tl.constexpr,
    K_INTERLEAVED: tl.constexpr,
):
    """One KV head and the query heads that share it."""
    i_bkv = program.to(tl.int64)
    i_b, i_h = i_bkv // kv_heads, i_bkv % kv_heads
    o_i, o_d = tl.arange(0, BLOCK), tl.arange(0, DP)
    in_d, at = o_d < D, i_bkv * D + o_d
    p_k += i_b * k_b + i_h * k_h
    k_count, q_count = tl.cdiv(k_len, K_EVERY), tl.cdiv(q_len, Q_EVERY)

    k_mean = tl.zeros([DP], tl.float32)
    if p_k_mean is not None:
        total = tl.zeros([BLOCK, DP], tl.float32)
        for first in range(0, k_count, BLOCK):
            x, _ = load_rotated_rows(
                p_k,
                _tokens(first + o_i, k_len, K_EVERY),
                k_len,
                k_l,
                k_d,
                i_b,
                k_rope,
                D,
                0,
                DP,
                K_ROPE,
                K_INTERLEAVED,
            )
            total += x
        k_mean = tl.div_rn(tl.sum(total, 0), k_count.to(tl.float32))
        tl.store(p_k_mean + at, k_mean, mask=in_d)

    squares = tl.zeros([BLOCK, DP], tl.float32)
    for first in range(0, k_count, BLOCK):
        x, inside = load_rotated_rows(
            p_k,
            _tokens(first + o_i, k_len, K_EVERY),
            k_len,
            k_l,
            k_d,
            i_b,
            k_rope,
            D,
            0,
            DP,
            K_ROPE,
            K_INTERLEAVED,
        )
        x = tl.where(inside, x - k_mean[None, :], 0.0)
        squares += x * x
    k_power = tl.sum(squares, 0) / k_count.to(tl.float32)

    squares = tl.zeros([BLOCK, DP], tl.float32)
    p_q += i_b * q_b + i_h * group * q_h
    for _ in range(group):
        for first in range(0, q_count, BLOCK):
            x, inside = load_rotated_rows(
                p_q,
                _tokens(first + o_i, q_len, Q_EVERY),
                q_len,
                q_l,
                q_d,
                i_b,
                q_rope,
                D,
                0,
                DP,
                Q_ROPE,
                Q_INTERLEAVED,
            )
            if SMOOTH_Q:
                x = _centred(x, inside, _Q_BLOCK // Q_EVERY, BLOCK, DP)
            squares += x * x
        p_q += q_h
    q_power = tl.sum(squares, 0) / (group * q_count).to(tl.float32)

    known = (k_power > _POWER) & (q_power > _POWER)
    ratio = tl.log2(tl.where(known, k_power, 1.0)) - tl.log2(tl.where(known, q_power, 1.0))
    share = 0.25 * ratio
    share -= tl.sum(share, 0) / tl.maximum(tl.sum(known.to(tl.float32), 0), 1.0)
    share = tl.minimum(tl.maximum(share, -_SHIFT), _SHIFT)
    exponent = tl.where(known, round_to_int(share), 0)
    p_factors += at
    tl.store(p_factors, ((127 + exponent) << 23).to(tl.float32, bitcast=True), mask=in_d)
    p_factors += programs * D
    tl.store(p_factors, ((127 - exponent) << 23).to(tl.float32, bitcast=True), mask=in_d)


@triton.jit
def _sample_value(
    i_bkv,
    p_v,  # of the head
    p_v_mean,  # [B, Hkv, D], or None
    p_v_scale,  # the same, or None
    k_len,
    v_l,  # strides
    v_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    EVERY: tl.constexpr,  # tokens of which one is sampled
    TOP: tl.constexpr,  # what V's largest values become
    BLOCK: tl.constexpr,
):
    """V's mean and scales of one head."""
    o_i, o_d = tl.arange(0, BLOCK), tl.arange(0, DP)
    in_d, at = o_d < D, i_bkv * D + o_d
    count = tl.cdiv(k_len, EVERY)
    total = tl.zeros([BLOCK, DP], tl.float32)
    low = tl.full([BLOCK, DP], float("inf"), tl.float32)
    high = tl.full([BLOCK, DP], -float("inf"), tl.float32)
    for first in range(0, count, BLOCK):
        token = _tokens(first + o_i, k_len, EVERY)
        x, inside = load_rows(p_v, token, o_d, k_len, v_l, v_d, D)
        total += x
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, -float("inf")))
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    if p_v_mean is not None:
        v_mean = tl.div_rn(tl.sum(total, 0), count.to(tl.float32))
        tl.store(p_v_mean + at, v_mean, mask=in_d)
        lowest, highest = lowest - v_mean, highest - v_mean
    if p_v_scale is not None:
        # Rounding is monotone: the largest |x - mean| is at one of the extremes, bit for bit.
        amax = tl.where(in_d, tl.maximum(tl.abs(lowest), tl.abs(highest)), 0.0)
        amax = tl.maximum(amax, tl.max(amax, 0) * _SMALLEST_SHARE)
        tl.store(p_v_scale + at, scale_of(amax, 1.0 / TOP), mask=in_d)


@triton.jit
def _extremes(
    part,  # of all heads
    p_v,
    p_low,  # [B, Hkv, parts, D]
    p_high,
    kv_heads,
    k_len,
    v_b,  # strides
    v_h,
    v_l,
    v_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Minimum and maximum of every channel over CHUNK tokens of V, all of them."""
    parts = tl.cdiv(k_len, CHUNK)
    i_bkv = (part // parts).to(tl.int64)
    p_v += (i_bkv // kv_heads) * v_b + (i_bkv % kv_heads) * v_h
    o_d = tl.arange(0, DP)
    low = tl.full([BLOCK, DP], float("inf"), tl.float32)
    high = tl.full([BLOCK, DP], -float("inf"), tl.float32)
    first = part % parts * CHUNK
    for start in range(first, tl.minimum(k_len, first + CHUNK), BLOCK):
        token = start + tl.arange(0, BLOCK)
        x, inside = load_rows(p_v, token, o_d, k_len, v_l, v_d, D)
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, -float("inf")))
    at = part.to(tl.int64) * D + o_d
    tl.store(p_low + at, tl.min(low, 0), mask=o_d < D)
    tl.store(p_high + at, tl.max(high, 0), mask=o_d < D)


@triton.jit
def _sample_kernel(
    p_q,
    p_k,
    p_v,  # or None
    p_k_mean,  # [B, Hkv, D], or None
    p_v_mean,
    p_v_scale,  # [B, Hkv, D], or None
    p_v_low,  # [B, Hkv, parts, D], or None
    p_v_high,
    p_factors,  # [2, B, Hkv, D]: Q's, K's
    kv_heads,
    programs,  # KV heads of all entries of the batch
    group,
    q_len,
    k_len,
    q_b,  # strides
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    p_q_cos,  # tables of RoPE, or None
    p_q_sin,
    q_rope_b,
    q_rope_l,
    q_rope_d,
    p_k_cos,
    p_k_sin,
    k_rope_b,
    k_rope_l,
    k_rope_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    SMOOTH_Q: tl.constexpr,
    Q_EVERY: tl.constexpr,  # tokens of which one is sampled
    K_EVERY: tl.constexpr,
    V_TOP: tl.constexpr,  # what V's largest values become
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # of V, whose extremes a program finds
    Q_ROPE: tl.constexpr,  # columns of the tables, 0 without
    Q_INTERLEAVED: tl.constexpr,
    K_ROPE: tl.constexpr,
    K_INTERLEAVED: tl.constexpr,
):
    """Q and K of one KV head, its V, or the extremes of some of all tokens of V."""
    program = tl.program_id(0)
    SAMPLED: tl.constexpr = p_v_mean is not None or p_v_scale is not None
    if program < programs:
        _balance(
            program,
            programs,
            p_q,
            p_k,
            p_k_mean,
            p_factors,
            kv_heads,
            group,
            q_len,
            k_len,
            q_b,
            q_h,
            q_l,
            q_d,
            k_b,
            k_h,
            k_l,
            k_d,
            Tables(p_q_cos, p_q_sin, q_rope_b, q_rope_l, q_rope_d),
            Tables(p_k_cos, p_k_sin, k_rope_b, k_rope_l, k_rope_d),
            D,
            DP,
            SMOOTH_Q,
            Q_EVERY,
            K_EVERY,
            BLOCK,
            Q_ROPE,
            Q_INTERLEAVED,
            K_ROPE,
            K_INTERLEAVED,
        )
    elif SAMPLED and program < 2 * programs:
        i_bkv = (program - programs).to(tl.int64)
        p_head = p_v + (i_bkv // kv_heads) * v_b + (i_bkv % kv_heads) * v_h
        _sample_value(
            i_bkv, p_head, p_v_mean, p_v_scale, k_len, v_l, v_d, D, DP, K_EVERY, V_TOP, BLOCK
        )
    elif p_v_low is not None:
        part = program - (2 if SAMPLED else 1) * programs
        _extremes(
            part, p_v, p_v_low, p_v_high, kv_heads, k_len, v_b, v_h, v_l, v_d, D, DP, CHUNK, 32
        )


def sample(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    rope_q: Rope | None = None,
    rope_k: Rope | None = None,
) -> Sample:
    """As :func:`.reference.sample`; ``rope_q`` and ``rope_k`` rotate what is sampled of q and k."""
    batch, kv_heads, k_len, head_dim = k.shape
    dim, device = padded_dim(head_dim), k.device
    shape = (batch, kv_heads, head_dim)
    k_mean, v_mean, v_scale = (
        torch.empty(shape, dtype=torch.float32, device=device) if wanted else None
        for wanted in (spec.smooth_k, spec.smooth_v, spec.sample_v)
    )
    factors = torch.empty((2, *shape), dtype=torch.float32, device=device)
    extremes, parts, programs = None, 0, batch * kv_heads
    if spec.pv is not Precision.FP16 and not (spec.sample_v or spec.tile_v):
        parts = cdiv(k_len, STATS_CHUNK)
        pair = (2, batch, kv_heads, parts, head_dim)
        extremes = torch.empty(pair, dtype=torch.float32, device=device)
    sampled = spec.smooth_v or spec.sample_v
    turn_q, turn_k = rope_arguments(rope_q, q), rope_arguments(rope_k, k)
    with torch.cuda.device_of(k):
        start_kernel(
            _sample_kernel,
            (programs * (1 + sampled + parts),),
            q,
            k,
            v if sampled or parts else None,
            k_mean,
            v_mean,
            v_scale,
            *((None, None) if extremes is None else extremes.unbind()),
            factors,
            kv_heads,
            programs,
            q.shape[1] // kv_heads,
            q.shape[2],
            k_len,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *(turn[name] for turn in (turn_q, turn_k) for name in TABLES),
            D=head_dim,
            DP=dim,
            SMOOTH_Q=spec.smooth_q,
            Q_EVERY=sample_block(q.shape[2]),
            K_EVERY=sample_block(k_len),
            V_TOP=sampled_top(spec) if spec.sample_v else None,
            BLOCK=64,
            CHUNK=STATS_CHUNK,
            Q_ROPE=turn_q["ROPE"],
            Q_INTERLEAVED=turn_q["INTERLEAVED"],
            K_ROPE=turn_k["ROPE"],
            K_INTERLEAVED=turn_k["INTERLEAVED"],
            num_warps=8,
            enable_fp_fusion=False,
        )
    q_factor, k_factor = factors.unbind()
    return Sample(k_mean, v_mean, q_factor, k_factor, v_scale, extremes)
