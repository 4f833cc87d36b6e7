"""What several tests ask of a patched pipeline."""

from __future__ import annotations

import functools

from integrations.tiny_pipelines import build
from torch import Tensor, nn

from sage_diffusion.integrations.diffusers.processors import is_routed


@functools.cache
def plain(name: str, steps: int = 2) -> Tensor:
    return build(name)(steps=steps)


def processors(model: nn.Module) -> list[object]:
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


def routed(model: nn.Module) -> int:
    return sum(is_routed(p) for p in processors(model))


def calls_per_step(name: str) -> int:
    return {"sd15": 8, "flux": 4, "wan": 8, "sd3": 2}[name]
