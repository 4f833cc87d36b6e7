"""Whether a method fits a model's layers, and whether its basis pays, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.report import check_constants


class Shape(NamedTuple):
    """K and V of a layer: KV heads, channels of each, and how they come."""

    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


def check(layers: Sequence[Layer], shape: Shape, context: int | None = None) -> None:
    """Fill empty layers, which are good for nothing else, with a few random tokens.

    What a layer takes depends on shapes alone, so a unit of tokens tells what any number will take.

    Args:
        context: tokens at which a basis must save more than it takes; None: any basis will do.

    Raises:
        ValueError: the method does not fit a layer, which is named, or bases do not pay.
    """
    random = torch.Generator().manual_seed(0)

    def fill(layer: Layer, tokens: int) -> None:
        dims = shape.head_dim, shape.value_dim
        k, v = (torch.randn(1, shape.heads, tokens, dim, generator=random) for dim in dims)
        layer.append(k.to(shape.device, shape.dtype), v.to(shape.device, shape.dtype))

    for layer in layers:
        try:
            fill(layer, 1)
        except ValueError as error:
            raise type(error)(f"layer {layer.number} can't be compressed: {error}") from None
    if context is None:
        return
    for layer in layers:
        fill(layer, layer.sink + layer.window + layer.filled().unit)
        layer.settle()
    check_constants(layers, context)
