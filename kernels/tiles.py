"""Triton helpers that more than one kernel uses."""

from __future__ import annotations

import triton
import triton.language as tl

#: 1.5 * 2^23: adding it leaves a float32's integer part, rounded half to even, in the low bits.
_SHIFT = tl.constexpr(12582912.0)
_SHIFT_BITS = tl.constexpr(0x4B400000)

_HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def round_to_int(x):
    """float32 -> int32, half to even; ``|x|`` at most 2^22."""
    return (x + _SHIFT).to(tl.int32, bitcast=True) - _SHIFT_BITS


@triton.jit
def round_even(x):
    """float32 -> float32, half to even; ``|x|`` at most 2^22."""
    return (x + _SHIFT) - _SHIFT


@triton.jit
def int_to_float(x, SHIFT: tl.constexpr):
    """int32 -> float32.

    With ``SHIFT`` (``|x|`` at most 2^22) by an integer and a float addition: sm_80 converts on its
    special-function unit, at a quarter of their rate.
    """
    if SHIFT:
        return (x + _SHIFT_BITS).to(tl.float32, bitcast=True) - _SHIFT
    return x.to(tl.float32)


@triton.jit
def to_output(x, p_out):
    """float32 -> what ``p_out`` points to; in half its largest number where it would overflow.

    Rounded weights may add up to more than one.  NaN stays NaN.
    """
    if p_out.dtype.element_ty == tl.float16:
        x = tl.maximum(x, -_HALF_MAX, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, _HALF_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(p_out.dtype.element_ty)


@triton.jit
def stored_token(position):
    """Token at a position of a permuted V, within each 32 (``quantize.permute.token_order``)."""
    return (position & ~15) | ((position & 2) << 2) | ((position >> 1) & 6) | (position & 1)
