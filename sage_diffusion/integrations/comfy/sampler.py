"""Calibration of a ComfyUI MODEL: the host's side of :mod:`sage_diffusion.adapt.calibrate`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.adapt.costs import CYCLES, SMALL, card_costs, relative_cost
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.accuracy import KSampling
from sage_diffusion.integrations.comfy.model import ModelAttention, attach, attached, without
from sage_diffusion.integrations.comfy.presets import PRESETS
from sage_diffusion.machine import device_arch

#: Cards that a plan's time can be predicted for.
CARDS = tuple(CYCLES)

#: Compute capability -> the card of its architecture.
_CARD_OF = {
    (8, 0): "a100",
    (8, 6): "rtx3090",
    (8, 9): "rtx4090",
    (9, 0): "h100",
    (12, 0): "rtx5090",
}


def this_card(device: torch.device) -> str | None:
    """The card that stands for a device's architecture, None where none does."""
    capability, _ = device_arch(device)
    return None if capability is None else _CARD_OF.get(capability)


def candidates(card: str) -> tuple[str, ...]:
    """Specs that a card computes, those that a plan for it may choose from."""
    return tuple(name for name in CYCLES[card] if name != "fp16" and not name.endswith(SMALL))


def fast_time(card: str, table: ScoreTable) -> float:
    """Predicted time of the preset *fast* on a card, relative to FP16 attention; that of
    *balanced* where it is faster, as on cards without 4-bit products.

    Args:
        card: one of :data:`CARDS`.
        table: has the model's head dims, and the work of each layer.
    """
    costs = card_costs(card)
    work = table.filled_work().sum((1, 2))
    layers = list(zip(work / work.sum(), table.head_dims(), strict=True))

    def first(specs: Sequence[str]) -> float:
        spec = next(spec for spec in specs if spec in costs)
        return float(sum(share * relative_cost(spec, costs, dim) for share, dim in layers))

    return min(
        0.9 * first(PRESETS[name].body) + 0.1 * first(PRESETS[name].edges)
        for name in ("fast", "balanced")
    )


def free_path(path: Path) -> Path:
    """The path itself, or the first of ``name 2``, ``name 3``, .. that no file has."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem} {number}")
    return found


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


def settings_of(sampling: KSampling) -> dict[str, Any]:
    """What decides how a model is sampled, prompt and seed aside."""
    return {
        "steps": sampling.steps,
        "cfg": sampling.cfg,
        "sampler": sampling.sampler_name,
        "scheduler": sampling.scheduler,
        "denoise": sampling.denoise,
        "latent": list(sampling.latent["samples"].shape),
    }


class ComfySampler:
    """See :class:`sage_diffusion.adapt.sampling.Sampler`.

    Args:
        model: a ``ModelPatcher``; its own Sage Attention is left out.
        sampling: everything else; its positive conditioning and seed are replaced.
        node: that samples, by its name.

    Attributes:
        heartbeat: called after each run.
    """

    def __init__(self, model: Any, sampling: KSampling, node: str = "Calibrate Precision Plan"):
        before = attached(model)
        if before is not None:
            before.sampled_by(node)
        self.session = AttentionSession("fp16")
        attention = ModelAttention(self.session)
        self.patched = attach(without(model), attention)
        self.model: str | None = attention.model_name
        self.sampling = sampling
        self.heartbeat: Callable[[], None] = lambda: None
        self.settings = settings_of(sampling)

    def sample(self, prompt: Prompt, seed: int) -> Tensor:
        """The whole sampling loop; returns the final latents."""
        run = replace(self.sampling, positive=prompt.conditioning, seed=seed)
        run(self.patched)
        self.heartbeat()
        if run.samples is None:
            raise RuntimeError("the sampler returned nothing")
        return run.samples
