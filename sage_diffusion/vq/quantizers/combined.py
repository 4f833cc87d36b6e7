"""Quantizers made of quantizers: channels in groups, and one after the other on what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.vq.quantizers.base import Quantizer, VQOutput


class Groups(Quantizer):
    """Channels split among quantizers, their ids combined into one (first group: lowest digit).

    Args:
        parts: quantizers with one level each; D is the sum of theirs.
    """

    kind = "groups"
    parts: Any  # a ModuleList of quantizers, which mypy takes for bare modules

    def __init__(self, parts: Sequence[Quantizer]):
        if len(parts) < 2 or any(part.levels != 1 for part in parts):
            raise ValueError("groups must be two or more quantizers of one level each")
        size = math.prod(part.codebook_size for part in parts)
        if size >= 2**63:
            raise ValueError(f"combined ids must fit into 63 bits, got {math.log2(size):.1f}")
        settings = {"parts": [part.settings for part in parts]}
        super().__init__(sum(part.dim for part in parts), size, settings)
        self.parts = nn.ModuleList(parts)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        self.check_latents(x)
        return x.split([part.dim for part in self.parts], dim=-1)

    def _combine(self, ids: Sequence[Tensor]) -> Tensor:
        combined, place = torch.zeros_like(ids[0]), 1
        for part, own in zip(self.parts, ids, strict=True):
            combined, place = combined + own * place, place * part.codebook_size
        return combined

    def encode(self, x: Tensor) -> Tensor:
        return self._combine(
            [part.encode(own) for part, own in zip(self.parts, self._split(x), strict=True)]
        )

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        decoded = []
        for part in self.parts:
            decoded.append(part.decode(indices % part.codebook_size))
            indices = indices // part.codebook_size
        return torch.cat(decoded, dim=-1)

    def forward(self, x: Tensor) -> VQOutput:
        found = [part(own) for part, own in zip(self.parts, self._split(x), strict=True)]
        loss = torch.stack([out.loss for out in found]).mean()
        quantized = torch.cat([out.quantized for out in found], dim=-1)
        return VQOutput(quantized, self._combine([out.indices for out in found]), loss)


class Residual(Quantizer):
    """Each part codes what the ones before it left (SoundStream, 2107.03312); ids ``[B, N, Q]``.

    Args:
        parts: quantizers of the same D and number of codes, one level each.
    """

    kind = "residual"
    parts: Any

    def __init__(self, parts: Sequence[Quantizer]):
        if len(parts) < 2 or any(part.levels != 1 for part in parts):
            raise ValueError("levels must be two or more quantizers of one level each")
        if len({(part.dim, part.codebook_size) for part in parts}) > 1:
            raise ValueError("levels must have the same dim and codebook_size")
        settings = {"parts": [part.settings for part in parts]}
        super().__init__(parts[0].dim, parts[0].codebook_size, settings)
        self.parts, self.levels = nn.ModuleList(parts), len(parts)

    def encode(self, x: Tensor) -> Tensor:
        self.check_latents(x)
        ids, left = [], x
        for part in self.parts:
            ids.append(part.encode(left))
            left = left - part.decode(ids[-1])
        return torch.stack(ids, dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        decoded = [
            part.decode(ids) for part, ids in zip(self.parts, indices.unbind(-1), strict=True)
        ]
        return _sum(decoded)

    def forward(self, x: Tensor) -> VQOutput:
        self.check_latents(x)
        found, left = [], x
        for part in self.parts:
            found.append(part(left))
            left = left - found[-1].quantized.detach()
        loss = torch.stack([out.loss for out in found]).mean()
        codes = _sum([out.quantized for out in found])
        ids = torch.stack([out.indices for out in found], dim=-1)
        # Each part passes the gradient on, so their sum would count it Q times.
        if not (torch.is_grad_enabled() and x.requires_grad):
            return VQOutput(codes.detach(), ids, loss)
        mean = codes.detach() + (codes - codes.detach()) / self.levels
        return VQOutput(mean, ids, loss)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
