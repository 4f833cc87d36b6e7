"""SimVQ: a frozen random codebook seen through one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sage_diffusion.vq.codes import nearest_code
from sage_diffusion.vq.quantizers.base import (
    Quantizer,
    VQOutput,
    commitment,
    rotated,
    straight_through,
)
from sage_diffusion.vq.quantizers.vector import VectorQuantizer


class SimVQ(Quantizer):
    """Codes ``C W' + b`` of a frozen Gaussian basis C (Zhu et al., 2411.02038).

    Every code moves when any is used, because all share W: that is what keeps them alive.

    Other starts of C than its Gaussian did no better (``benchmarks/vq_quantizers.py``).

    Args:
        dim: D.
        codebook_size: K.
        commitment_weight: beta.
        rotation_trick: turn gradients (2410.06424) instead of passing them straight through.
    """

    kind = "simvq"
    basis: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        commitment_weight: float = 0.25,
        rotation_trick: bool = False,
    ):
        settings = {
            "codebook_size": codebook_size,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
        }
        super().__init__(dim, codebook_size, settings)
        self.commitment_weight, self.rotation_trick = commitment_weight, rotation_trick
        self.register_buffer("basis", torch.randn(codebook_size, dim) * dim**-0.5)
        self.projection = nn.Linear(dim, dim)

    def table(self) -> Tensor:
        """The codes that ids stand for, ``[K, D]``."""
        return self.projection(self.basis)

    def encode(self, x: Tensor) -> Tensor:
        self.check_latents(x)
        with torch.no_grad():
            return nearest_code(x.reshape(-1, self.dim), self.table()).view(x.shape[:2])

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        return nn.functional.embedding(indices, self.table())

    def forward(self, x: Tensor) -> VQOutput:
        self.check_latents(x)
        with torch.no_grad():
            table = self.table()
            indices = nearest_code(x.reshape(-1, self.dim), table).view(x.shape[:2])
            quantized = nn.functional.embedding(indices, table)
        if not torch.is_grad_enabled():
            return VQOutput(quantized, indices, commitment(x, quantized, self.commitment_weight))
        # The gradient of W through the N rows that are used: K / N times less work than through
        # the table, and the same.
        used = self.projection(nn.functional.embedding(indices, self.basis))
        loss = commitment(x, used, self.commitment_weight)
        through = rotated if self.rotation_trick else straight_through
        return VQOutput(through(x, quantized), indices, loss)

    @torch.no_grad()
    def fold(self) -> VectorQuantizer:
        """A plain codebook of the same codes, which any VQGAN loader reads."""
        plain = VectorQuantizer(self.dim, self.codebook_size, decay=None, kmeans=False)
        plain.codebook.copy_(self.table())
        return plain.to(self.basis.device, self.basis.dtype).train(self.training)
