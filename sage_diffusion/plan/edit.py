"""Plans changed by hand or code: checked, merged, moved to another schedule."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.plan.fingerprint import fingerprint, mismatch
from sage_diffusion.plan.lookup import without_shadowed
from sage_diffusion.plan.noise import NoiseScale
from sage_diffusion.plan.plan import PrecisionPlan
from sage_diffusion.plan.rules import PlanError, Rule

#: Ends the name of a plan that one spec and a text box make.
_CUSTOM = "(custom)"


def check_fingerprint(plan: PrecisionPlan, found: Mapping[str, Any]) -> None:
    """Refuse a plan whose fingerprint is another model's; plans without one pass.

    Raises:
        PlanError: saying what differs.
    """
    reason = mismatch(plan.fingerprint, found)
    if reason is not None:
        raise PlanError(f"the plan does not belong to this model: {reason}")


def misfits(plan: PrecisionPlan, layers: Sequence[str], model: str, strict: bool) -> list[str]:
    """Why a plan may not be for a model, in words for whoever runs it.

    Args:
        plan: any.
        layers: the model's.
        model: class of the model.
        strict: refuse instead.

    Raises:
        PlanError: strict, and it does not fit.
    """
    try:
        if plan.fingerprint:
            check_fingerprint(plan, fingerprint(layers, model=model))
        words = custom_globs_that_miss(plan, layers)
        if words is not None:
            raise PlanError(words)
        return plan.check(layers, strict=strict)
    except PlanError as error:
        if strict:
            raise
        return [str(error)]


def merge_plans(first: PrecisionPlan, second: PrecisionPlan) -> PrecisionPlan:
    """One plan: ``first``'s rules before ``second``'s, ``second``'s default for the rest.

    Rules of ``second`` that ``first``'s leave nothing are dropped.  What only describes one of the
    two (schedule, fingerprint, calibration) is kept where both agree or only ``second`` has it, as
    progress of the merged rules is counted in one schedule only.
    ``sign_seed`` is ``second``'s.

    Raises:
        PlanError: both plans store schedules, and different ones, or fingerprints of different
            models.
    """
    reason = mismatch(first.fingerprint, second.fingerprint or {})
    if reason is not None:
        raise PlanError(f"plans of different models can't be merged: the first one, {reason}")
    units = {plan.schedule_unit for plan in (first, second) if plan.schedule}
    if len(units - {None}) > 1:
        raise PlanError(
            "plans with schedules in different units can't be merged: "
            + " and ".join(sorted(map(str, units)))
        )
    if first.schedule and second.schedule and first.schedule != second.schedule:
        raise PlanError(
            "plans with different schedules can't be merged: their rules count progress "
            f"differently ({len(first.schedule)} and {len(second.schedule)} sigmas)"
        )
    same = first.fingerprint == second.fingerprint
    return replace(
        second,
        rules=without_shadowed((*first.rules, *second.rules)),
        name=second.name or first.name,
        model=second.model or first.model,
        schedule=second.schedule or first.schedule,
        schedule_unit=second.schedule_unit or first.schedule_unit,
        fingerprint=second.fingerprint if same or not first.fingerprint else None,
        calibration=None if first.calibration else second.calibration,
    )


def remap_plan(
    plan: PrecisionPlan, sigmas: Sequence[float], unit: str | None = None
) -> PrecisionPlan:
    """The plan's rules moved to another schedule: each range covers the same sigmas as before.

    Args:
        plan: must store its own schedule.
        sigmas: the other schedule, strictly descending (log-SNR ascending), one value per step.
        unit: of the other schedule; None if it is the plan's.

    Raises:
        PlanError: the plan stores no schedule, ``sigmas`` are no schedule, or the units can't be
            compared without the model (timesteps and anything else).  A rule that covers
            none of their steps is dropped.
    """
    if plan.schedule is None:
        raise PlanError("the plan stores no schedule, so it can't be moved to another one")
    target = tuple(float(s) for s in sigmas)
    unit = unit or plan.schedule_unit
    falling = target[::-1] if unit == "log-snr" else target
    if len(target) < 2 or any(b >= a for a, b in itertools.pairwise(falling)):
        raise PlanError("sigmas must be at least two strictly descending values")
    place: Callable[[float], float] | None = plan.remap
    if unit != plan.schedule_unit:
        place = NoiseScale(unit).places(plan.schedule, plan.schedule_unit)
    if place is None:
        raise PlanError(
            f"a schedule in {plan.schedule_unit or 'an unknown unit'} can't be compared with one "
            f"in {unit} without the model's noise schedule"
        )
    # Where step i of the new schedule stands in the old one; a rule keeps the steps inside it.
    places = [place(s) for s in target]
    last = len(target) - 1
    rules: list[Rule] = []
    for rule in plan.rules:
        inside = [
            i
            for i, p in enumerate(places)
            if rule.start <= p < rule.end or (rule.end == 1.0 and p >= 1.0)
        ]
        if not inside:
            continue
        start = 0.0 if inside[0] == 0 else (inside[0] - 0.5) / last
        end = 1.0 if inside[-1] == last else (inside[-1] + 0.5) / last
        rules.append(replace(rule, start=start, end=end))
    return replace(plan, rules=without_shadowed(rules), schedule=target, schedule_unit=unit)


def custom(
    spec: str,
    *,
    start: float = 0.0,
    end: float = 1.0,
    layers: str = "*",
    min_tokens: int = 0,
) -> PrecisionPlan:
    """One spec in a range of steps and layers, FP16 elsewhere.

    Args:
        spec: an :class:`AttentionSpec`'s name.
        start, end: range of progress.
        layers: globs separated by commas, spaces or lines; ``!glob`` leaves layers alone.
        min_tokens: calls with fewer keys are left alone.

    Raises:
        PlanError: a wrong spec, start not below end, or no glob.
    """
    try:
        parsed = AttentionSpec.parse(spec)
    except ValueError as error:
        raise PlanError(str(error)) from None
    globs = [glob for glob in re.split(r"[,\s]+", layers) if glob]
    kept = [glob[1:] for glob in globs if glob.startswith("!")]
    wanted = [glob for glob in globs if not glob.startswith("!")] or ["*"]
    if not globs or "" in kept:
        raise PlanError(f"layers must be globs such as *, double.* or !single.0*, got {layers!r}")
    rules = [Rule(FP16, glob) for glob in dict.fromkeys(kept)]
    rules += [
        Rule(parsed, glob, start, end, min_tokens=min_tokens) for glob in dict.fromkeys(wanted)
    ]
    return PrecisionPlan(FP16, tuple(rules), name=f"{parsed} {_CUSTOM}")


def custom_globs_that_miss(plan: PrecisionPlan, layers: Sequence[str]) -> str | None:
    """What is wrong with the globs of a :func:`custom` plan, for who typed them; None of others.

    Args:
        plan: any.
        layers: the model's.
    """
    missed = [plan.rules[i].layers for i in plan.unmatched(layers)]
    if not (plan.name or "").endswith(_CUSTOM) or not missed:
        return None
    there = ", ".join(list(layers)[:4]) + (f", .. ({len(layers)})" if len(layers) > 4 else "")
    globs = ", ".join(map(repr, missed))
    return f"layers: {globs} match{'es' * (len(missed) == 1)} no layer of this model: {there}"


# ---------------------------------------------------------------------- edits
def with_rule(plan: PrecisionPlan, rule: Rule, *, first: bool = True) -> PrecisionPlan:
    """``plan`` with a rule of highest or lowest priority; rules it makes pointless go."""
    if first:
        rest = [old for old in plan.rules if not rule.covers(old)]
        return replace(plan, rules=(rule, *rest), calibration=None)
    return replace(plan, rules=(*plan.rules, rule), calibration=None)


def without_rule(plan: PrecisionPlan, index: int) -> PrecisionPlan:
    """``plan`` without one rule.

    Raises:
        PlanError: it has no such rule.
    """
    if not plan.rules:
        raise PlanError("the plan has no rules to remove, only a default")
    if not 0 <= index < len(plan.rules):
        raise PlanError(f"rule must be between 0 and {len(plan.rules) - 1}, got {index}")
    rules = (*plan.rules[:index], *plan.rules[index + 1 :])
    return replace(plan, rules=rules, calibration=None)


def with_default(plan: PrecisionPlan, spec: str) -> PrecisionPlan:
    """``plan`` with another spec where no rule applies."""
    return replace(plan, default=AttentionSpec.parse(spec), calibration=None)


def renamed(plan: PrecisionPlan, name: str) -> PrecisionPlan:
    """``plan`` under another name."""
    return replace(plan, name=name.strip() or None)
