"""Plans by name: what runs best on this machine.

Which spec that is differs by card: INT8 P and V are as fast on a GeForce as FP8 with a half
accumulator, and more accurate (``python -m benchmarks.fidelity``); an H100 is twice as fast with
FP8 and gains nothing where P and V stay FP16.  Of the specs for a part of a plan the one with the
cheapest main loop is taken that the machine runs natively, of equals the most accurate, as they are
listed in that order; the preset *quality* takes the most accurate that is faster than FP16 at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sage_diffusion.adapt.costs import (
    CostTableError,
    call_milliseconds,
    card_costs,
    relative_cost,
)
from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.machine import device_arch
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule

#: Calls with fewer keys cost next to nothing and decide much: the text tokens of CLIP, refiners.
MIN_TOKENS = 128

#: 8 bits throughout, by accuracy; comfy-kitchen, which serves RTX 20, does not smooth V.
EIGHT_BIT = (
    "int8/int8",
    "int8/fp8",
    "int8/fp8-fast",
    "int8/int8-smooth_v-balance-tile_v",
    "int8/fp16",
)

#: The same and half P and V first.
ACCURATE = ("int8/fp16", *EIGHT_BIT[:-1])

#: Main loops that take more than this of FP16's are not worth an error.
WORTH = 0.9

#: 4-bit Q and K.  On an A100 scales of V by tiles cost more than the pass over V that they spare.
FOUR_BIT = ("int4/fp8-fast", "int4/int8", "int4/int8-tile_v", "fp4/fp8-fast")

#: Heads and head dim of the calls that a preset's numbers of tokens are predicted for, and the
#: steps in which those are told apart.
_HEADS, _HEAD_DIM, _TOKENS_STEP, _MOST_TOKENS = 24, 128, 64, 65536

#: Tokens of a picture of 1024 x 1024 with its prompt, of which a preset's time is told.
_TOLD_TOKENS = 4608

#: Compute capability -> the card of its architecture.
CARD_OF = {
    (8, 0): "a100",
    (8, 6): "rtx3090",
    (8, 9): "rtx4090",
    (9, 0): "h100",
    (12, 0): "rtx5090",
}


@dataclass(frozen=True)
class Preset:
    """What runs when.

    Attributes:
        describes: one line for a tooltip.
        body: specs of most steps.
        edges: of the first tenth of the steps, where the picture is laid out.
        long: of most steps of calls that are long enough for these to be faster than ``body``.
        accurate: the most accurate of ``body`` that gains anything, not the cheapest.
    """

    describes: str
    body: tuple[str, ...]
    edges: tuple[str, ...]
    long: tuple[str, ...] = ()
    accurate: bool = False


PRESETS: Mapping[str, Preset] = {
    "quality": Preset(
        "INT8 scores with FP16 values, or others where those gain nothing; the first tenth of the "
        "steps stays as it is",
        ACCURATE,
        ("fp16",),
        accurate=True,
    ),
    "balanced": Preset(
        "INT8 scores with INT8 or FP8 values; the first tenth of the steps has FP16 values",
        EIGHT_BIT,
        ("int8/fp16", "fp16"),
    ),
    "fast": Preset(
        "4-bit scores where the GPU has them and calls are long enough, else INT8; the first tenth "
        "of the steps is balanced",
        EIGHT_BIT,
        EIGHT_BIT,
        FOUR_BIT,
    ),
}


def this_card(device: torch.device) -> str | None:
    """The card that stands for a device's architecture, None where none does."""
    capability, _ = device_arch(device)
    return None if capability is None else CARD_OF.get(capability)


@functools.lru_cache(maxsize=16)
def preset(name: str, device: str = "cpu") -> PrecisionPlan:
    """A preset's plan on a device.

    Raises:
        PlanError: no preset has that name.
    """
    return _plan(name, this_card(torch.device(device)), lambda spec: runs(spec, device))


def card_preset(name: str, card: str) -> PrecisionPlan:
    """A preset's plan on a card that need not be here, of the specs whose costs are known there.

    Raises:
        PlanError: no preset has that name.
        CostTableError: there is no such card.
    """
    costs = card_costs(card)
    return _plan(name, card, lambda spec: spec.formats in costs)


