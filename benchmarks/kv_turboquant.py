"""TurboQuant's recipe (2504.19874) as a row of ``benchmarks.kv``; no preset, as others do better.

A random rotation makes every channel of a unit vector nearly Gaussian, so that one table of levels
of least squared error (Lloyd-Max) serves all of them; the vector's norm is stored so that what is
read has it (the "norm correction" of vLLM's port; without the paper's second stage, which ports
found to hurt).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width, levels, pack_checked, unpack
from sage_diffusion.kv.method import Method, Place, TwoSided
from sage_diffusion.kv.store import Store


@lru_cache(maxsize=8)
def lloyd_max(count: int) -> Tensor:
    """Levels ``[count]`` of least squared error of a standard Gaussian, rising (Max, 1960)."""
    at = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    mass = (-at.square() / 2).exp()
    found = torch.linspace(-2, 2, count, dtype=torch.float64)
    for _ in range(1000):
        nearest = torch.bucketize(at, (found[1:] + found[:-1]) / 2)
        total = torch.zeros_like(found).index_add_(0, nearest, mass)
        moved = torch.zeros_like(found).index_add_(0, nearest, mass * at) / total
        if torch.allclose(moved, found, rtol=0, atol=1e-9):
            break
        found = moved
    return found.float()


@lru_cache(maxsize=8)
def rotation(dim: int) -> Tensor:
    """An orthogonal matrix, the same for all layers and calls: a seed, nothing to store."""
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0]


class _Side:
    """K or V: codes, and a norm in FP16 for each token and head."""

    def __init__(self, width: Width, dim: int):
        self.width, self.dim = width, dim
        self.levels, self.rotation = lloyd_max(levels(width)), rotation(dim)
        self.stores = {"codes": Store(), "norms": Store()}

    def append(self, x: Tensor) -> None:
        x = x.float()
        norm = x.norm(dim=3, keepdim=True)
        unit = x @ self.rotation * (self.dim**0.5 / norm.clamp(min=1e-20))
        codes = torch.bucketize(unit, (self.levels[1:] + self.levels[:-1]) / 2)
        gain = norm / self.levels[codes].norm(dim=3, keepdim=True)
        self.stores["codes"].append(pack_checked(codes.to(torch.uint8), self.width))
        self.stores["norms"].append(gain.half())

    def read(self, start: int, stop: int) -> Tensor:
        codes = unpack(self.stores["codes"].read(start, stop), self.width, self.dim)
        gain = self.stores["norms"].read(start, stop).float()
        return self.levels[codes.long()] * gain @ self.rotation.T

    def cut(self, tokens: int) -> None:
        for store in self.stores.values():
            store.cut(tokens)


@dataclass(frozen=True)
class TurboQuant(Method):
    """K and V of each head rotated, codes of Lloyd-Max levels, one norm.

    Attributes:
        k_bits, v_bits: of a code.
    """

    k_bits: Width = 4
    v_bits: Width = 3

    def body(self, place: Place) -> TwoSided:
        return TwoSided(
            place, _Side(self.k_bits, place.head_dim), _Side(self.v_bits, place.value_dim)
        )
