"""What a metric adds to the product of latent and code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: l2: ``|z - c|^2`` least; cosine: of the angle, most; dot: ``z . c`` most, no norm (IBQ).
METRICS = ("l2", "cosine", "dot")

#: As in ``torch.nn.functional.normalize``.
SMALLEST_NORM = 1e-12

#: Codes whose squares are held at a time.
_ROWS = 8192


class Terms(NamedTuple):
    """A code's score is ``(z . c) * scale + bias``, the best is the largest.

    Attributes:
        scale: ``[K]`` float32, or None for ones.
        bias: ``[K]`` float32, or None for zeros.
        metric: what they are rounded from, "" if they are given as they are.
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    metric: str = ""

    def exact(self, table: Tensor, code: Tensor, product: Tensor) -> Tensor:
        """Scores of some codes from their products ``z . c`` in float64, ``[P]``."""
        if self.metric == "dot":
            return product
        if self.metric == "l2":
            return product - 0.5 * table[code].double().square().sum(1)
        if self.metric == "cosine":
            return product / table[code].double().norm(dim=1).clamp_(min=SMALLEST_NORM)
        if self.scale is not None:
            product = product * self.scale[code]
        return product if self.bias is None else product + self.bias[code]


def terms(table: Tensor, metric: str) -> Terms:
    """Terms of a metric: ``|z - c|^2`` orders codes as ``|c|^2 / 2 - z . c`` does.

    Args:
        table: ``[K, D]``, floating.
        metric: one of :data:`METRICS`.
    """
    if metric == "dot":
        return Terms(metric="dot")
    squares = torch.cat([rows.float().square().sum(1) for rows in table.split(_ROWS)])
    if metric == "l2":
        return Terms(bias=squares.mul_(-0.5), metric="l2")
    return Terms(scale=squares.sqrt_().clamp_(min=SMALLEST_NORM).reciprocal_(), metric="cosine")
