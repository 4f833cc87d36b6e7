"""Plans by name: what runs best on this machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule

#: Calls with fewer keys cost next to nothing and decide much: the text tokens of CLIP, refiners.
MIN_TOKENS = 128


@dataclass(frozen=True)
class Preset:
    """Specs by preference, the first that this machine runs natively counts.

    Attributes:
        describes: one line for a tooltip.
        body: of most steps.
        edges: of the first tenth of the steps, where the picture is laid out.
    """

    describes: str
    body: tuple[str, ...]
    edges: tuple[str, ...]


#: Where a card has no FP8; comfy-kitchen, which serves RTX 20, does not smooth V.
_INT8 = ("int8/int8", "int8/int8-smooth_v-balance", "int8/fp16")

PRESETS: Mapping[str, Preset] = {
    "quality": Preset(
        "INT8 scores with FP16 values; the first tenth of the steps stays as it is",
        ("int8/fp16",),
        ("fp16",),
    ),
    "balanced": Preset(
        "INT8 scores with FP8 or INT8 values; the first tenth of the steps has FP16 values",
        ("int8/fp8", *_INT8),
        ("int8/fp16",),
    ),
    "fast": Preset(
        "4-bit scores where the GPU has them, else INT8; the first tenth of the steps is balanced",
        ("int4/fp8-fast", "int8/fp8-fast", *_INT8),
        ("int8/fp8", *_INT8),
    ),
}


@functools.lru_cache(maxsize=16)
def preset(name: str, device: str = "cpu") -> PrecisionPlan:
    """A preset's plan on a device.

    Raises:
        PlanError: no preset has that name.
    """
    if name not in PRESETS:
        raise PlanError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    chosen = PRESETS[name]
    body = first_native(chosen.body, device)
    edges = first_native(chosen.edges, device)
    rules = [Rule(edges, "*", 0.0, 0.1, min_tokens=MIN_TOKENS)] if edges.quantized else []
    start = 0.0 if edges.quantized else 0.1
    rules.append(Rule(body, "*", start, min_tokens=MIN_TOKENS))
    return PrecisionPlan(FP16, tuple(rules), name=name)


def first_native(names: Sequence[str], device: str) -> AttentionSpec:
    """The first spec that ``auto`` would run; the first of all where none is (and says why)."""
    specs = [AttentionSpec.parse(name) for name in names]
    for spec in specs:
        if backends.automatic(AttentionCall.typical(spec, device)) or not spec.quantized:
            return spec
    return specs[0]
