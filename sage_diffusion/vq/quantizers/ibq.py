"""Index backpropagation: every code gets a gradient through a softmax over all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sage_diffusion.vq.codes import nearest_code
from sage_diffusion.vq.quantizers.base import Quantizer, VQOutput, commitment, straight_through


class IBQ(Quantizer):
    """Index backpropagation quantization (Shi et al., 2412.02692): the code of largest dot product.

    Training holds latents x codes, as the method does; encoding and decoding don't.

    Args:
        dim: D.
        codebook_size: K.
        commitment_weight: beta of the hard codes' loss.
        entropy_weight: of confident latents and evenly used codes.
        temperature: of the softmax in the entropy.
    """

    kind = "ibq"

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.05,
        temperature: float = 1.0,
    ):
        settings = {
            "codebook_size": codebook_size,
            "commitment_weight": commitment_weight,
            "entropy_weight": entropy_weight,
            "temperature": temperature,
        }
        super().__init__(dim, codebook_size, settings)
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.temperature = temperature
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) * dim**-0.5)

    def table(self) -> Tensor:
        """The codes that ids stand for, ``[K, D]``."""
        return self.codebook

    def encode(self, x: Tensor) -> Tensor:
        self.check_latents(x)
        return nearest_code(x.reshape(-1, self.dim), self.codebook, "dot").view(x.shape[:2])

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        return nn.functional.embedding(indices, self.codebook)

    def forward(self, x: Tensor) -> VQOutput:
        self.check_latents(x)
        indices = self.encode(x)
        hard = nn.functional.embedding(indices, self.codebook)
        loss = commitment(x, hard, self.commitment_weight)
        if not (self.training and torch.is_grad_enabled()):
            return VQOutput(straight_through(x, hard), indices, loss)
        logits = x @ self.codebook.t()
        chances = logits.softmax(-1)
        soft = chances @ self.codebook
        # One-hot forward, softmax backward: eq. 5 of the paper, without its one-hot matrix.
        quantized = hard.detach() + (soft - soft.detach()) + (hard - hard.detach())
        loss = loss + nn.functional.mse_loss(quantized, x)
        if self.entropy_weight:
            if self.temperature != 1:
                chances = (logits / self.temperature).softmax(-1)
            p = chances.flatten(0, 1)
            sample = -(p * (p + 1e-9).log()).sum(-1).mean()
            mean = p.mean(0)
            loss = loss + self.entropy_weight * (sample + (mean * (mean + 1e-9).log()).sum())
        return VQOutput(quantized, indices, loss)
