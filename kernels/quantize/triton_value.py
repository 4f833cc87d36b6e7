"""The quantizer of V in Triton, bit-exact with :mod:`.reference` given the same means.

It is split from the one of Q and K (:mod:`.triton`), whose rules on offsets, masked loads and FP
fusion it shares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from ..spec import AttentionSpec
from ..start import start_kernel
from ..tiles import round_to_int, stored_token
from ..versions import to_e4m3
from .limits import (
    CLIP_CANDIDATES,
    FP8_FAST_VALUE_MAX,
    LARGEST_TILE,
    SMALLEST_TILE,
    code_top,
    value_options,
)
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
_TILE_N = tl.constexpr(TILE_N)
_SMALLEST_TILE, _LARGEST_TILE = tl.constexpr(SMALLEST_TILE), tl.constexpr(LARGEST_TILE)
_MAX_SCALE, _MIN_SCALE = tl.constexpr(MAX_SCALE), tl.constexpr(MIN_SCALE)


def shares(precision: Precision, clip: bool) -> tuple[float, ...]:
    """Candidates of clipping; FP4 always has one."""
    if clip and precision in (Precision.INT4, Precision.FP4):
        return CLIP_CANDIDATES
    return (1.0,) if precision is Precision.FP4 else ()


def kernel_options(spec: AttentionSpec, permuted: bool) -> dict[str, bool]:
    """:func:`.limits.value_options`, and what a kernel adds."""
    return {
        **value_options(spec),
        # With V's tokens in its own order a kernel multiplies P's bytes as they are.
        "sums": spec.unsigned_p and not permuted,
        "permuted": permuted,
    }


@triton.jit
def scale_of(amax, INVERSE_TOP: tl.constexpr):
    scale = amax * INVERSE_TOP
    return tl.where(scale < _MIN_SCALE, 1.0, tl.minimum(scale, _MAX_SCALE))


@triton.jit
def _round_up(scale):
    """The next bfloat16 that is not below a positive float32."""
    return ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _channel_position(channel):
    """Where a channel's scale stands in a tile's list (``permute.channel_order``)."""
    return (channel & ~31) | ((channel & 6) << 2) | ((channel & 24) >> 2) | (channel & 1)


class Value(NamedTuple):
    """V as a program finds it, and where its codes go."""

    p_x: Any
    p_mean: Any  # [B, H, D], or None
    p_low: Any  # [B, H, D], the extremes of every channel, or None
    p_high: Any
    p_codes: Any  # [B, H, D, bytes of Lp]
    p_scale: Any  # [B, H, D], given if there are no extremes; or of tiles
    p_micro: Any  # [B, H, Lp / 64, D, 4], FP4 only
    p_sums: Any  # [B, H, Lp / 64, D], or None
    p_tiles: Any  # [B, H, Lp / 64 + 2, 2], or None
    length: Any
    heads: Any
    stride_b: Any
    stride_h: Any
    stride_l: Any
    stride_d: Any


@triton.jit
def value_program(
    v,  # Value
    program,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOP: tl.constexpr,
    FORMAT: tl.constexpr,  # "int8", "fp8", "fp4"
    SHARES: tl.constexpr,  # candidates of clipping, FP4 only
    PERMUTED: tl.constexpr,
    BY_TILE: tl.constexpr,  # scales of these tokens; a program has all channels
):
    """Quantize 64 tokens of some channels of V, and transpose them."""
    tiles = tl.cdiv(v.length, _TILE_N)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D  # of channels, side by side in the grid
    i_d, i_tile = program % CHUNKS, program // CHUNKS
    i_l, i_bh = i_tile % tiles, (i_tile // tiles).to(tl.int64)
    o_l, o_d = tl.arange(0, _TILE_N), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    if PERMUTED:
        o_l = fp4_token(o_l) if FORMAT == "fp4" else stored_token(o_l)
    o_l += i_l * _TILE_N
    p_x = v.p_x + (i_bh // v.heads) * v.stride_b + (i_bh % v.heads) * v.stride_h
    x, inside = load_rows(p_x, o_l, o_d, v.length, v.stride_l, v.stride_d, D)
    at = i_bh * D + o_d
    if v.p_mean is not None:
        mean = tl.load(v.p_mean + at, mask=o_d < D, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)
    if BY_TILE:
        scale = _round_up(scale_of(tl.max(tl.abs(x), 0), 1.0 / TOP))
        if PERMUTED:
            p_scale = v.p_scale + (i_bh * tiles + i_l) * BLOCK_D + _channel_position(o_d)
            tl.store(p_scale, scale.to(tl.bfloat16))
        else:
            tl.store(v.p_scale + (i_bh * tiles + i_l) * D + o_d, scale, mask=o_d < D)
    elif v.p_low is not None:
        low = tl.load(v.p_low + at, mask=o_d < D, other=0.0)
        high = tl.load(v.p_high + at, mask=o_d < D, other=0.0)
        if v.p_mean is not None:
            # Rounding is monotone: the largest |x - mean| is at one of the extremes, bit for bit.
            low, high = low - mean, high - mean
        scale = scale_of(tl.maximum(tl.abs(low), tl.abs(high)), 1.0 / TOP)
        if i_l == 0:
            tl.store(v.p_scale + at, scale, mask=o_d < D)
    else:
        scale = tl.load(v.p_scale + at, mask=o_d < D, other=1.0)
    x = x * tl.div_rn(1.0, scale)[None, :]
    if v.p_tiles is not None:
        factor = tl.max(tl.max(tl.abs(x), 1), 0) * (1.0 / TOP)
        factor = tl.minimum(tl.maximum(factor, _SMALLEST_TILE), _LARGEST_TILE)
        inverse = tl.div_rn(1.0, factor)
        x *= inverse
        p_tile = v.p_tiles + (i_bh * (tiles + 2) + i_l) * 2
        tl.store(p_tile, factor)
        tl.store(p_tile + 1, inverse)
        if i_l == 0:
            nothing = v.p_tiles + (i_bh * (tiles + 2) + tiles) * 2 + tl.arange(0, 4)
            tl.store(nothing, tl.full([4], 1.0, tl.float32))
    codes = tl.trans(x)  # [BLOCK_D, 64]
    PER_BYTE: tl.constexpr = 2 if FORMAT == "fp4" else 1
    WIDTH: tl.constexpr = _TILE_N // PER_BYTE
    in_d = o_d[:, None] < D
    p_tile = v.p_codes + i_bh * D * (tiles * WIDTH) + i_l * WIDTH
    p_tile = p_tile + (o_d[:, None].to(tl.int64) * (tiles * WIDTH) + tl.arange(0, WIDTH)[None, :])
    if FORMAT == "fp4":
        GROUPS: tl.constexpr = _TILE_N // _GROUP
        codes, micro = fp4_groups(tl.reshape(codes, [BLOCK_D * GROUPS, _GROUP]), SHARES)
        tl.store(p_tile, pack_codes(codes, BLOCK_D, WIDTH), mask=in_d)
        p_micro = v.p_micro + (i_bh * tiles + i_l) * (D * GROUPS)
        of_group = o_d[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        tl.store(p_micro + of_group, tl.reshape(micro, [BLOCK_D, GROUPS]), mask=in_d)
    else:
        codes = tl.minimum(tl.maximum(codes, -TOP), TOP)
        if FORMAT == "fp8":
            tl.store(p_tile, to_e4m3(codes), mask=in_d)
        else:
            codes = round_to_int(codes)
            tl.store(p_tile, codes.to(tl.int8), mask=in_d)
            if v.p_sums is not None:
                added = tl.sum(codes, 1).to(tl.int16)
                tl.store(v.p_sums + (i_bh * tiles + i_l) * D + o_d, added, mask=o_d < D)


@triton.jit
def _quantize_value_kernel(
    p_x,  # as of Value
    p_mean,
    p_low,
    p_high,
    p_codes,
    p_scale,
    p_micro,
    p_sums,
    p_tiles,
    length,
    heads,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOP: tl.constexpr,
    FORMAT: tl.constexpr,
    SHARES: tl.constexpr,
    PERMUTED: tl.constexpr,
    BY_TILE: tl.constexpr,
):
    v = Value(
        p_x,
        p_mean,
        p_low,
        p_high,
        p_codes,
        p_scale,
        p_micro,
        p_sums,
        p_tiles,
        length,
        heads,
        stride_b,
        stride_h,
        stride_l,
        stride_d,
    )
    value_program(v, tl.program_id(0), D, BLOCK_D, TOP, FORMAT, SHARES, PERMUTED, BY_TILE)


def value_arguments(
    v: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None,
    scale: Tensor | ChannelStats | None,
    fast: bool,
    clip: bool,
    sums: bool,
    permuted: bool,
) -> tuple[QuantizedValue, Value, dict[str, Any], int]:
    """What :func:`quantize_value` returns, not written yet, and what writes it.

    Args:
        v, precision, mean, fast, clip, sums, permuted: as there.
        scale: given, or what it comes from; None where every tile finds its own.

    Returns:
        The result, :class:`Value`, the constants of :func:`value_program`, and its programs.
    """
    batch, heads, length, head_dim = v.shape
    tiles, device = cdiv(length, TILE_N), v.device
    shape = (batch, heads, head_dim, padded_length(length) * precision.bits // 8)
    codes = torch.empty(shape, dtype=STORAGE[precision], device=device)
    micro = added = factors = low = high = None
    if sums:
        added = torch.empty(batch, heads, tiles, head_dim, dtype=torch.int16, device=device)
    if precision is Precision.FP4:
        groups = (batch, heads, tiles, head_dim, TILE_N // FP4_GROUP)
        micro = torch.empty(groups, dtype=torch.float8_e4m3fn, device=device)
    by_tile = scale is None
    if scale is None:
        width, kind = head_dim, torch.float32
        if permuted:
            width, kind = padded_dim(head_dim), torch.bfloat16
        scale = torch.empty(batch, heads, tiles, width, dtype=kind, device=device)
    elif isinstance(scale, ChannelStats):
        low, high = scale.low, scale.high
        scale = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=device)
    elif fast:
        factors = torch.empty(batch, heads, tiles + 2, 2, dtype=torch.float32, device=device)
    mean = None if mean is None else mean.contiguous()
    value = Value(
        v, mean, low, high, codes, scale, micro, added, factors, length, heads, *v.stride()
    )
    # FP4's search needs registers for 64 channels at a time.
    block_d = 64 if precision is Precision.FP4 else padded_dim(head_dim)
    constants = {
        "D": head_dim,
        "BLOCK_D": block_d,
        "TOP": FP8_FAST_VALUE_MAX if fast else code_top(precision),
        "FORMAT": precision.value,
        "SHARES": shares(precision, clip),
        "PERMUTED": permuted,
        "BY_TILE": by_tile,
    }
    result = QuantizedValue(codes, scale, precision, length, mean, micro, added, factors)
    return result, value, constants, tiles * batch * heads * cdiv(head_dim, block_d)


def quantize_value(
    v: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    fast: bool = False,
    clip: bool = False,
    sums: bool = False,
    permuted: bool = False,
    by_tile: bool = False,
    stats: ChannelStats | None = None,
) -> QuantizedValue:
    """As :func:`.reference.quantize_value`, for INT8, FP8 and FP4.

    Args:
        permuted: store tokens and scales of tiles as :func:`.permute.permute_value` does; FP4
            must be.
        stats: V's :func:`channel_stats` where they are known; saves one pass over V.

    Raises:
        ValueError: another precision, or FP4 that is not permuted.
    """
    if precision not in (Precision.INT8, Precision.FP8, Precision.FP4):
        raise ValueError(f"precision must be int8, fp8 or fp4, got {precision.value}")
    if precision is Precision.FP4 and not permuted:
        raise ValueError("permuted must be True for fp4, got False")
    given: Tensor | ChannelStats | None = None
    if not by_tile:
        given = stats if scale is None else scale
        given = extremes(v) if given is None else given
    result, value, constants, programs = value_arguments(
        v,
        precision,
        mean=mean,
        scale=given,
        fast=fast,
        clip=clip,
        sums=sums,
        permuted=permuted,
    )
    with torch.cuda.device_of(v):
        start_kernel(
            _quantize_value_kernel,
            (programs,),
            *value,
            **constants,
            num_warps=8 if clip or constants["BLOCK_D"] > 128 else 4,
            enable_fp_fusion=False,
        )
    return result
