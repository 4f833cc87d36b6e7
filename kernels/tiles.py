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
def round_from(x, START: tl.constexpr):
    """``round_to_int(x) + START`` at no cost, for an even ``START``."""
    return (x + (_SHIFT + START)).to(tl.int32, bitcast=True) - _SHIFT_BITS


@triton.constexpr_function
def rounds_up():
    """Whether :func:`multiply_up` and :func:`subtract_up` do: on NVIDIA cards."""
    target = tl.target_info.current_target()
    return target is not None and target.backend == "cuda"


@triton.constexpr_function
def adding_up(y):
    """Assembly that adds a constant and rounds up."""
    import struct  # of a module's names only what Triton knows may be used

    return f"add.rp.f32 $0, $1, 0f{struct.unpack('I', struct.pack('f', y))[0]:08X};"


@triton.jit
def multiply_up(x, y):
    """Product, rounded up on NVIDIA cards."""
    if rounds_up():
        return tl.inline_asm_elementwise(
            "mul.rp.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1
        )
    return x * y


@triton.jit
def subtract_up(x, y: tl.constexpr):
    """Difference from a constant, rounded up on NVIDIA cards."""
    if rounds_up():
        return tl.inline_asm_elementwise(adding_up(-y), "=f,f", [x], tl.float32, True, 1)
    return x - y


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
