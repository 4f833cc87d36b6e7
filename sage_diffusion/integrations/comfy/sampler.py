"""Calibration of a ComfyUI MODEL: the host's side of :mod:`sage_diffusion.adapt.calibrate`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.adapt.costs import CYCLES, SMALL, Costs, card_costs
from sage_diffusion.adapt.presets import EIGHT_BIT, FOUR_BIT
from sage_diffusion.adapt.sampling import ModelCall
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.times import cell_times
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.accuracy import KSampling, one_tensor
from sage_diffusion.integrations.comfy.gradients import Replay, replayed
from sage_diffusion.integrations.comfy.model import ModelAttention, attach, attached, without

#: Cards that a plan's time can be predicted for.
CARDS = tuple(CYCLES)


def candidates(card: str) -> tuple[str, ...]:
    """Specs that a card computes, those that a plan for it may choose from."""
    return tuple(name for name in CYCLES[card] if name != "fp16" and not name.endswith(SMALL))


def costs_of(card: str, table: ScoreTable) -> tuple[Costs, str]:
    """Costs of a card for a model's calls, and a note where they are not those of whole calls.

    Calls may be so short that quantizing and launching takes what the main loop gains.  A plan for
    them would be FP16 everywhere; what is asked for is one for larger pictures, so the main loops
    count, and the note says so.

    Args:
        card: one of :data:`CARDS`.
        table: has the sizes of the model's calls.
    """
    costs, loops = card_costs(card), card_costs(card, math.inf)
    if fast_time(costs, table) < 1 or fast_time(loops, table) >= 1:
        return costs, ""
    longest = max(q_len for q_len, _ in table.tokens.values())
    return loops, (
        f" (of main loops: whole calls of {longest:,} tokens are not predicted to be faster than "
        "FP16's; plan for larger pictures)"
    )


def fast_time(costs: Costs, table: ScoreTable) -> float:
    """Predicted time of the preset *fast*, relative to FP16 attention.

    Args:
        costs: of one of :data:`CARDS`.
        table: has the sizes of the model's calls.
    """

    def least(specs: Sequence[str]) -> float:
        known = [spec for spec in specs if spec in costs]
        return float(cell_times(table, known, costs).sum((0, 1, 2)).min())

    return 0.9 * least((*EIGHT_BIT, *FOUR_BIT)) + 0.1 * least(EIGHT_BIT)


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
    """See :class:`sage_diffusion.adapt.sampling.Sampler` and ``Replayer``.

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
        self._replay = Replay()
        self.patched = attach(replayed(without(model), self._replay), attention)
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
        return one_tensor(run.samples)

    def pictures(self, prompt: Prompt, seed: int) -> list[tuple[Prompt, int]]:
        """A run's first picture stands for its batch."""
        return [(prompt, seed)]

    def replay(
        self, picture: tuple[Prompt, int], use: Callable[[Tensor, Sequence[ModelCall]], None]
    ) -> None:
        """See :class:`sage_diffusion.adapt.sampling.Replayer`."""
        prompt, seed = picture
        run = replace(self.sampling, positive=prompt.conditioning, seed=seed)
        self._replay.run(self.patched, run, use)
        self.heartbeat()
