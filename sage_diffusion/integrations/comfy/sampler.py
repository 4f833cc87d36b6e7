"""Calibration of a ComfyUI MODEL: the host's side of :mod:`sage_diffusion.adapt.calibrate`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.adapt.costs import CYCLES
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.accuracy import KSampling
from sage_diffusion.integrations.comfy.model import ModelAttention, attach, attached, without

#: Cards that a plan's time can be predicted for.
CARDS = tuple(CYCLES)


@dataclass(frozen=True)
class Prompt:
    """A conditioning with a name that stays the same when a calibration goes on after a restart."""

    conditioning: Any

    def __str__(self) -> str:
        digest = hashlib.sha256()
        for tensor, more in self.conditioning:
            parts = [tensor, *(v for _, v in sorted(more.items()) if isinstance(v, Tensor))]
            for part in parts:
                digest.update(part.detach().to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()[:16]


class ComfySampler:
    """See :class:`sage_diffusion.adapt.sampling.Sampler`.

    Args:
        model: a ``ModelPatcher``; its own Sage Attention is left out.
        sampling: everything else; its positive conditioning and seed are replaced.
        heartbeat: called after each run.
    """

    def __init__(
        self, model: Any, sampling: KSampling, heartbeat: Callable[[], None] = lambda: None
    ):
        before = attached(model)
        if before is not None:
            before.sampled_by("Calibrate Precision Plan")
        self.session = AttentionSession("fp16")
        attention = ModelAttention(self.session)
        self.patched = attach(without(model), attention)
        self.model: str | None = attention.model_name
        self.sampling, self.heartbeat = sampling, heartbeat
        self.settings = {
            "steps": sampling.steps,
            "cfg": sampling.cfg,
            "sampler": sampling.sampler_name,
            "scheduler": sampling.scheduler,
            "denoise": sampling.denoise,
            "latent": list(sampling.latent["samples"].shape),
        }

    def sample(self, prompt: Prompt, seed: int) -> Tensor:
        """The whole sampling loop; returns the final latents."""
        run = replace(self.sampling, positive=prompt.conditioning, seed=seed)
        run(self.patched)
        self.heartbeat()
        if run.samples is None:
            raise RuntimeError("the sampler returned nothing")
        return run.samples
