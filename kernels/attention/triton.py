"""One forward attention kernel in Triton for INT8 Q and K and P, V in FP16, INT8 or FP8.

Calls with FP4 Q and K go to :mod:`.triton_fp4`.

Semantics are those of :func:`.reference.attend_quantized`.  Scores are in log2 units; the range of
P's format (448 for E4M3, 127 or 255 for INT8) is folded into the exponent and cancels in
``acc / total``.  Triton's integer products take signed bytes only: an unsigned P is multiplied less
128, from sums of V's codes times 128 on.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import (
    LOG2E,
    TILE_N,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    cdiv,
)
from ..start import start_kernel
from ..tiles import (
    int_to_float,
    multiply_up,
    round_from,
    round_to_int,
    rounds_up,
    subtract_up,
    to_output,
)
from ..versions import fence_copies, to_e4m3
from . import triton_fp4, tuning
from .entry import Bias, attention_of, outputs
from .terms import LAG, MASK_FLOOR
from .triton_masks import as_tiles
from .triton_value import as_read

_LOG2E = tl.constexpr(LOG2E)
_MASK_FLOOR = tl.constexpr(MASK_FLOOR)
_LAG = tl.constexpr(LAG)

#: log2 of the largest code of P.
_P_RANGE = {
    "half": 0.0,
    "int8": math.log2(127.0),
    "uint8": math.log2(255.0),
    "fp8": math.log2(448.0),
    "fp8-fast": math.log2(448.0),
}


@triton.jit
def _load_tile(p, rows, cols, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """A tile whose rows or columns may lie outside; both checks are compiled in only if asked."""
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(p, mask=rows & cols, other=0.0)
    if CHECK_ROWS:
        return tl.load(p, mask=rows & tl.full(cols.shape, True, tl.int1), other=0.0)
    if CHECK_COLS:
        return tl.load(p, mask=cols & tl.full(rows.shape, True, tl.int1), other=0.0)
    return tl.load(p)


@triton.jit
def _load_mask(p, inside, EDGE: tl.constexpr):
    if EDGE:
        return tl.load(p, mask=inside[None, :] & tl.full(p.shape, True, tl.int1), other=0)
    return tl.load(p)


@triton.jit
def _attend_range(
    acc,  # [BLOCK_M, DP] float32
    total,  # [BLOCK_M] float32
    top,  # [BLOCK_M] float32, log2 units
    reference,  # [BLOCK_M], what acc and an INT8 P are relative to; of others top is
    q,  # [BLOCK_M, DP] int8
    q_scale,  # [BLOCK_M] float32, positive
    o_m,  # [BLOCK_M] query indices
    start,  # first key, a multiple of 64
    stop,
    k_len,
    mask_len,
    p_k,  # at the first key
    p_k_scale,
    p_v,  # at the first key
    p_sums,  # of V's codes in the first key's tile, or anything
    p_tiles,  # of V, at the first key's tile, or anything
    factor,  # of V's last tile, in whose units acc is
    p_v_scale,  # of the first key's tile, or anything
    p_mask,  # at the first key
    at_k,  # [DP, 64], where a tile's elements lie
    at_v,  # [64, DP]
    at_mask,  # [1 or BLOCK_M, 64]
    stride_vn,
    stride_mn,
    EDGE: tl.constexpr,  # tiles with keys that are outside, or in the future
    D: tl.constexpr,
    DP: tl.constexpr,
    PV: tl.constexpr,
    P_RANGE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILED: tl.constexpr,
    BY_TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of the online softmax; the pointers come back at the first key after them.

    Pointers are scalars: before Triton 3.8 each of a tile's would be kept through the loop.
    """
    INT8: tl.constexpr = PV == "int8" or PV == "uint8"
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, DP)
    tile = tl.full([], BLOCK_N, tl.int64)
    for n in tl.range(start, stop, BLOCK_N):
        inside = n + o_n < k_len
        k = _load_tile(p_k + at_k, o_d[:, None] < DP, inside[None, :], False, EDGE)
        fence_copies()
        s = int_to_float(tl.dot(q, k), SHIFT)
        if K_BLOCK % BLOCK_N == 0:
            s *= tl.load(p_k_scale + n // K_BLOCK)
        else:
            p_scale = p_k_scale + (n + o_n) // K_BLOCK
            s *= _load_tile(p_scale, inside, inside, EDGE, False)[None, :]
        if EDGE:
            visible = inside[None, :]
            if CAUSAL:
                visible = visible & (n + o_n[None, :] <= o_m[:, None])
            s = tl.where(visible, s, -float("inf"))
        if MASK == 1:
            seen = _load_mask(p_mask + at_mask, n + o_n < mask_len, EDGE)
            s = tl.where(seen != 0, s, -float("inf"))
        if MASK == 2:
            bias = _load_mask(p_mask + at_mask, n + o_n < mask_len, EDGE).to(tl.float32)
            clamped = tl.minimum(tl.maximum(bias * _LOG2E, _MASK_FLOOR), -_MASK_FLOOR)
            s = s * q_scale[:, None] + tl.where(bias == -float("inf"), bias, clamped)
            tile_top = tl.max(s, 1)
        elif INT8:
            tile_top = multiply_up(tl.max(s, 1), q_scale)
        else:
            tile_top = tl.max(s, 1) * q_scale
        new_top = tl.maximum(top, tile_top)
        now, before = new_top, top
        if INT8:
            # P relative to the tile's own maximum fills its codes, whatever came before.
            now, before = tl.maximum(tile_top, new_top - _LAG), reference
            reference = now
        # 0 for a row that saw no key yet: exponents stay defined.
        safe = tl.where(now == -float("inf"), 0.0, now) if MASK else now
        alpha = tl.exp2(before - safe)
        # Rounded up, so that no code is beyond its byte, however large the scores are.
        shift = subtract_up(safe, P_RANGE) if INT8 else safe - P_RANGE
        if MASK == 2:
            p = tl.exp2(s - shift[:, None])
        else:
            p = tl.exp2(s * q_scale[:, None] - shift[:, None])
        if INT8 and not rounds_up():
            p = tl.minimum(p, 255.0 if PV == "uint8" else 127.0)
        seen_total = tl.sum(p, 1)
        fence_copies()
        if PV == "half":
            v = _load_tile(p_v + at_v, inside[:, None], o_d[None, :] < D, EDGE, D != DP)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        else:
            # Transposed V is padded to whole tiles with zeros.
            v = _load_tile(p_v + at_v, inside[:, None], o_d[None, :] < D, False, D != DP)
            if INT8:
                if PV == "uint8":
                    added = tl.load(p_sums + o_d, mask=o_d < D, other=0).to(tl.int32) * 128
                    base = tl.broadcast_to(added[None, :], acc.shape)
                    product = tl.dot(round_from(p, -128.0).to(tl.int8), v, base, out_dtype=tl.int32)
                    p_sums += D
                else:
                    product = tl.dot(round_to_int(p).to(tl.int8), v)
                summed = int_to_float(product, SHIFT)
                if BY_TILE:
                    scale = tl.load(p_v_scale + o_d, mask=o_d < D, other=0.0)
                    summed *= scale[None, :]
                    p_v_scale += D
                acc = acc * alpha[:, None] + summed
            else:
                # A fresh accumulator per tile, joined by an fma that the compiler cannot fold back
                # into the product: Ada and Hopper keep 14 bits of a float32 sum of FP8 products.
                FAST: tl.constexpr = PV == "fp8-fast"
                product = tl.dot(to_e4m3(p), v, out_dtype=tl.float16 if FAST else tl.float32)
                beta = alpha
                if TILED:
                    # acc goes over to this tile's units, in the factor that it takes anyway.
                    beta = alpha * (factor * tl.load(p_tiles + 1))
                    factor = tl.load(p_tiles)
                    p_tiles += 2
                acc = tl.fma(acc, tl.broadcast_to(beta[:, None], acc.shape), product.to(tl.float32))
        total = total * alpha + seen_total
        top = new_top
        p_k += BLOCK_N * DP
        p_v += tile * stride_vn
        if MASK:
            p_mask += tile * stride_mn
    return acc, total, top, reference, p_k, p_v, p_sums, p_tiles, factor, p_v_scale, p_mask


@triton.jit
def _place(blocks, heads, group, CAUSAL: tl.constexpr):
    """Which head and which query block this program has."""
    i_m = tl.program_id(0) % blocks
    if CAUSAL:
        i_m = blocks - 1 - i_m  # the longest first
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    return i_bh, i_b, i_h, i_b * (heads // group) + i_h // group, i_m


@triton.jit
def _attention_fwd_kernel(
    p_q,  # [B, H, Lq, DP] int8
    p_k,  # [B, Hkv, Lk, DP] int8
    p_v,  # [B, Hkv, Lk, D] half, or [B, Hkv, D, Lp] int8 or E4M3
    p_q_scale,  # [B, H, ceil(Lq / Q_BLOCK)]
    p_k_scale,  # [B, Hkv, ceil(Lk / K_BLOCK)]
    p_v_scale,  # [B, Hkv, D], or None
    p_v_scales,  # [B, Hkv, Lp / 64, D], or None
    p_v_mean,  # [B, Hkv, D], or None
    p_v_sums,  # [B, Hkv, Lp / 64, D] int16, of an unsigned P only
    p_v_tiles,  # [B, Hkv, Lp / 64 + 2, 2], or None
    p_mask,  # uint8 or float, or None
    p_out,  # [B, H, Lq, D]
    p_lse,  # [B, H, Lq], or None
    heads,
    group,  # query heads of a KV head
    blocks,  # of BLOCK_M query rows
    q_len,
    k_len,
    mask_len,  # columns of the mask: k_len, or more
    q_groups,
    k_groups,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    D: tl.constexpr,
    DP: tl.constexpr,
    PV: tl.constexpr,  # "half", "int8", "uint8" (an unsigned P), "fp8", "fp8-fast"
    P_RANGE: tl.constexpr,
    Q_BLOCK: tl.constexpr,  # tokens of a scale
    K_BLOCK: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 boolean, 2 additive
    MASK_ROWS: tl.constexpr,  # the mask differs from query to query
    CAUSAL: tl.constexpr,
    SHIFT: tl.constexpr,
    FAR: tl.constexpr,  # a tile of V spans 2^31 elements
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # always TILE_N: part of the numerics
):
    i_bh, i_b, i_h, i_bkv, i_m = _place(tl.cdiv(q_len, BLOCK_M), heads, group, CAUSAL)
    rows, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DP)
    o_row = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i_m * BLOCK_M)
    p_q += (i_bh * q_len + i_m * BLOCK_M) * DP
    at = tl.arange(0, BLOCK_M)[:, None] * DP + o_d[None, :]
    q = tl.load(p_q + at, mask=rows[:, None] < q_len, other=0)
    q_scale = tl.load(p_q_scale + i_bh * q_groups + (i_m * BLOCK_M + o_row) // Q_BLOCK)
    o_n = tl.arange(0, BLOCK_N)
    p_k += i_bkv * k_len * DP
    at_k = o_n[None, :] * DP + o_d[:, None]
    p_k_scale += i_bkv * k_groups
    p_v += i_b * stride_vb + (i_h // group) * stride_vh
    OFFSET: tl.constexpr = tl.int64 if FAR else tl.int32
    at_v = o_n[:, None].to(OFFSET) * stride_vn + o_d[None, :].to(OFFSET) * stride_vd
    at_mask = o_n[None, :] * stride_mn
    if MASK:
        p_mask += i_b * stride_mb + i_h * stride_mh + i_m.to(tl.int64) * BLOCK_M * stride_mm
        if MASK_ROWS:
            at_mask += o_row[:, None] * stride_mm
    else:
        p_mask = p_k_scale  # before Triton 3.7 a jit function can't return None

    p_sums = p_k_scale
    if PV == "uint8":
        p_sums = p_v_sums + i_bkv * tl.cdiv(k_len, BLOCK_N) * D
    TILED: tl.constexpr = p_v_tiles is not None
    p_tiles, factor = p_k_scale, tl.full([], 1.0, tl.float32)
    if TILED:
        p_tiles = p_v_tiles + i_bkv * ((tl.cdiv(k_len, BLOCK_N) + 2) * 2)

    BY_TILE: tl.constexpr = p_v_scales is not None
    p_scale = p_k_scale
    if BY_TILE:
        p_scale = p_v_scales + i_bkv * tl.cdiv(k_len, BLOCK_N) * D

    acc = tl.zeros([BLOCK_M, DP], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    INT8: tl.constexpr = PV == "int8" or PV == "uint8"
    reference = top if INT8 else factor
    whole, stop = k_len // BLOCK_N * BLOCK_N, k_len
    if CAUSAL:
        whole = tl.minimum(whole, (i_m * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
        stop = tl.minimum(k_len, (i_m + 1) * BLOCK_M)
    for EDGE in tl.static_range(2):
        acc, total, top, reference, p_k, p_v, p_sums, p_tiles, factor, p_scale, p_mask = (
            _attend_range(
                acc,
                total,
                top,
                reference,
                q,
                q_scale,
                rows,
                whole * EDGE,
                stop if EDGE else whole,
                k_len,
                mask_len,
                p_k,
                p_k_scale,
                p_v,
                p_sums,
                p_tiles,
                factor,
                p_scale,
                p_mask,
                at_k,
                at_v,
                at_mask,
                stride_vn,
                stride_mn,
                EDGE,
                D,
                DP,
                PV,
                P_RANGE,
                K_BLOCK,
                MASK,
                CAUSAL,
                TILED,
                BY_TILE,
                SHIFT,
                BLOCK_N,
            )
        )

    # The same again, from an argument of which the compiler can't know that it is the same: kept
    # from the kernel's begin to its end, these would cost registers in the loops.
    i_bh, i_b, i_h, i_bkv, i_m = _place(blocks, heads, group, CAUSAL)
    rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    out = acc * (factor / total if TILED else 1.0 / total)[:, None]
    in_d, i_d = o_d < D, i_bkv * D + o_d
    if p_v_scale is not None:
        out *= tl.load(p_v_scale + i_d, mask=in_d, other=0.0)[None, :]
    if p_v_mean is not None:
        out += tl.load(p_v_mean + i_d, mask=in_d, other=0.0)[None, :]
    out = tl.where(seen[:, None], out, 0.0)
    p_out += (i_bh * q_len + i_m * BLOCK_M) * D
    at = tl.arange(0, BLOCK_M)[:, None] * D + o_d[None, :]
    inside = (rows[:, None] < q_len) & in_d[None, :]
    tl.store(p_out + at, to_output(out, p_out), mask=inside)
    if p_lse is not None:
        of = reference if INT8 else top
        lse = tl.where(seen, (of + (tl.log2(total) - P_RANGE)) / _LOG2E, -float("inf"))
        tl.store(p_lse + i_bh * q_len + rows, lse, mask=rows < q_len)


def attend_quantized(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: Tensor | QuantizedValue,
    *,
    delta_s: Tensor | None = None,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    fp16_accumulator: bool = False,
    unsigned_p: bool = False,
    out_dtype: torch.dtype = torch.float32,
    return_lse: bool = True,
    launch: tuning.Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.reference.attend_quantized`, in one launch.

    Args:
        q: INT8; its scales must be positive.  FP4 goes to :func:`.triton_fp4.attend_quantized`.
        k: as q.
        v: any float, or INT8 or FP8.
        delta_s, bias: must be None, the INT8 kernel adds nothing to S.
        unsigned_p: as of the twin; ``v`` must have sums.
        out_dtype: of the output.
        return_lse: otherwise the log-sum-exp is not computed and None is returned.
        launch: instead of the one for the card and head dim.

    Raises:
        ValueError: a format that the kernel does not read, no sums, or ``delta_s``.
    """
    if q.precision is Precision.FP4 and isinstance(v, QuantizedValue):
        return triton_fp4.attend_quantized(
            q,
            k,
            v,
            delta_s=delta_s,
            bias=bias,
            mask=mask,
            is_causal=is_causal,
            fp16_accumulator=fp16_accumulator,
            out_dtype=out_dtype,
            return_lse=return_lse,
            launch=launch,
        )
    for name, x in (("q", q), ("k", k)):
        if x.precision is not Precision.INT8:
            raise ValueError(f"{name} must be int8, got {x.precision.value}")
    if delta_s is not None or bias is not None:
        raise ValueError("delta_s must be None: smooth_q is not part of this kernel")
    batch, heads, q_len, dim = q.data.shape
    kv_heads, k_len = k.data.shape[1:3]
    device = q.data.device
    *values, head_dim, v_strides, pv = as_read(v, fp16_accumulator, unsigned_p)
    codes, v_scale, v_mean, v_sums, v_tiles = values
    by_tile = v_scale is not None and v_scale.ndim == 4
    kind, strides, mask_len = 0, [0, 0, 0, 0], k_len
    if mask is not None:
        kind, mask = as_tiles(mask, k_len)
        mask_len = mask.shape[-1]
        mask = mask.expand(batch, heads, q_len, mask_len)
        strides = list(mask.stride())
    reads = "" if mask is None else "rows" if strides[2] else "keys"
    config = tuning.launch(tuning.architecture(device), dim, reads, launch, pv.lstrip("u"))
    out, lse = outputs(q, head_dim, out_dtype, return_lse)
    blocks = cdiv(q_len, config.block_m)
    with torch.cuda.device_of(q.data):
        start_kernel(
            _attention_fwd_kernel,
            (blocks * batch * heads,),
            q.data.contiguous(),  # as our quantizers leave them; the twin keeps its input's order
            k.data.contiguous(),
            codes,
            q.scale.contiguous(),
            k.scale.contiguous(),
            None if by_tile else v_scale,
            v_scale if by_tile else None,
            v_mean,
            v_sums,
            v_tiles,
            mask,
            out,
            lse,
            heads,
            heads // kv_heads,
            blocks,
            q_len,
            k_len,
            mask_len,
            q.scale.shape[2],
            k.scale.shape[2],
            *v_strides,
            *strides,
            D=head_dim,
            DP=dim,
            PV=pv,
            P_RANGE=_P_RANGE[pv],
            Q_BLOCK=q.block,
            K_BLOCK=k.block,
            MASK=kind,
            MASK_ROWS=strides[2] != 0,
            CAUSAL=is_causal,
            SHIFT=config.shift,
            FAR=TILE_N * v_strides[2] + dim * v_strides[3] >= 2**31,
            BLOCK_M=config.block_m,
            BLOCK_N=TILE_N,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse


attention = attention_of(tuning.KERNELS)