def _plan(name: str, card: str | None, runs: Callable[[AttentionSpec], bool]) -> PrecisionPlan:
    if name not in PRESETS:
        raise PlanError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    chosen = PRESETS[name]
    names = (chosen.accurate and worthwhile(chosen.body, card)) or chosen.body
    body = _first(names, None if chosen.accurate else card, runs)
    edges = _first(chosen.edges, card, runs)
    pays = least_tokens(body, "fp16", card, MIN_TOKENS)
    rules = []
    start = 0.0
    if edges.quantized:
        from_tokens = least_tokens(edges, "fp16", card, MIN_TOKENS)
        rules.append(Rule(edges, "*", 0.0, 0.1, min_tokens=from_tokens))
    if edges != body:
        start = 0.1
    fewest = _MOST_TOKENS
    if chosen.long and runs(long := _first(chosen.long, card, runs)):
        beaten = (least_tokens(long, other, card, MIN_TOKENS) for other in (body, "fp16"))
        fewest = max(beaten)
        rules.append(Rule(long, "*", start, min_tokens=fewest))
    if pays < fewest:
        rules.append(Rule(body, "*", start, min_tokens=pays))
    return PrecisionPlan(FP16, tuple(rules), name=name)


def describe_preset(name: str, plan: PrecisionPlan, card: str | None) -> str:
    """``fast: int8/int8 from 1,344 tokens, int4/fp8-fast from 1,792; 0.38 of ..`` of its plan."""
    specs: dict[str, int] = {}
    for rule in plan.rules:
        specs.setdefault(str(rule.spec), rule.min_tokens)
    listed = ", ".join(f"{spec} from {n:,} tokens" for spec, n in specs.items())
    text = f"{name}: {listed} ({PRESETS[name].describes})"
    if card is None:
        return text
    costs = card_costs(card)
    size = _TOLD_TOKENS, _TOLD_TOKENS, _HEAD_DIM, _HEADS
    body = plan.resolve("", 0.5, tokens=_TOLD_TOKENS)
    share = call_milliseconds(body, costs, *size) / call_milliseconds("fp16", costs, *size)
    return f"{text}; predicted {share:.2f} of FP16's time at {_TOLD_TOKENS:,} tokens"


def worthwhile(names: Sequence[str], card: str | None) -> list[str]:
    """Those whose main loops are faster than FP16's; all where nothing is known."""
    if card is None:
        return list(names)
    costs = card_costs(card)
    known = [name for name in names if AttentionSpec.parse(name).formats in costs]
    return [name for name in known if relative_cost(name, costs, _HEAD_DIM) <= WORTH]


def cheapest_first(names: Sequence[str], card: str | None) -> list[str]:
    """By their main loops on a card; those that it can't run come last.

    Args:
        names: specs, by accuracy.
        card: None leaves them as they are.
    """
    if card is None:
        return list(names)
    costs = card_costs(card)

    def cycles(name: str) -> float:
        try:
            return relative_cost(name, costs, _HEAD_DIM)
        except CostTableError:
            return math.inf

    return sorted(names, key=cycles)


def first_native(names: Sequence[str], device: str) -> AttentionSpec:
    """The cheapest spec that ``auto`` would run; the first of all where none is (and says why)."""
    return _first(names, this_card(torch.device(device)), lambda spec: runs(spec, device))


def _first(
    names: Sequence[str], card: str | None, runs: Callable[[AttentionSpec], bool]
) -> AttentionSpec:
    specs = [AttentionSpec.parse(name) for name in cheapest_first(names, card)]
    return next((spec for spec in specs if runs(spec)), AttentionSpec.parse(names[0]))


def runs(spec: AttentionSpec, device: str) -> bool:
    """Would ``auto`` run it?"""
    return not spec.quantized or backends.automatic(AttentionCall.typical(spec, device)) is not None


def least_tokens(
    spec: AttentionSpec | str, other: AttentionSpec | str, card: str | None, least: int
) -> int:
    """Tokens from which calls of a spec are predicted to be faster than those of another.

    Args:
        spec, other: the first has the cheaper main loop and more to do beside it.
        card: None where nothing is predicted.
        least: what is returned then, where the spec is never faster, and at least.
    """
    if card is None:
        return least
    costs = card_costs(card)

    def time(name: AttentionSpec | str, tokens: int) -> float:
        return call_milliseconds(name, costs, tokens, tokens, _HEAD_DIM, _HEADS)

    try:
        for tokens in range(_TOKENS_STEP, _MOST_TOKENS, _TOKENS_STEP):
            if time(spec, tokens) < time(other, tokens):
                return max(tokens, least)
    except CostTableError:
        pass  # a spec that the card runs, but whose time nobody told
    return least
