"""A plain codebook: trained by gradient, or by moving averages with a k-means start and revival."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.vq.codes import nearest_code
from sage_diffusion.vq.quantizers.base import Quantizer, VQOutput, commitment, straight_through

#: Lloyd iterations of the start.
_LLOYD = 10


class VectorQuantizer(Quantizer):
    """A codebook that follows its latents by moving averages (van den Oord et al., 1711.00937).

    Averages alone do not keep codes alive; a k-means start and the revival of dead codes do.

    Args:
        dim: D.
        codebook_size: K.
        decay: of the averages of counts and sums; None trains the codebook by gradient instead.
        commitment_weight: pulls latents to their codes.
        metric: "l2", "cosine" (latents and codes on the unit sphere) or "dot".
        kmeans: start from Lloyd's algorithm on the first batch that is trained on.
        revive: put a code on a latent of the batch when its averaged count falls below this share
            of the mean count; 0: never.
        init: "normal" (standard deviation ``D^-0.5``) or "uniform" (``-1/K .. 1/K``, as VQGAN).
    """

    kind = "vector"
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float | None = 0.99,
        commitment_weight: float = 0.25,
        metric: str = "l2",
        kmeans: bool = True,
        revive: float = 0.5,
        init: str = "normal",
    ):
        settings: dict[str, Any] = {
            "codebook_size": codebook_size,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "metric": metric,
            "kmeans": kmeans,
            "revive": revive,
            "init": init,
        }
        super().__init__(dim, codebook_size, settings)
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be None or 0 <= decay < 1, got {decay}")
        if metric not in ("l2", "cosine", "dot"):
            raise ValueError(f"metric must be l2, cosine or dot, got {metric!r}")
        if init not in ("normal", "uniform"):
            raise ValueError(f"init must be normal or uniform, got {init!r}")
        self.decay, self.metric, self.revive = decay, metric, revive
        self.commitment_weight = commitment_weight
        codebook = torch.empty(codebook_size, dim)
        if init == "normal":
            nn.init.normal_(codebook, std=dim**-0.5)
        else:
            nn.init.uniform_(codebook, -1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(codebook, requires_grad=decay is None)
        # State of the training; a file of the result goes without (see _load_from_state_dict).
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("started", torch.tensor(not kmeans))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Codes that come without averages begin new ones where they stand, without k-means."""
        codebook = state_dict.get(prefix + "codebook")
        if codebook is not None and prefix + "sums" not in state_dict:
            state_dict[prefix + "sums"] = codebook.clone()
            state_dict[prefix + "counts"] = torch.ones(len(codebook))
            state_dict[prefix + "started"] = torch.tensor(True)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def table(self) -> Tensor:
        """The codes that ids stand for, ``[K, D]``."""
        if self.metric == "cosine":
            return nn.functional.normalize(self.codebook, dim=-1)
        return self.codebook

    def encode(self, x: Tensor) -> Tensor:
        self.check_latents(x)
        return nearest_code(x.reshape(-1, self.dim), self.codebook, self.metric).view(x.shape[:2])

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        return nn.functional.embedding(indices, self.table())

    def forward(self, x: Tensor) -> VQOutput:
        self.check_latents(x)
        if self.metric == "cosine":
            x = nn.functional.normalize(x, dim=-1)
        flat = x.detach().reshape(-1, self.dim).float()
        if self.training and not self.started:
            self.start(flat)
        indices = self.encode(x)
        quantized = nn.functional.embedding(indices, self.table())
        loss = commitment(x, quantized, self.commitment_weight)
        if self.training and self.decay is not None:
            self._average(flat, indices.flatten(), 1 - self.decay)
        return VQOutput(straight_through(x, quantized), indices, loss)

    @torch.no_grad()
    def start(self, flat: Tensor) -> None:
        """Lloyd's algorithm (1957) from random latents; codes that get none stay in place.

        Args:
            flat: latents ``[N, D]`` float32; with the metric "cosine" on the unit sphere.
        """
        drawn = torch.randint(len(flat), (self.codebook_size,), device=flat.device)
        if len(flat) >= self.codebook_size:
            drawn = torch.randperm(len(flat), device=flat.device)[: self.codebook_size]
        self.codebook.copy_(flat[drawn])
        for _ in range(_LLOYD):
            counts, sums = self._sums(flat, nearest_code(flat, self.codebook, self.metric))
            means = sums / counts.clamp(min=1)[:, None]
            self.codebook.copy_(torch.where(counts[:, None] > 0, means, self.codebook))
        self.counts.fill_(1)
        self.sums.copy_(self.codebook)
        self.started.fill_(True)

    def _sums(self, flat: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of every code, and their sum."""
        ones = torch.ones(len(ids), device=flat.device)
        counts = torch.zeros(self.codebook_size, device=flat.device).index_add_(0, ids, ones)
        return counts, torch.zeros_like(self.sums).index_add_(0, ids, flat)

    @torch.no_grad()
    def _average(self, flat: Tensor, ids: Tensor, share: float) -> None:
        """Move counts and sums by a share to those of a batch, then codes to their quotient."""
        counts, sums = self._sums(flat, ids)
        self.counts.lerp_(counts, share)
        self.sums.lerp_(sums, share)
        if self.revive:
            mean = len(flat) / self.codebook_size
            dead = (self.counts < self.revive * mean).nonzero()[:, 0]
            drawn = flat[torch.randint(len(flat), (len(dead),), device=flat.device)]
            self.counts[dead] = mean
            self.sums[dead] = drawn * mean
        self.codebook.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
