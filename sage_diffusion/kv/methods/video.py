"""Video: centroids of a span of frames, and what they leave in few bits.

After Quant VideoGen (Xi et al., 2602.02958): neighbouring frames resemble each other, so the tokens
of a span fall into clusters; a token is the number of its cluster's centroid and a residual that is
much smaller than the token, symmetric and of 2 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kv.codes import pack, unpack
from sage_diffusion.kv.method import Method, Place, TwoSided
from sage_diffusion.kv.store import Store

#: Indices are bytes.
MOST_CENTROIDS = 256

_GOLDEN = (math.sqrt(5) - 1) / 2
_FP8 = torch.float8_e4m3fn
_PER_TOKEN = ("codes", "steps", "indices")


@dataclass(frozen=True)
class Video(Method):
    """Centroids per span, head and side by k-means, residuals in ``bits`` with a scale per block.

    A residual's levels are the odd multiples of half a step, so that all of them are used; the step
    makes the outermost one the block's largest residual, and is kept in FP8 (E4M3).

    Attributes:
        bits: of a residual's code, 1 to 4 or 8.
        centroids: of a span, 1 to 256.
        block: channels of a token that share a step.
        span: tokens that share centroids.
        iterations: of Lloyd's algorithm, from tokens spread over the span.
    """

    bits: int = 2
    centroids: int = 256
    block: int = 64
    span: int = 4680
    iterations: int = 2

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 8):
            raise ValueError(f"bits must be 1, 2, 3, 4 or 8, got {self.bits}")
        if not 1 <= self.centroids <= MOST_CENTROIDS:
            raise ValueError(f"centroids must be 1 .. {MOST_CENTROIDS}, got {self.centroids}")
        if self.span < self.centroids:
            raise ValueError(
                f"a span must have at least as many tokens as centroids, got {self.span} tokens "
                f"and {self.centroids} centroids"
            )
        if self.iterations < 0:
            raise ValueError(f"iterations must not be negative, got {self.iterations}")

    def body(self, place: Place) -> VideoBody:
        for dim in (place.head_dim, place.value_dim):
            if dim % self.block:
                raise ValueError(f"blocks of {self.block} channels must divide the head's {dim}")
        return VideoBody(place, self)


class VideoBody(TwoSided):
    """Whole spans of tokens."""

    def __init__(self, place: Place, method: Video):
        super().__init__(place, _Side(method), _Side(method))
        self.unit = method.span

    def append(self, k: Tensor, v: Tensor) -> None:
        for start in range(0, k.shape[2], self.unit):
            span = slice(start, start + self.unit)
            super().append(k[:, :, span], v[:, :, span])


class _Side:
    """K or V.

    Attributes:
        stores: ``codes`` int32 words; ``steps`` FP8 ``[B, H, T, blocks]``, in ``units`` float32
            ``[B, H, spans, 1]``; ``indices`` uint8 ``[B, H, T, 1]``; ``centroids`` bfloat16
            ``[B, H, spans * centroids, D]``.
    """

    def __init__(self, method: Video):
        self.method = method
        self.stores = {name: Store() for name in (*_PER_TOKEN, "units", "centroids")}

    def append(self, x: Tensor) -> None:
        """Compress a span ``[B, H, span, D]``."""
        x = x.float()
        method = self.method
        centroids = k_means(x, method.centroids, method.iterations).bfloat16()
        nearest = _nearest(x, centroids.float())
        residual = x - _rows(centroids.float(), nearest)
        blocks = residual.unflatten(3, (-1, method.block))
        outermost = (2**method.bits - 1) / 2  # in steps
        wanted = blocks.abs().amax(4) / outermost
        # FP8 has few small numbers: the span's largest step becomes its largest number.
        unit = wanted.amax((2, 3), keepdim=True) / torch.finfo(_FP8).max
        unit = unit.clamp(min=torch.finfo(torch.float32).tiny)
        step = (wanted / unit).to(_FP8)
        width = (step.float() * unit).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = blocks / width[..., None]
        codes = (scaled + outermost).round_().clamp_(0, 2 * outermost).to(torch.uint8)
        self.stores["codes"].append(pack(codes.flatten(3), method.bits))
        self.stores["steps"].append(step)
        self.stores["units"].append(unit)
        self.stores["indices"].append(nearest[..., None].to(torch.uint8))
        self.stores["centroids"].append(centroids)

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as float32 ``[B, H, n, D]``."""
        method = self.method
        steps = self.stores["steps"].read(start, stop).float()
        first, last = start // method.span, -(-stop // method.span)
        span = torch.arange(start, stop, device=steps.device) // method.span - first
        steps = steps * self.stores["units"].read(first, last)[:, :, span]
        dim = steps.shape[3] * method.block
        codes = unpack(self.stores["codes"].read(start, stop), method.bits, dim)
        outermost = (2**method.bits - 1) / 2
        residual = (codes.float() - outermost).unflatten(3, (-1, method.block)) * steps[..., None]
        centroids = self.stores["centroids"].read(first * method.centroids, last * method.centroids)
        index = self.stores["indices"].read(start, stop)[..., 0].long() + span * method.centroids
        return residual.flatten(3).add_(_rows(centroids, index))

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``, whole spans."""
        for name in _PER_TOKEN:
            self.stores[name].cut(tokens)
        spans = tokens // self.method.span
        self.stores["units"].cut(spans)
        self.stores["centroids"].cut(spans * self.method.centroids)


def k_means(x: Tensor, count: int, iterations: int) -> Tensor:
    """Centroids ``[.., count, D]`` of points ``x [.., n, D]``; one that nobody is near stays."""
    # Spread evenly, and at no distance that a frame's tokens could have in common.
    spread = torch.arange(count, dtype=torch.float64, device=x.device) * _GOLDEN % 1
    centroids = x[..., (spread * x.shape[-2]).long(), :].clone()
    for _ in range(iterations):
        nearest = _nearest(x, centroids)
        index = nearest[..., None].expand_as(x)
        total = torch.zeros_like(centroids).scatter_add_(-2, index, x)
        members = torch.zeros_like(centroids[..., 0]).scatter_add_(
            -1, nearest, torch.ones_like(x[..., 0])
        )[..., None]
        centroids = torch.where(members > 0, total / members.clamp(min=1), centroids)
    return centroids


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid, ``[.., n]``; |x|^2 is the same for all of them."""
    distance = (centroids**2).sum(-1)[..., None, :] - 2 * x @ centroids.mT
    return distance.argmin(-1)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """``table [B, H, rows, D]`` at ``index [B, H, n]``."""
    return table.gather(2, index[..., None].expand(*index.shape, table.shape[3]))
