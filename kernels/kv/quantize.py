"""Codes of keys and values in groups: min-max, ternary and sign.

``x ~= code * step + zero``.  A group is ``group`` channels of one token ("token") or ``group``
tokens of one channel ("channel"); keys have outlier channels and want the second, values the first
(KIVI, 2402.02750).  Steps and zeros are stored in 16 or in 8 bits, and codes are chosen for what is
stored:

=====  =====================================  ===================
form   step                                   zero
=====  =====================================  ===================
fp16   float16                                float16
fp8    uint8: float16's bits 14 to 7 (E5M3)   E4M3 of zero / step
=====  =====================================  ===================

Both are rounded to nearest, but in 8 bits not so that an end of the range would lie more than half
a step beyond the levels: then the zero goes down, the step up.  No value is further than half a
step from its level, and the largest ones, which carry the attention, are not cut off.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .layout import TERNARY, Width, levels

Axis = Literal["token", "channel"]
Form = Literal["fp16", "fp8"]

#: Smallest step: float16's smallest number, and E5M3's.
_TINY = {"fp16": 2.0**-24, "fp8": 2.0**-17}

#: Largest number of float16 and of E5M3, and of E4M3.
_LARGEST = {"fp16": 65504.0, "fp8": 61440.0}
_LAST_E4M3 = 448.0

#: The code of E5M3's largest finite number.
_LAST_E5M3 = 0xF7

#: Times that a step of 8 bits is made one unit (1/8 or less) wider, at most.
_WIDENINGS = 8


class Groups(NamedTuple):
    """Codes with their steps and zeros; G is the number of groups of a row or column.

    Attributes:
        codes: ``[..., T, D]`` uint8.
        step: ``[..., T, G]`` (per token) or ``[..., G, D]`` (per channel), float16, or uint8 in the
            form of 8 bits.
        zero: the same shape, float16 or float8_e4m3fn; None where it follows from the step
            (:func:`is_symmetric`).
    """

    codes: Tensor
    step: Tensor
    zero: Tensor | None


def is_symmetric(width: Width) -> bool:
    """Whether zero is ``-step * (levels - 1) / 2``: ternary codes and signs."""
    return width in (TERNARY, 1)


def quantize(x: Tensor, width: Width, axis: Axis, group: int, form: Form = "fp16") -> Groups:
    """Quantize in groups.

    Min-max; of ternary the scale and threshold of least squared error, of 1 bit the sign and the
    mean magnitude, which is that of least squared error too.

    Args:
        x: ``[..., T, D]`` floating, finite.
        width: bits of a code, or "ternary".
        axis: "token", groups of channels, or "channel", groups of tokens.
        group: channels or tokens of a group, a divisor of D or T.
        form: of steps and zeros.

    Raises:
        ValueError: an argument is not one of those, or the group does not divide.
    """
    if form not in _TINY:
        raise ValueError(f"form must be fp16 or fp8, got {form!r}")
    parts = _split(x.float(), axis, group)
    dim = -1 if axis == "token" else -2
    top = levels(width) - 1
    zero = None
    if width == TERNARY:
        step = _encode_step(_ternary_scale(parts, dim), form)
    elif is_symmetric(width):
        step = _encode_step(2.0 * parts.abs().mean(dim), form)
    else:
        step, zero = minmax(parts.amin(dim), parts.amax(dim), top, form)
    scale, offset = (one.unsqueeze(dim) for one in decode(step, zero, width))
    # The quotient of the smallest steps may overflow; clamping gives what it should.
    codes = ((parts - offset) / scale).round_().clamp_(0, top).to(torch.uint8)
    flat = -2 if axis == "token" else -3
    return Groups(codes.flatten(flat, flat + 1), step, zero)


def dequantize(groups: Groups, width: Width, axis: Axis) -> Tensor:
    """``[..., T, D]`` float32."""
    step, zero = decode(groups.step, groups.zero, width)
    dim = -1 if axis == "token" else -2
    count = max(1, groups.step.shape[dim])
    parts = _split(groups.codes.float(), axis, groups.codes.shape[dim] // count)
    flat = -2 if axis == "token" else -3
    return torch.addcmul(zero.unsqueeze(dim), parts, step.unsqueeze(dim)).flatten(flat, flat + 1)


def decode(step: Tensor, zero: Tensor | None, width: Width) -> tuple[Tensor, Tensor]:
    """Steps and zeros as float32."""
    if step.dtype == torch.uint8:
        step = (step.to(torch.int16) << 7).view(torch.float16)
    scale = step.float()
    if zero is None:
        return scale, scale * (-0.5 * (levels(width) - 1))
    return scale, zero.float() * scale if zero.dtype == torch.float8_e4m3fn else zero.float()


def _split(x: Tensor, axis: Axis, group: int) -> Tensor:
    """``[..., T, G, group]`` (token) or ``[..., G, group, D]`` (channel)."""
    if axis not in ("token", "channel"):
        raise ValueError(f"axis must be token or channel, got {axis!r}")
    dim, name = (-1, "channels") if axis == "token" else (-2, "tokens")
    size = x.shape[dim]
    if group < 1 or size % group:
        raise ValueError(f"group must divide the {size} {name}, got {group}")
    return x.unflatten(dim, (size // group, group))


def minmax(low: Tensor, high: Tensor, top: int, form: Form) -> tuple[Tensor, Tensor]:
    """Steps and zeros, as they are stored, of groups from ``low`` to ``high``.

    Args:
        low, high: float32 of one shape.
        top: the highest code; 0 is the lowest.
    """
    if form == "fp16":
        zero = low.clamp(-65504.0, 65504.0).half()
        return _encode_step((high - low) / top, form), zero
    # A zero that is too many steps away is out of E4M3's reach: wider steps bring it nearer.
    step = _encode_step(torch.maximum((high - low) / top, low.abs() / _LAST_E4M3), form)
    zero = _e4m3(low / decode(step, None, 2)[0])
    for _ in range(_WIDENINGS):
        scale, offset = decode(step, zero, 2)
        cut = high - offset - top * scale > scale / 2
        step = (step + cut.to(torch.uint8)).clamp_(max=_LAST_E5M3)
        zero = _e4m3(low / decode(step, None, 2)[0])
    return step, zero


def _ternary_scale(parts: Tensor, dim: int) -> Tensor:
    """Mean of the k largest magnitudes, k of least squared error ``sum x^2 - (sum of k)^2 / k``."""
    sums = parts.abs().sort(dim, descending=True).values.cumsum(dim)
    shape = [1] * parts.dim()
    shape[dim] = -1
    counts = torch.arange(1, parts.shape[dim] + 1, device=parts.device).view(shape)
    best = (sums * sums / counts).argmax(dim, keepdim=True)
    return (sums.gather(dim, best) / (best + 1)).squeeze(dim)


def _encode_step(step: Tensor, form: Form) -> Tensor:
    step = step.clamp(_TINY[form], _LARGEST[form])
    if form == "fp16":
        return step.half()
    half = step.half().view(torch.int16)
    return ((half.to(torch.int32) + 64) >> 7).clamp_(max=_LAST_E5M3).to(torch.uint8)


def _e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 number; the one below where that is more than 1/2, half a step, above."""
    x = x.clamp(-_LAST_E4M3, _LAST_E4M3)
    near = x.to(torch.float8_e4m3fn)
    code = near.view(torch.uint8).to(torch.int16)
    # So far from 0 that codes are neighbours: the one below is larger if negative, else smaller.
    below = torch.where(code >= 128, code + 1, code - 1)
    code = torch.where(near.float() - x > 0.5, below, code)
    return code.to(torch.uint8).view(torch.float8_e4m3fn)
