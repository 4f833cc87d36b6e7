"""Bases in which K is worth few bits: eigenvectors of its covariance under the gradient's metric.

An error e of K costs about ``e' F e / 2`` nats, F the second moment of the gradient of ``-log p``
(the Fisher metric; labels are drawn from the model itself).  In the eigenbasis of ``F^1/2 C F^1/2``
directions are uncorrelated and their errors add up with the eigenvalues as weights, so that bits
can be dealt out direction by direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Share of F's mean diagonal that is added to it.
DAMPING = 1e-3


@dataclass(frozen=True)
class Basis:
    """Coefficients ``z = (k - mean) @ into`` of about unit variance, and back.

    Attributes:
        mean: ``[d]``.
        into: ``[d, r]``.
        back: ``[r, d]``; ``k ~= mean + z @ back``.
        weights: ``[r]``, what a squared error of 1 in a coefficient costs.
    """

    mean: Tensor
    into: Tensor
    back: Tensor
    weights: Tensor

    def encode(self, k: Tensor) -> Tensor:
        """``[.., d] -> [.., r]``."""
        return (k - self.mean) @ self.into

    def decode(self, z: Tensor) -> Tensor:
        """``[.., r] -> [.., d]``."""
        return torch.addmm(self.mean, z.flatten(0, -2), self.back).unflatten(0, z.shape[:-1])


def eigenbasis(
    mean: Tensor, covariance: Tensor, fisher: Tensor | None = None, heads: int = 1
) -> Basis:
    """The basis of a covariance ``[d, d]`` under a metric ``[d, d]``; plain PCA without one.

    Args:
        heads: 1 for a basis of all channels jointly, or H for one per head (block-diagonal).
    """
    if heads > 1:
        return _join(
            [
                eigenbasis(m, c, f)
                for m, c, f in zip(
                    mean.chunk(heads),
                    _blocks(covariance, heads),
                    [None] * heads if fisher is None else _blocks(fisher, heads),
                    strict=True,
                )
            ]
        )
    covariance = covariance.double()
    d = covariance.shape[0]
    metric = torch.eye(d, dtype=torch.float64) if fisher is None else fisher.double()
    metric = metric + DAMPING * metric.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inverse = (vectors / values.clamp(min=1e-30).sqrt()) @ vectors.T
    found, turned = torch.linalg.eigh(root @ covariance @ root)
    found, turned = found.flip(0).clamp(min=found[-1] * 1e-12), turned.flip(1)
    into = root @ turned / found.sqrt()
    back = (inverse @ turned * found.sqrt()).T
    return Basis(mean.float(), into.float(), back.float(), found.float())


def _blocks(x: Tensor, heads: int) -> list[Tensor]:
    size = x.shape[0] // heads
    return [x[i : i + size, i : i + size] for i in range(0, x.shape[0], size)]


def _join(parts: list[Basis]) -> Basis:
    return Basis(
        torch.cat([part.mean for part in parts]),
        torch.block_diag(*(part.into for part in parts)),
        torch.block_diag(*(part.back for part in parts)),
        torch.cat([part.weights for part in parts]),
    )
