"""One codebook on grids of growing size: a picture as a pyramid of ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sage_diffusion.vq.codes import nearest_code
from sage_diffusion.vq.quantizers.base import Quantizer, VQOutput, commitment, straight_through


class Scales(Quantizer):
    """Multi-scale residual quantization (VAR; Tian et al., 2404.02905).

    Each scale codes what the coarser ones left, averaged to its grid; its codes are enlarged
    (bicubic) and pass a convolution.  The ids of all scales are one row, the coarsest first.

    Args:
        dim: D.
        codebook_size: K.
        scales: sides of the grids, ascending; the last is the latents' own.
        convolutions: how many, spread over the scales.
        strength: share of a convolution in its output; the rest goes past it.
        commitment_weight: pulls latents to their codes.
    """

    kind = "scales"
    grid: tuple[int, int]

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        scales: Sequence[int],
        *,
        convolutions: int = 4,
        strength: float = 0.5,
        commitment_weight: float = 0.25,
    ):
        ascending = all(a < b for a, b in pairwise(scales))
        if len(scales) < 2 or min(scales) < 1 or not ascending:
            raise ValueError(f"scales must be two or more ascending sides, got {list(scales)}")
        if convolutions < 1:
            raise ValueError(f"convolutions must be at least 1, got {convolutions}")
        settings: dict[str, Any] = {
            "codebook_size": codebook_size,
            "scales": list(scales),
            "convolutions": convolutions,
            "strength": strength,
            "commitment_weight": commitment_weight,
        }
        super().__init__(dim, codebook_size, settings)
        self.scales, self.strength = tuple(scales), strength
        self.grid = (scales[-1], scales[-1])
        self.commitment_weight = commitment_weight
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) * dim**-0.5)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1) for _ in range(convolutions)
        )

    @property
    def tokens(self) -> int:
        """Ids of a picture."""
        return sum(side * side for side in self.scales)

    def _convolution(self, scale: int) -> nn.Module:
        """The one whose place between 0 and 1 is nearest the scale's."""
        count = len(self.convolutions)
        first = 1 / (3 if count == 4 else 2) / count  # as VAR's weights were trained
        places = np.linspace(first, 1 - first, count)
        return self.convolutions[int(np.abs(places - scale / (len(self.scales) - 1)).argmin())]

    def _enlarged(self, codes: Tensor, scale: int) -> Tensor:
        """What the codes ``[B, D, s, s]`` of a scale add to the latents' own grid."""
        if scale < len(self.scales) - 1:
            codes = nn.functional.interpolate(codes, size=self.grid, mode="bicubic")
        return codes * (1 - self.strength) + self._convolution(scale)(codes) * self.strength

    def _check_grid(self, x: Tensor) -> None:
        self.check_latents(x)
        side = self.scales[-1]
        if x.shape[1] != side * side:
            raise ValueError(f"latents must be a grid of {side} x {side}, got {x.shape[1]}")

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        self._check_grid(x)
        left = x.transpose(1, 2).reshape(len(x), self.dim, *self.grid).float()
        found = []
        for scale, side in enumerate(self.scales):
            small = left
            if scale < len(self.scales) - 1:
                small = nn.functional.interpolate(left, size=(side, side), mode="area")
            flat = small.flatten(2).transpose(1, 2).reshape(-1, self.dim)
            ids = nearest_code(flat, self.codebook).view(len(x), side * side)
            left = left - self._enlarged(self._codes(ids, side), scale)
            found.append(ids)
        return torch.cat(found, dim=1)

    def _codes(self, ids: Tensor, side: int) -> Tensor:
        codes = nn.functional.embedding(ids, self.codebook)
        return codes.transpose(1, 2).reshape(len(ids), self.dim, side, side)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        if indices.shape[1] != self.tokens:
            raise ValueError(f"ids must be {self.tokens} a picture, got {indices.shape[1]}")
        parts = indices.split([side * side for side in self.scales], dim=1)
        total = torch.zeros(len(indices), self.dim, *self.grid, device=indices.device)
        for scale, (ids, side) in enumerate(zip(parts, self.scales, strict=True)):
            total = total + self._enlarged(self._codes(ids, side), scale)
        return total.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> VQOutput:
        indices = self.encode(x)
        quantized = self.decode(indices)
        loss = commitment(x, quantized, self.commitment_weight)
        return VQOutput(straight_through(x, quantized), indices, loss)
