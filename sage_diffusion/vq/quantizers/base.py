"""The one face of every quantizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class VQOutput(NamedTuple):
    """What quantizing gives.

    Attributes:
        quantized: ``[B, N, D]``; its gradient goes to the latents.
        indices: ``[B, N]`` int64, or ``[B, N, Q]`` with Q levels.
        loss: scalar, zero where the method has none.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class Quantizer(nn.Module, ABC):
    """Turns latents ``[B, N, D]`` into ids and back.

    Attributes:
        dim: D.
        codebook_size: values that one id can take.
        levels: ids per latent; with one the last axis of the ids is left out.
        grid: rows and columns of the latents, where it needs to know their places.
        settings: what :func:`sage_diffusion.vq.quantizers.build` makes it from, as JSON.
    """

    kind = ""
    levels = 1
    grid: tuple[int, int] | None = None

    def __init__(self, dim: int, codebook_size: int, settings: dict[str, Any]):
        super().__init__()
        if dim < 1 or codebook_size < 2:
            raise ValueError(
                f"dim must be at least 1 and codebook_size at least 2, got {dim}, {codebook_size}"
            )
        self.dim, self.codebook_size = dim, codebook_size
        self.settings = {"kind": self.kind, "dim": dim, **settings}

    @property
    def bits(self) -> float:
        """Bits of one latent's ids."""
        return self.levels * math.log2(self.codebook_size)

    @abstractmethod
    def forward(self, x: Tensor) -> VQOutput:
        """Quantize ``[B, N, D]``; while training, codebooks that learn by averaging learn."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Ids of ``[B, N, D]``."""

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """``[B, N, D]`` of ids.

        Raises:
            ValueError: an id is out of range, or the number of levels is another.
        """

    def check_latents(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is ``[B, N, D]``."""
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"latents must be [B, N, {self.dim}], got {tuple(x.shape)}")

    def check_indices(self, indices: Tensor) -> None:
        """Raise ValueError unless ``indices`` are ids of this quantizer."""
        shape = "[B, N]" if self.levels == 1 else f"[B, N, {self.levels}]"
        fits = indices.ndim == 2 if self.levels == 1 else indices.shape[2:] == (self.levels,)
        if not fits or indices.is_floating_point():
            raise ValueError(
                f"ids must be integers {shape}, got {indices.dtype} {tuple(indices.shape)}"
            )
        if indices.numel() and (indices.min() < 0 or indices.max() >= self.codebook_size):
            raise ValueError(
                f"ids must be 0 to {self.codebook_size - 1}, "
                f"got {int(indices.min())} to {int(indices.max())}"
            )


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Exactly ``quantized``, with the gradient of ``x`` (Bengio et al., 1308.3432).

    Not ``x + (quantized - x)``, which rounds.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return quantized.detach()
    return quantized.detach() + (x - x.detach())


def rotated(x: Tensor, quantized: Tensor) -> Tensor:
    """Exactly ``quantized``, the gradient turned and scaled as ``x`` is onto it.

    The rotation trick (Fifty et al., 2410.06424): with the unit vectors u and v of ``x`` and
    ``quantized`` the gradient passes through ``(I - 2 w w' + 2 v u') |q| / |x|``, w the unit vector
    of u + v.  Where ``x`` or ``quantized`` is zero, or they are opposite, it goes straight through.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return quantized.detach()
    with torch.no_grad():
        x_norm, q_norm = x.norm(dim=-1, keepdim=True), quantized.norm(dim=-1, keepdim=True)
        u, v = x / x_norm.clamp(min=1e-12), quantized / q_norm.clamp(min=1e-12)
        w = u + v
        size = w.norm(dim=-1, keepdim=True)
        defined = (x_norm > 1e-6) & (q_norm > 1e-6) & (size > 1e-3)
        w = w / size.clamp(min=1e-3)
        ratio = q_norm / x_norm.clamp(min=1e-6)
    along_w, along_u = ((x * unit).sum(-1, keepdim=True) for unit in (w, u))
    turned = ratio * (x - 2 * along_w * w + 2 * along_u * v)
    turned = torch.where(defined, turned, x)
    return quantized.detach() + (turned - turned.detach())


def commitment(x: Tensor, quantized: Tensor, weight: float) -> Tensor:
    """``weight |x - sg(q)|^2 + |sg(x) - q|^2``, means (van den Oord et al., 1711.00937, eq. 3)."""
    mse = nn.functional.mse_loss
    loss = weight * mse(x, quantized.detach())
    return loss + mse(quantized, x.detach()) if quantized.requires_grad else loss
