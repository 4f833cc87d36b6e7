"""Codes without a table: rounded levels (FSQ) and signs (BSQ, LFQ)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sage_diffusion.vq.quantizers.base import Quantizer, VQOutput, commitment, straight_through


def _projections(dim: int, inner: int) -> tuple[nn.Module, nn.Module]:
    """Linear layers from D to the code's dims and back; nothing where they are equal."""
    if dim == inner:
        return nn.Identity(), nn.Identity()
    return nn.Linear(dim, inner), nn.Linear(inner, dim)


def _dtype(module: nn.Module) -> torch.dtype:
    """Type of a projection's input."""
    weight = next(module.parameters(), None)
    return torch.float32 if weight is None else weight.dtype


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., 2309.15505): every dim rounded to a few levels.

    Args:
        levels: of each dim, e.g. (8, 8, 8, 8); the first digit of an id is the lowest.
        dim: D; another one than ``len(levels)`` adds a linear layer on either side.
    """

    kind = "fsq"

    def __init__(self, levels: Sequence[int], dim: int | None = None):
        if len(levels) < 1 or min(levels) < 2:
            raise ValueError(f"levels must be one or more numbers from 2 on, got {list(levels)}")
        dim = len(levels) if dim is None else dim
        super().__init__(dim, math.prod(levels), {"levels": list(levels)})
        self.steps = tuple(levels)
        self.project_in, self.project_out = _projections(dim, len(levels))

    def _bounded(self, x: Tensor) -> Tensor:
        """Latents squashed to the range of their levels, unrounded (section 3.1 of the paper)."""
        steps = torch.tensor(self.steps, dtype=torch.float32, device=x.device)
        half = (steps - 1) * (1 + 1e-3) / 2
        offset = torch.where(steps % 2 == 0, 0.5, 0.0)
        return torch.tanh(x.float() + torch.atanh(offset / half)) * half - offset

    def _ids(self, rounded: Tensor) -> Tensor:
        digits = rounded.long() + torch.tensor(self.steps, device=rounded.device) // 2
        return (digits * self._places(rounded.device)).sum(-1)

    def _places(self, device: torch.device) -> Tensor:
        places = [math.prod(self.steps[:i]) for i in range(len(self.steps))]
        return torch.tensor(places, device=device)

    def encode(self, x: Tensor) -> Tensor:
        self.check_latents(x)
        return self._ids(self._bounded(self.project_in(x)).round())

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        steps = torch.tensor(self.steps, device=indices.device)
        digits = indices[..., None] // self._places(indices.device) % steps
        return self._unit(digits - steps // 2)

    def _unit(self, rounded: Tensor) -> Tensor:
        """Codes in -1 .. 1, as the decoder gets them."""
        half = torch.tensor(self.steps, device=rounded.device) // 2
        return self.project_out((rounded / half).to(_dtype(self.project_out)))

    def forward(self, x: Tensor) -> VQOutput:
        self.check_latents(x)
        bounded = self._bounded(self.project_in(x))
        rounded = bounded.round()
        quantized = self._unit(straight_through(bounded, rounded))
        return VQOutput(quantized, self._ids(rounded), x.new_zeros(()))


class _Signs(Quantizer):
    """Bits of the signs of a projection; bit i of an id is set where dim i is positive."""

    sphere, usual_temperature = False, 1.0

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        entropy_weight: float = 0.1,
        commitment_weight: float = 0.25,
        temperature: float | None = None,
    ):
        temperature = self.usual_temperature if temperature is None else temperature
        settings = {
            "width": width,
            "entropy_weight": entropy_weight,
            "commitment_weight": commitment_weight,
            "temperature": temperature,
        }
        if not 1 <= width <= 62:
            raise ValueError(f"width must be 1 to 62 bits, got {width}")
        super().__init__(dim, 2**width, settings)
        self.width, self.temperature = width, temperature
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.project_in, self.project_out = _projections(dim, width)

    @property
    def _size(self) -> float:
        """Absolute value of a code's dims."""
        return self.width**-0.5 if self.sphere else 1.0

    def _latents(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        return nn.functional.normalize(x, dim=-1) if self.sphere else x

    def _ids(self, x: Tensor) -> Tensor:
        return ((x > 0).long() << torch.arange(self.width, device=x.device)).sum(-1)

    def encode(self, x: Tensor) -> Tensor:
        self.check_latents(x)
        return self._ids(self._latents(x))

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        signs = (indices[..., None] >> torch.arange(self.width, device=indices.device) & 1) * 2 - 1
        return self.project_out(signs.to(_dtype(self.project_out)) * self._size)

    def _entropy(self, x: Tensor) -> Tensor:
        """Mean entropy of the bits minus the entropy of their mean, in nats a bit.

        Bits are taken as independent, so that no table of 2^bits appears (BSQ, eq. 8).
        """
        p = torch.sigmoid(2 * x * self._size / self.temperature).flatten(0, -2)

        def entropy(p: Tensor) -> Tensor:
            p = p.clamp(1e-6, 1 - 1e-6)
            return -(p * p.log() + (1 - p) * (1 - p).log())

        return entropy(p).mean() - entropy(p.mean(0)).mean()

    def forward(self, x: Tensor) -> VQOutput:
        self.check_latents(x)
        latents = self._latents(x)
        codes = torch.where(latents > 0, self._size, -self._size).to(latents.dtype)
        loss = commitment(latents, codes, self.commitment_weight)
        if self.entropy_weight and self.training:
            loss = loss + self.entropy_weight * self._entropy(latents)
        quantized = self.project_out(straight_through(latents, codes))
        return VQOutput(quantized, self._ids(latents), loss)


class BSQ(_Signs):
    """Binary spherical quantization (Zhao et al., 2406.07548): signs of a point on the unit sphere.

    Args:
        dim: D; another one than ``width`` adds a linear layer on either side.
        width: bits of an id.
        entropy_weight: of confident bits that are used equally.
        commitment_weight: pulls latents to their code.
        temperature: of the bits' probabilities in the entropy; None: that of the kind.
    """

    kind, sphere, usual_temperature = "bsq", True, 0.01


class LFQ(_Signs):
    """Lookup-free quantization (Yu et al., 2310.05737): signs, codes in {-1, 1}.

    Args:
        dim, width, entropy_weight, commitment_weight, temperature: as of :class:`BSQ`.
    """

    kind, usual_temperature = "lfq", 1.0
