"""Attention with NVFP4 Q and K and FP8 or NVFP4 P and V in Triton, for block-scaled ``tl.dot``.

Semantics are those of :func:`.reference.attend_quantized`.  Scores are in log2 units; the range of
P's format is folded into the exponent and cancels in ``acc / total``.  On sm_100 both products are
``tcgen05.mma``.  The keys of a tile stand in the order of V's stored tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import (
    FP4_GROUP,
    LOG2E,
    Q_BLOCK,
    TILE_N,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    cdiv,
)
from ..quantize.limits import FP4_MAX, FP8_MAX, FP8_TINY
from ..quantize.triton_fp4 import fp4_token
from ..start import start_kernel
from ..tiles import to_output
from ..versions import to_e4m3
from . import tuning
from .entry import Bias, in_columns, in_parts, outputs, readable
from .terms import MASK_FLOOR

_LOG2E, _MASK_FLOOR = tl.constexpr(LOG2E), tl.constexpr(MASK_FLOOR)
_TILE_N, _GROUP = tl.constexpr(TILE_N), tl.constexpr(FP4_GROUP)
_FP4_MAX, _FP8_TINY = tl.constexpr(FP4_MAX), tl.constexpr(FP8_TINY)

#: log2 of P's largest value.
_P_RANGE = {"fp8": math.log2(FP8_MAX), "fp4": math.log2(FP4_MAX * FP8_MAX)}


@triton.jit
def _encode_fp4(low, high):
    """E2M1 codes of two float32 tensors, the first in the low nibble: uint8."""
    return tl.inline_asm_elementwise(
        """{ .reg .b8 b<4>;
        cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1; cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3; cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4;
        mov.b32 $0, {b0, b1, b2, b3}; }""",
        "=r,f,f,f,f,f,f,f,f",
        [low, high],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _quantize_weights(p, BLOCK_M: tl.constexpr):
    """P ``[BLOCK_M, 64]`` up to 2688 -> packed codes ``[BLOCK_M, 32]`` and E4M3 scales."""
    GROUPS: tl.constexpr = _TILE_N // _GROUP
    groups = tl.reshape(p, [BLOCK_M, GROUPS, _GROUP])
    micro = to_e4m3(tl.maximum(tl.max(groups, 2) * (1.0 / _FP4_MAX), _FP8_TINY))
    codes = groups * (1.0 / micro.to(tl.float32))[:, :, None]
    low, high = tl.split(tl.reshape(codes, [BLOCK_M, _TILE_N // 2, 2]))
    return _encode_fp4(low, high), micro


@triton.jit
def _attend_range(
    acc,  # [BLOCK_M, DP] float32
    total,  # [BLOCK_M] float32
    top,  # [BLOCK_M] float32, log2 units
    factor,  # of V's last tile, in whose units acc is
    q,  # [BLOCK_M, DP / 2] uint8
    q_micro,  # [BLOCK_M, DP / 16] E4M3
    q_scale,  # [BLOCK_M] float32, positive
    o_m,  # [BLOCK_M] query indices
    o_row,  # [BLOCK_M] the same within the block, clamped to the last query
    start,  # first key, a multiple of 64
    stop,
    k_len,
    tiles,
    p_k,
    p_k_micro,
    p_k_scale,
    p_v,
    p_v_micro,
    p_v_tiles,
    p_bias,
    p_mask,
    stride_mm,
    stride_mn,
    EDGE: tl.constexpr,  # tiles with keys that are outside, or in the future
    D: tl.constexpr,
    DP: tl.constexpr,
    PV: tl.constexpr,
    P_RANGE: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    BIAS: tl.constexpr = p_bias is not None
    SCALED: tl.constexpr = BIAS or MASK == 2  # q_scale is applied to S, not within the exponent
    o_n = tl.arange(0, _TILE_N)
    if PV == "fp4":
        o_n = fp4_token(o_n)
    o_d, o_byte, o_group = tl.arange(0, DP), tl.arange(0, DP // 2), tl.arange(0, DP // _GROUP)
    column = (((o_n >> 1) & 3) << 4) | ((o_n >> 3) << 1) | (o_n & 1)  # as permute.column_order
    for n in tl.range(start, stop, _TILE_N):
        key = (n + o_n).to(tl.int64)
        inside = key < k_len
        at_k = p_k + key[None, :] * (DP // 2) + o_byte[:, None]  # [DP / 2, 64]
        at_micro = p_k_micro + key[:, None] * (DP // _GROUP) + o_group[None, :]
        if EDGE:
            k = tl.load(at_k, mask=inside[None, :] & (o_byte[:, None] >= 0), other=0)
            k_micro = tl.load(at_micro, mask=inside[:, None] & (o_group[None, :] >= 0), other=0.0)
            k_scale = tl.load(p_k_scale + key, mask=inside, other=0.0)
        else:
            k, k_micro, k_scale = tl.load(at_k), tl.load(at_micro), tl.load(p_k_scale + key)
        s = tl.dot_scaled(q, q_micro, "e2m1", k, k_micro, "e2m1") * k_scale[None, :]
        if SCALED:
            s *= q_scale[:, None]
        if BIAS:
            s += tl.load(p_bias + n + column)[None, :]
        if EDGE:
            visible = inside[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= o_m[:, None])
            s = tl.where(visible, s, -float("inf"))
        if MASK:
            if MASK_ROWS:
                at_mask = p_mask + (key[None, :] * stride_mn + o_row[:, None] * stride_mm)
            else:
                at_mask = p_mask + key[None, :] * stride_mn
            if EDGE:
                there = inside[None, :] & tl.full(at_mask.shape, True, tl.int1)
                seen = tl.load(at_mask, mask=there, other=0)
            else:
                seen = tl.load(at_mask)
            if MASK == 1:
                s = tl.where(seen != 0, s, -float("inf"))
            else:
                seen = seen.to(tl.float32)
                added = tl.minimum(tl.maximum(seen * _LOG2E, _MASK_FLOOR), -_MASK_FLOOR)
                s += tl.where(seen == -float("inf"), seen, added)
        tile_top = tl.max(s, 1)
        if not SCALED:
            tile_top *= q_scale
        new_top = tl.maximum(top, tile_top)
        # 0 for a row that saw no key yet: exponents stay defined.
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top) if MASK else new_top
        alpha = tl.exp2(top - safe_top)
        base = safe_top
        if PV == "fp4":  # relative to the tile's own maximum, or anything if it sees no key
            base = tl.where(tile_top == -float("inf"), safe_top, tile_top)
        shift = base - P_RANGE
        if SCALED:
            p = tl.exp2(s - shift[:, None])
        else:
            p = tl.exp2(s * q_scale[:, None] - shift[:, None])
        seen_total = tl.sum(p, 1)
        if PV == "fp4":
            back = tl.exp2(base - safe_top)
            seen_total *= back
            o_half = tl.arange(0, _TILE_N // 2)
            at_v = p_v + o_d[None, :].to(tl.int64) * (tiles * (_TILE_N // 2)) + o_half[:, None]
            at_v += n // 2
            o_four = tl.arange(0, _TILE_N // _GROUP)
            at_micro = p_v_micro + (n // _TILE_N).to(tl.int64) * (D * (_TILE_N // _GROUP))
            at_micro += o_d[:, None] * (_TILE_N // _GROUP) + o_four[None, :]
            if D == DP:
                v, v_micro = tl.load(at_v), tl.load(at_micro)
            else:
                v = tl.load(at_v, mask=(o_d < D)[None, :] & (o_half >= 0)[:, None], other=0)
                in_d = (o_d < D)[:, None] & (o_four >= 0)[None, :]
                v_micro = tl.load(at_micro, mask=in_d, other=0.0)
            codes, micro = _quantize_weights(p, BLOCK_M)
            product = tl.dot_scaled(codes, micro, "e2m1", v, v_micro, "e2m1")
            acc = acc * alpha[:, None] + product * back[:, None]
        else:
            # Transposed V is padded to whole tiles with zeros.
            at_v = p_v + o_d[None, :].to(tl.int64) * (tiles * _TILE_N) + key[:, None]
            if D == DP:
                v = tl.load(at_v)
            else:
                v = tl.load(at_v, mask=(o_d < D)[None, :] & (o_n >= 0)[:, None], other=0.0)
            FAST: tl.constexpr = PV == "fp8-fast"
            product = tl.dot(to_e4m3(p), v, out_dtype=tl.float16 if FAST else tl.float32)
            beta = alpha
            if p_v_tiles is not None:
                # acc goes over to this tile's units, in the factor that it takes anyway.
                at_tile = p_v_tiles + n // (_TILE_N // 2)
                beta = alpha * (factor * tl.load(at_tile + 1))
                factor = tl.load(at_tile)
            acc = tl.fma(acc, tl.broadcast_to(beta[:, None], acc.shape), product.to(tl.float32))
        total = total * alpha + seen_total
        top = new_top
    return acc, total, top, factor


@triton.jit
def _attention_fp4_kernel(
    p_q,  # [B, H, Lq, DP / 2] uint8
    p_k,  # [B, Hkv, Lk, DP / 2] uint8
    p_v,  # [B, Hkv, D, Lp] E4M3, or [B, Hkv, D, Lp / 2] uint8 with its tokens permuted
    p_q_scale,  # [B, H, Lq]
    p_k_scale,  # [B, Hkv, Lk]
    p_q_micro,  # [B, H, Lq, DP / 16] E4M3
    p_k_micro,  # [B, Hkv, Lk, DP / 16] E4M3
    p_v_micro,  # [B, Hkv, Lp / 64, D, 4] E4M3, or None
    p_v_scale,  # [B, Hkv, D]
    p_v_mean,  # [B, Hkv, D], or None
    p_v_tiles,  # [B, Hkv, Lp / 64 + 2, 2], or None
    p_bias,  # [B, H, 128-row blocks of the launch, columns], or None
    p_mask,  # uint8 or float, or None
    p_out,  # [B, H, Lq, D]
    p_lse,  # [B, H, Lq], or None
    heads,
    group,  # query heads of a KV head
    q_len,
    k_len,
    tiles,  # of V
    first_block,  # of this launch
    blocks,  # of this launch
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    D: tl.constexpr,
    DP: tl.constexpr,
    PV: tl.constexpr,  # "fp8", "fp8-fast", "fp4"
    P_RANGE: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 boolean, 2 additive
    MASK_ROWS: tl.constexpr,  # the mask differs from query to query
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    i_launch = tl.program_id(0) % blocks
    if CAUSAL:
        i_launch = blocks - 1 - i_launch  # the longest first
    i_m = first_block + i_launch
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_bkv = i_b * (heads // group) + i_h // group

    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DP)
    o_row = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i_m * BLOCK_M)
    rows = i_bh * q_len + i_m * BLOCK_M + o_row
    q = tl.load(p_q + rows[:, None] * (DP // 2) + tl.arange(0, DP // 2)[None, :])
    o_group = tl.arange(0, DP // _GROUP)
    q_micro = tl.load(p_q_micro + rows[:, None] * (DP // _GROUP) + o_group[None, :])
    q_scale = tl.load(p_q_scale + rows)
    p_k += i_bkv * k_len * (DP // 2)
    p_k_micro += i_bkv * k_len * (DP // _GROUP)
    p_k_scale += i_bkv * k_len
    p_v += i_bkv * D * tiles * (_TILE_N // 2 if PV == "fp4" else _TILE_N)
    if PV == "fp4":
        p_v_micro += i_bkv * tiles * (D * (_TILE_N // _GROUP))
    if p_v_tiles is not None:
        p_v_tiles += i_bkv * ((tiles + 2) * 2)
    if p_bias is not None:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h
        p_bias += i_launch.to(tl.int64) * stride_bias_m
    if MASK:
        p_mask += i_b * stride_mb + i_h * stride_mh + i_m.to(tl.int64) * BLOCK_M * stride_mm

    acc = tl.zeros([BLOCK_M, DP], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    factor = tl.full([], 1.0, tl.float32)
    whole, stop = k_len // _TILE_N * _TILE_N, k_len
    if CAUSAL:
        whole = tl.minimum(whole, (i_m * BLOCK_M + 1) // _TILE_N * _TILE_N)
        stop = tl.minimum(k_len, (i_m + 1) * BLOCK_M)
    for EDGE in tl.static_range(2):
        acc, total, top, factor = _attend_range(
            acc,
            total,
            top,
            factor,
            q,
            q_micro,
            q_scale,
            o_m,
            o_row.to(tl.int64),
            whole * EDGE,
            stop if EDGE else whole,
            k_len,
            tiles,
            p_k,
            p_k_micro,
            p_k_scale,
            p_v,
            p_v_micro,
            p_v_tiles,
            p_bias,
            p_mask,
            stride_mm,
            stride_mn,
            EDGE,
            D,
            DP,
            PV,
            P_RANGE,
            MASK,
            MASK_ROWS,
            CAUSAL,
            BLOCK_M,
        )

    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    out = acc * (factor / total if p_v_tiles is not None else 1.0 / total)[:, None]
    in_d, i_d = o_d < D, i_bkv * D + o_d
    out *= tl.load(p_v_scale + i_d, mask=in_d, other=0.0)[None, :]
    if p_v_mean is not None:
        out += tl.load(p_v_mean + i_d, mask=in_d, other=0.0)[None, :]
    out = tl.where(seen[:, None], out, 0.0)
    p_out += (i_bh * q_len + i_m * BLOCK_M) * D
    at = tl.arange(0, BLOCK_M)[:, None] * D + o_d[None, :]
    inside = (o_m[:, None] < q_len) & in_d[None, :]
    tl.store(p_out + at, to_output(out, p_out), mask=inside)
    if p_lse is not None:
        lse = tl.where(seen, (top + (tl.log2(total) - P_RANGE)) / _LOG2E, -float("inf"))
        tl.store(p_lse + i_bh * q_len + o_m, lse, mask=o_m < q_len)


def attend_quantized(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: QuantizedValue,
    *,
    delta_s: Tensor | None = None,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    fp16_accumulator: bool = False,
    out_dtype: torch.dtype = torch.float32,
    return_lse: bool = True,
    launch: tuning.Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.reference.attend_quantized`.

    Args:
        q, k: FP4; q's scales must be positive.
        v: FP8, or FP4 with permuted tokens (:func:`..quantize.permute.permute_value`).
        delta_s: as of the twin, in token order.
        bias: computes delta-S in column order when it is needed; instead of ``delta_s``.
        out_dtype: of the output.
        return_lse: otherwise the log-sum-exp is not computed and None is returned.
        launch: instead of the one for the head dim.

    Raises:
        ValueError: a format that the kernel does not read, or a launch of other than 128 rows.
    """
    for name, x in (("q", q), ("k", k)):
        if x.precision is not Precision.FP4:
            raise ValueError(f"{name} must be fp4, got {x.precision.value}")
    allowed = ((Precision.FP8, True), (Precision.FP8, False), (Precision.FP4, False))
    if (v.precision, fp16_accumulator) not in allowed:
        raise ValueError(
            "v must be fp8, or fp4 without fp16_accumulator, "
            f"got {v.precision.value} and fp16_accumulator={fp16_accumulator}"
        )
    assert q.micro is not None and k.micro is not None
    batch, heads, q_len = q.data.shape[:3]
    kv_heads, k_len = k.data.shape[1:3]
    head_dim, dim = v.data.shape[2], 2 * q.data.shape[3]
    kind, strides = 0, [0, 0, 0, 0]
    if mask is not None:
        kind, mask = readable(mask)
        mask = mask.expand(batch, heads, q_len, k_len)
        strides = list(mask.stride())
    if delta_s is not None:
        bias = in_columns(delta_s)
    pv, p_range = v.precision.value, _P_RANGE[v.precision.value]
    if fp16_accumulator:
        pv = "fp8-fast"
    config = tuning.fp4_launch(dim, strides[2] != 0, launch)
    out, lse = outputs(q, head_dim, out_dtype, return_lse)
    with torch.cuda.device_of(q.data):
        for first, count, added, bias_strides in in_parts(q, k_len, Q_BLOCK, bias):
            start_kernel(
                _attention_fp4_kernel,
                (count * batch * heads,),
                q.data.contiguous(),
                k.data.contiguous(),
                v.data.contiguous(),
                q.scale.contiguous(),
                k.scale.contiguous(),
                q.micro.contiguous(),
                k.micro.contiguous(),
                None if v.micro is None else v.micro.contiguous(),
                v.scale.contiguous(),
                None if v.mean is None else v.mean.contiguous(),
                v.tiles,
                added,
                mask,
                out,
                lse,
                heads,
                heads // kv_heads,
                q_len,
                k_len,
                cdiv(k_len, TILE_N),
                first,
                count,
                *bias_strides,
                *strides,
                D=head_dim,
                DP=dim,
                PV=pv,
                P_RANGE=p_range,
                MASK=kind,
                MASK_ROWS=strides[2] != 0,
                CAUSAL=is_causal,
                BLOCK_M=Q_BLOCK,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=True,
            )
    return out, lse
