"""V as the plain Triton kernel reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import Precision, QuantizedValue
from .terms import half_value


class Value(NamedTuple):
    """V as the kernel reads it: codes or halves and what belongs to them, D, the strides of
    ``[B, H, L, D]``, and the formats of P and V.
    """

    data: Tensor
    scale: Tensor | None
    mean: Tensor | None
    sums: Tensor | None
    tiles: Tensor | None
    head_dim: int
    strides: tuple[int, ...]
    format: str


def as_read(v: Tensor | QuantizedValue, fp16_accumulator: bool, unsigned_p: bool) -> Value:
    """V in the format that the product of P and V asks for; ValueError if it has another."""
    found = _codes(v)
    if fp16_accumulator:
        if found.format != "fp8":
            raise ValueError(f"fp16_accumulator needs v in fp8, got {found.format}")
        return found._replace(format="fp8-fast")
    if not unsigned_p:
        return found._replace(sums=None)
    if found.format != "int8" or found.sums is None:
        raise ValueError(f"unsigned_p needs v in int8 with its sums, got {found.format}")
    return found._replace(format="uint8")


def _codes(v: Tensor | QuantizedValue) -> Value:
    if not isinstance(v, QuantizedValue):
        values, scale = v, None
        if v.dtype not in (torch.float16, torch.bfloat16):
            values, scale = half_value(v)
        return Value(values, scale, None, None, None, v.shape[-1], values.stride(), "half")
    if v.precision not in (Precision.INT8, Precision.FP8):
        raise ValueError(f"v must be int8 or fp8, got {v.precision.value}")
    values, mean = v.data.contiguous(), None if v.mean is None else v.mean.contiguous()
    strides = (*values.stride()[:2], 1, values.stride(2))
    pv, scale = v.precision.value, v.scale.contiguous()
    return Value(values, scale, mean, v.sums, v.tiles, values.shape[2], strides, pv)
