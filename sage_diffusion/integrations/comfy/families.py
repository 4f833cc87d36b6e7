"""Rules of thumb for model families: nobody calibrated them, and each has a reason.

A rule names layers by their part in the model - its first block, its last, cross-attention - so
that the same rules fit every size of a family.  What is not named runs 8 bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sage_diffusion.adapt.presets import (
    EIGHT_BIT,
    first_native,
    least_tokens,
    preset,
    this_card,
    worthwhile,
)
from sage_diffusion.integrations.comfy.carried import Chosen
from sage_diffusion.integrations.comfy.layers import layer_names
from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.plan import PrecisionPlan, Rule

Part = Literal["first", "last", "cross", "begin", "end", "rest"]

#: Calls with fewer keys cost little time: small maps of a UNet, refiners of the prompt.  A card
#: may need more until anything is gained.
MIN_TOKENS = 1024

BODY = EIGHT_BIT
CAREFUL = ("int8/fp16",)
OWN = ("fp16",)


@dataclass(frozen=True)
class Advice:
    """One rule.

    Attributes:
        part: layers, or steps (``begin`` is the first tenth, ``end`` the last twentieth).
        specs: by preference, the first that the machine runs natively counts.
        reason: why.
    """

    part: Part
    specs: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Family:
    """Models that are alike.

    Attributes:
        name: for people.
        classes: of ComfyUI's model configurations; classes derived from them count, too.
        advice: first match wins.
    """

    name: str
    classes: tuple[str, ...]
    advice: tuple[Advice, ...]


_FIRST = Advice("first", CAREFUL, "the first block meets raw tokens of picture and prompt")
_LAST = Advice("last", CAREFUL, "nothing after the last block corrects its error")
_CROSS = Advice("cross", OWN, "few keys: nothing to gain, and an error moves what is drawn")
_BEGIN = Advice("begin", CAREFUL, "the first steps lay the picture out, and later ones follow")
_END = Advice("end", CAREFUL, "the last steps write detail, which flickers from frame to frame")
_REST = Advice("rest", BODY, "8 bits keep what calibrations of other models kept")

_PICTURE = (_FIRST, _LAST, _BEGIN, _REST)
_VIDEO = (_CROSS, _FIRST, _LAST, _BEGIN, _END, _REST)

#: The first family whose class a model has counts.
FAMILIES: tuple[Family, ...] = (
    Family("Flux.2", ("Flux2",), _PICTURE),
    Family("Flux.1 and Chroma", ("Flux", "Chroma", "LongCatImage"), _PICTURE),
    Family("Wan 2.1 and 2.2", ("WAN21_T2V",), _VIDEO),
    Family("Qwen-Image", ("QwenImage",), _PICTURE),
    Family("Z-Image and Lumina 2", ("Lumina2",), _PICTURE),
    Family("LTX-Video and LTX-2", ("LTXV",), _VIDEO),
    Family("HunyuanVideo and 1.5", ("HunyuanVideo",), _VIDEO),
    Family("Stable Diffusion 3 and 3.5", ("SD3",), _PICTURE),
    Family("SDXL", ("SDXL",), (_CROSS, _BEGIN, _REST)),
    Family("Stable Diffusion 1 and 2", ("SD15", "SD20"), (_CROSS, _BEGIN, _REST)),
    Family(
        "MiniMax H3",
        ("MiniMaxH3",),
        (
            _CROSS,
            Advice("rest", BODY, "keys of its last blocks concentrate in few channels: rotate"),
        ),
    ),
)


def family_of(classes: Sequence[str]) -> Family | None:
    """The family of a model, None if it is of none of these.

    Args:
        classes: names of its configuration's class and of those it derives from.
    """
    return next((family for family in FAMILIES if {*family.classes} & {*classes}), None)


def family_plan(family: Family, layers: Sequence[str], device: str) -> PrecisionPlan:
    """A family's rules for a model.

    Args:
        family: of the model.
        layers: its names, in the order of its blocks.
        device: that it runs on.
    """
    card = this_card(torch.device(device))
    # One number for all: a layer that needs care must not fall to the rule for the rest.
    pays = least_tokens(first_native(BODY, device), "fp16", card, MIN_TOKENS)
    rules: list[Rule] = []
    for advice in family.advice:
        spec = first_native(worthwhile(advice.specs, card) or OWN, device)
        found = _rules(advice.part, spec, layers, pays if spec.quantized else 0)
        rules += [rule for rule in found if rule not in rules]
    return PrecisionPlan(FP16, tuple(rules), name=f"{family.name}: rules of thumb, not calibrated")


def plan_for(model: Any, device: str) -> Chosen:
    """The rules of a MODEL's family; the balanced preset where it is of none.

    Args:
        model: a ``ModelPatcher``.
        device: that it runs on.
    """
    config = getattr(model.model, "model_config", model.model)
    family = family_of([kind.__name__ for kind in type(config).__mro__])
    if family is None:
        name = type(config).__name__
        return Chosen(preset("balanced", device), f"no rules for {name}: the balanced preset")
    return Chosen(family_plan(family, layer_names(model.model.diffusion_model), device), "")


def _rules(part: Part, spec: AttentionSpec, layers: Sequence[str], least: int) -> list[Rule]:
    if part == "rest":
        return [Rule(spec, min_tokens=least)]
    if part == "begin":
        return [Rule(spec, end=0.1, min_tokens=least)]
    if part == "end":
        return [Rule(spec, start=0.95, min_tokens=least)]
    if part == "cross":
        return [Rule(spec, glob) for glob in ("*.attn2", "*.[1-9]") if _matched(glob, layers)]
    blocks = [name for name in layers if re.fullmatch(r"(double|single)\.\d+", name)]
    if not blocks:
        return []
    return [Rule(spec, blocks[0 if part == "first" else -1], min_tokens=least)]


def _matched(glob: str, layers: Sequence[str]) -> bool:
    ending = r"\.attn2$" if glob.endswith("attn2") else r"^(double|single)\.\d+\.[1-9]$"
    return any(re.search(ending, name) for name in layers)


def advice_table() -> str:
    """The families' rules as a table in Markdown."""
    what = {
        "first": "first block",
        "last": "last block",
        "cross": "cross-attention",
        "begin": "first tenth of the steps",
        "end": "last twentieth of the steps",
        "rest": "everything else",
    }
    lines = ["| family | rule | why |", "|---|---|---|"]
    for family in FAMILIES:
        for i, advice in enumerate(family.advice):
            name = family.name if i == 0 else ""
            runs = "8 bit" if advice.specs == BODY else f"`{advice.specs[0]}`"
            lines.append(f"| {name} | {what[advice.part]}: {runs} | {advice.reason} |")
    return "\n".join(lines)
