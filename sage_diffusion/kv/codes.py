"""Codes into words and back, by whoever does it fastest on their device, bit for bit the same."""

from __future__ import annotations

from torch import Tensor

from sage_diffusion.kernels.kv import layout
from sage_diffusion.kernels.kv.layout import Width
from sage_diffusion.kv.columns import Columns
from sage_diffusion.kv.decode import refuse_device


def pack(codes: Tensor, width: Width) -> Tensor:
    """As :func:`sage_diffusion.kernels.kv.layout.pack_checked`."""
    if refuse_device(codes.device) is None:
        from sage_diffusion.kernels.kv import triton

        return triton.pack(codes, width)
    return layout.pack_checked(codes, width)


def unpack(words: Tensor, width: Width, dim: int) -> Tensor:
    """As :func:`sage_diffusion.kernels.kv.layout.unpack`."""
    if refuse_device(words.device) is None:
        from sage_diffusion.kernels.kv import triton

        return triton.unpack(words, width, dim)
    if words.device.type != "cpu":
        return layout.unpack(words, width, dim)
    columns = Columns.of(width, dim)
    return columns.gather(columns.split(words))
