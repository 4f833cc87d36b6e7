"""Frechet distance of two sets of pictures, for reports only: small sets make it very noisy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians fitted to features ``[N, D]`` and ``[M, D]``.

    ``|mean a - mean b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2``.  The last trace is the sum of
    the singular values of ``A^1/2 B^1/2``, and with centred features X and Y of
    ``X Y^T / sqrt((N - 1) (M - 1))``: no square root of a matrix is taken, so covariances of
    deficient rank (N < D) do no harm.

    Raises:
        ValueError: the features differ in width, or a set has fewer than two members.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features must be [N, D] and [M, D], got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"both sets need at least two members, got {len(a)} and {len(b)}")
    x, y = a.double(), b.double()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    x = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    y = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return max(0.0, float(shift + x.square().sum() + y.square().sum() - 2 * cross))


def picture_features(pictures: Tensor, side: int = 4) -> Tensor:
    """Colours of a coarse grid, ``[N, C, H, W]`` -> ``[N, C * side * side]``."""
    return F.adaptive_avg_pool2d(pictures.float(), side).flatten(1)
