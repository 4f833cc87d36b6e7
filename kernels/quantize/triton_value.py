"""The quantizer of V in Triton, bit-exact with :mod:`.reference` given the same means.

It is split from the one of Q and K (:mod:`.triton`), whose rules on offsets, masked loads and FP
fusion it shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import (
    FP4_GROUP,
    MAX_SCALE,
    MIN_SCALE,
    TILE_N,
    Precision,
    QuantizedValue,
    cdiv,
    padded_dim,
    padded_length,
)
from ..start import start_kernel
from ..tiles import round_to_int, stored_token
from ..versions import to_e4m3
from .limits import CLIP_CANDIDATES, FP4_MAX, FP8_FAST_VALUE_MAX, FP8_MAX
from .rope import load_rows
from .stats import ChannelStats, extremes
from .triton_fp4 import fp4_groups, fp4_token, pack_codes

STORAGE = {
    Precision.INT8: torch.int8,
    Precision.INT4: torch.uint8,
    Precision.FP8: torch.float8_e4m3fn,
    Precision.FP4: torch.uint8,
}

_GROUP = tl.constexpr(FP4_GROUP)
_MAX_SCALE, _MIN_SCALE = tl.constexpr(MAX_SCALE), tl.constexpr(MIN_SCALE)


def code_top(precision: Precision) -> float:
    """What the largest value of a row or channel becomes."""
    return FP4_MAX * FP8_MAX if precision is Precision.FP4 else precision.qmax


def shares(precision: Precision, clip: bool) -> tuple[float, ...]:
    """Candidates of clipping; FP4 always has one."""
    if clip and precision in (Precision.INT4, Precision.FP4):
        return CLIP_CANDIDATES
    return (1.0,) if precision is Precision.FP4 else ()


@triton.jit
def scale_of(amax, INVERSE_TOP: tl.constexpr):
    scale = amax * INVERSE_TOP
    return tl.where(scale < _MIN_SCALE, 1.0, tl.minimum(scale, _MAX_SCALE))


@triton.jit
def _quantize_value_kernel(
    p_x,
    p_mean,  # [B, H, D], or None
    p_low,  # [B, H, D], the extremes of every channel
    p_high,
    p_codes,  # [B, H, D, bytes of Lp]
    p_scale,  # [B, H, D]
    p_micro,  # [B, H, Lp / 64, D, 4], FP4 only
    p_sums,  # [B, H, Lp / 64, D], or None
    length,
    padded,
    heads,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOP: tl.constexpr,
    FORMAT: tl.constexpr,  # "int8", "fp8", "fp4"
    SHARES: tl.constexpr,  # candidates of clipping, FP4 only
    PERMUTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = padded // BLOCK
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D  # of channels, side by side in the grid
    i_d, i_tile = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    i_l, i_bh = i_tile % blocks, (i_tile // blocks).to(tl.int64)
    o_l, o_d = tl.arange(0, BLOCK), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    if PERMUTED:
        o_l = fp4_token(o_l) if FORMAT == "fp4" else stored_token(o_l)
    o_l += i_l * BLOCK
    p_x += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    x, inside = load_rows(p_x, o_l, o_d, length, stride_l, stride_d, D)
    low = tl.load(p_low + i_bh * D + o_d, mask=o_d < D, other=0.0)
    high = tl.load(p_high + i_bh * D + o_d, mask=o_d < D, other=0.0)
    if p_mean is not None:
        mean = tl.load(p_mean + i_bh * D + o_d, mask=o_d < D, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)
        # Rounding is monotone, so the largest |x - mean| is at one of the extremes, bit for bit.
        low, high = low - mean, high - mean
    scale = scale_of(tl.maximum(tl.abs(low), tl.abs(high)), 1.0 / TOP)
    codes = tl.trans(x * tl.div_rn(1.0, scale)[None, :])  # [BLOCK_D, BLOCK]
    PER_BYTE: tl.constexpr = 2 if FORMAT == "fp4" else 1
    WIDTH: tl.constexpr = BLOCK // PER_BYTE
    p_tile = p_codes + i_bh * D * (padded // PER_BYTE) + i_l * WIDTH
    in_d = o_d[:, None] < D
    at = o_d[:, None].to(tl.int64) * (padded // PER_BYTE) + tl.arange(0, WIDTH)[None, :]
    if FORMAT == "fp4":
        GROUPS: tl.constexpr = BLOCK // _GROUP
        codes, micro = fp4_groups(tl.reshape(codes, [BLOCK_D * GROUPS, _GROUP]), SHARES)
        tl.store(p_tile + at, pack_codes(codes, BLOCK_D, WIDTH), mask=in_d)
        p_micro += (i_bh * blocks + i_l) * (D * GROUPS)
        at = o_d[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        tl.store(p_micro + at, tl.reshape(micro, [BLOCK_D, GROUPS]), mask=in_d)
    else:
        codes = tl.minimum(tl.maximum(codes, -TOP), TOP)
        if FORMAT == "fp8":
            tl.store(p_tile + at, to_e4m3(codes), mask=in_d)
        else:
            codes = round_to_int(codes)
            tl.store(p_tile + at, codes.to(tl.int8), mask=in_d)
            if p_sums is not None:
                added = tl.sum(codes, 1).to(tl.int16)
                tl.store(p_sums + (i_bh * blocks + i_l) * D + o_d, added, mask=o_d < D)
    if i_l == 0:
        tl.store(p_scale + i_bh * D + o_d, scale, mask=o_d < D)


def quantize_value(
    v: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None = None,
    fast: bool = False,
    clip: bool = False,
    sums: bool = False,
    permuted: bool = False,
    stats: ChannelStats | None = None,
) -> QuantizedValue:
    """As :func:`.reference.quantize_value`, for INT8, FP8 and FP4.

    Args:
        permuted: store the tokens as :func:`.permute.permute_value` does; FP4 must be.
        stats: V's :func:`channel_stats` where they are known; saves one pass over V.

    Raises:
        ValueError: another precision, or FP4 that is not permuted.
    """
    if precision not in (Precision.INT8, Precision.FP8, Precision.FP4):
        raise ValueError(f"precision must be int8, fp8 or fp4, got {precision.value}")
    if precision is Precision.FP4 and not permuted:
        raise ValueError("permuted must be True for fp4, got False")
    batch, heads, length, head_dim = v.shape
    low, high = extremes(v) if stats is None else (stats.low, stats.high)
    padded = padded_length(length)
    shape, device = (batch, heads, head_dim, padded * precision.bits // 8), v.device
    codes = torch.empty(shape, dtype=STORAGE[precision], device=device)
    scale = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=device)
    micro = added = None
    if sums:
        tiles = (batch, heads, padded // TILE_N, head_dim)
        added = torch.empty(tiles, dtype=torch.int16, device=device)
    if precision is Precision.FP4:
        micro = torch.empty(
            (batch, heads, padded // TILE_N, head_dim, TILE_N // FP4_GROUP),
            dtype=torch.float8_e4m3fn,
            device=device,
        )
    # FP4's search needs registers for 64 channels at a time.
    block_d = 64 if precision is Precision.FP4 else padded_dim(head_dim)
    chunks = cdiv(head_dim, block_d)
    with torch.cuda.device_of(v):
        start_kernel(
            _quantize_value_kernel,
            (padded // TILE_N * batch * heads * chunks,),
            v,
            None if mean is None else mean.contiguous(),
            low,
            high,
            codes,
            scale,
            micro,
            added,
            length,
            padded,
            heads,
            *v.stride(),
            D=head_dim,
            BLOCK_D=block_d,
            TOP=FP8_FAST_VALUE_MAX if fast else code_top(precision),
            FORMAT=precision.value,
            SHARES=shares(precision, clip),
            PERMUTED=permuted,
            BLOCK=TILE_N,
            num_warps=8 if clip or block_d > 128 else 4,
            enable_fp_fusion=False,
        )
    return QuantizedValue(codes, scale, precision, length, mean, micro, added)
