"""NVFP4 in Triton: E2M1 codes with an E4M3 scale for every 16 values.

Plain arithmetic instead of the conversion instruction of the newest cards: bit-exact with
:mod:`.reference` on every one that knows E4M3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import round_to_int
from ..versions import to_e4m3
from .limits import CLIP_LIMIT, CLIP_RESOLUTION, FP4_MAX, FP8_MAX, FP8_TINY

_CLIP_LIMIT, _CLIP_RESOLUTION = tl.constexpr(CLIP_LIMIT), tl.constexpr(CLIP_RESOLUTION)
_FP4_MAX, _FP8_MAX, _FP8_TINY = (
    tl.constexpr(FP4_MAX),
    tl.constexpr(FP8_MAX),
    tl.constexpr(FP8_TINY),
)
_SHIFT = tl.constexpr(12582912.0)


@triton.jit
def _spacing(magnitude):
    """Distance of the E2M1 numbers around a magnitude: 0.5 below 2, 1 below 4, 2 up to 6."""
    return tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))


@triton.jit
def fp4_magnitude(x):
    """The E2M1 number nearest to ``|x|`` as float32, ties to the even code, 6 beyond."""
    x = tl.minimum(tl.abs(x), _FP4_MAX)
    shift = _spacing(x) * _SHIFT
    return (x + shift) - shift


@triton.jit
def fp4_code(x):
    """float32 -> E2M1 code 0 .. 15 as int32."""
    sign = (x.to(tl.int32, bitcast=True) >> 31) & 8
    x = tl.minimum(tl.abs(x), _FP4_MAX)
    shift = _spacing(x) * _SHIFT
    steps = (x + shift).to(tl.int32, bitcast=True) - shift.to(tl.int32, bitcast=True)
    first = tl.where(x < 2.0, 0, tl.where(x < 4.0, 2, 4))
    return (steps + first) | sign


@triton.jit
def fp4_groups(x, SHARES: tl.constexpr):
    """Codes as int32 and E4M3 scales of ``[N, 16]`` values, of ``reference._encode_fp4_groups``."""
    amax = tl.max(tl.abs(x), 1)
    best = tl.full(amax.shape, float("inf"), tl.float32)
    chosen = tl.full(amax.shape, 1.0, tl.float32)
    for i in tl.static_range(len(SHARES)):
        step = amax * (SHARES[i] / _FP4_MAX)
        step = tl.minimum(tl.maximum(step, _FP8_TINY), _FP8_MAX)
        step = to_e4m3(step).to(tl.float32)
        if len(SHARES) == 1:
            chosen = step
        else:
            scaled = tl.minimum(tl.abs(x * tl.div_rn(1.0, step)[:, None]), _CLIP_LIMIT)
            error = scaled - fp4_magnitude(scaled)
            total = tl.sum(round_to_int(error * error * _CLIP_RESOLUTION), 1)
            cost = total.to(tl.float32) * (step * step)
            better = cost < best
            best = tl.where(better, cost, best)
            chosen = tl.where(better, step, chosen)
    return fp4_code(x * tl.div_rn(1.0, chosen)[:, None]), to_e4m3(chosen)


@triton.jit
def pack_codes(codes, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Codes of 4 bits -> ``[ROWS, BYTES]`` uint8, the lower index in the low nibble."""
    low, high = tl.split(tl.reshape(codes, [ROWS, BYTES, 2]))
    return ((low & 15) | ((high & 15) << 4)).to(tl.uint8)


@triton.jit
def fp4_token(position):
    """Token at a position of a permuted V, within each 32 (``permute.fp4_token_order``)."""
    return (position & ~31) | ((position & 6) << 2) | ((position & 24) >> 2) | (position & 1)
