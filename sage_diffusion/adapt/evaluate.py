"""Proof of a plan on prompts and seeds that calibration never saw, beside the rules in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sage_diffusion.accuracy.compare import Generation, end_to_end
from sage_diffusion.adapt.costs import CostTableError, load_costs, relative_cost
from sage_diffusion.adapt.frechet import frechet_distance, picture_features
from sage_diffusion.adapt.planner import predicted_time
from sage_diffusion.adapt.table import BOTH, ScoreTable, SeenCalls
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan, Rule, step_progress
from sage_diffusion.plan.edit import check_fingerprint
from sage_diffusion.plan.globs import step_range

#: Uniform specs that a plan is compared with.
UNIFORM = ("int8/fp16", "int8/int8", "int8/fp8", "int8/fp8-fast", "int4/fp8-fast", "int4/int8")


@dataclass(frozen=True)
class Scored:
    """One plan on the held-out runs.

    Attributes:
        name: of the plan.
        kind: "adaptive", "uniform" or "first_last".
        predicted_time: relative to FP16 attention.
        psnr: dB, of the squared error averaged over all pictures (or latents where a host makes no
            pictures).
        ssim: mean, None where pictures are too small.
        latent_cosine: after each step, mean over the runs.
        frechet: distance from FP16's pictures, None below two pictures.
        below_8_bit: share of the work whose Q K^T runs in 4 bit.
        pictures: PSNR of every picture; one chaotic picture can decide ``psnr``.
    """

    name: str
    kind: str
    predicted_time: float
    psnr: float
    ssim: float | None
    latent_cosine: tuple[float, ...]
    frechet: float | None
    below_8_bit: float
    pictures: tuple[float, ...] = ()

    @property
    def mean_psnr(self) -> float:
        """dB, mean over the pictures."""
        return sum(self.pictures) / len(self.pictures) if self.pictures else self.psnr

    def to_dict(self) -> dict[str, Any]:
        """Plain data; an infinite PSNR (equal pictures) is null."""
        return {
            "psnr": round(self.psnr, 3) if math.isfinite(self.psnr) else None,
            "mean_psnr": round(self.mean_psnr, 3) if math.isfinite(self.mean_psnr) else None,
            "predicted_time": round(self.predicted_time, 4),
            "ssim": self.ssim,
            "latent_cosine": [round(c, 7) for c in self.latent_cosine],
            "frechet": self.frechet,
            "below_8_bit": round(self.below_8_bit, 4),
            "pictures": [round(p, 2) if math.isfinite(p) else None for p in self.pictures],
        }


@dataclass(frozen=True)
class Evaluation:
    """All plans on the same held-out runs."""

    scored: tuple[Scored, ...]
    card: str
    runs: int

    def of_kind(self, kind: str) -> tuple[Scored, ...]:
        """The plans of one kind, as run."""
        return tuple(s for s in self.scored if s.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """``{"adaptive": {..}, "uniform": {spec: {..}}, "first_last": {name: {..}}, ..}``.

        Several adaptive plans: the first is ``adaptive``, all are in ``plans``.
        """
        adaptive = self.of_kind("adaptive")
        return {
            "adaptive": adaptive[0].to_dict() if adaptive else None,
            "plans": {s.name: s.to_dict() for s in adaptive},
            "uniform": {s.name: s.to_dict() for s in self.of_kind("uniform")},
            "first_last": {s.name: s.to_dict() for s in self.of_kind("first_last")},
            "card": self.card,
            "time_is": "predicted bound relative to FP16 attention, no timing",
            "runs": self.runs,
        }


def evaluate(
    generate: Callable[[AttentionSession, Any, int], Generation],
    pairs: Sequence[tuple[Any, int]],
    plans: Mapping[str, PrecisionPlan | str],
    *,
    uniform: Sequence[str] = UNIFORM,
    costs: str | Path | Mapping[str, float] = "rtx4090",
    made: Mapping[str, Sequence[Generation]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Run plans, uniform specs and "first and last N steps" rules on held-out prompts and seeds.

    The first-and-last rules mix the fastest and the best 8-bit uniform spec at the predicted time
    of the first plan: all N steps first, all last, or half and half.

    Args:
        generate: samples one (prompt, seed) with a session attached.
        pairs: held-out (prompt, seed).
        plans: name -> adaptive plan.
        uniform: specs to compare with; those without a cost are left out.
        costs: a card's name, a mapping, or a JSON file.
        made: name of a plan or uniform spec -> what ``generate`` made of each pair with it, where
            it ran already.
        progress: called as ``progress(name, done, total)`` after each plan.

    Raises:
        ValueError: no pairs, no plans, an unknown spec, or no attention call reached the session.
        PlanError: a plan was calibrated on another model.
        CostTableError: the card can't run one of the plans' specs.
    """
    parsed = {name: PrecisionPlan.of(plan) for name, plan in plans.items()}
    if not pairs or not plans:
        raise ValueError(f"need held-out runs and plans, got {len(pairs)} and {len(plans)}")
    prices = load_costs(costs)
    known = [str(AttentionSpec.parse(spec)) for spec in uniform if has_cost(spec, prices)]
    seen = SeenCalls()
    session = AttentionSession("fp16", observers=(seen,))
    exact = [generate(session, prompt, seed) for prompt, seed in pairs[:1]]
    table = ScoreTable((), session.where.steps, {"head_dims": seen.head_dims})  # to predict times
    seen.store(table)
    if not table.layers:
        raise ValueError("no attention call reached the session: there is nothing to evaluate")
    for plan in parsed.values():  # before anything else is run
        check_fingerprint(plan, table.fingerprint | {"layers": list(session.layers)})
        predicted_time(table, plan, prices)
    exact += [generate(AttentionSession("fp16"), prompt, seed) for prompt, seed in pairs[1:]]

    todo = [(name, "adaptive", plan) for name, plan in parsed.items()]
    todo += [(spec, "uniform", PrecisionPlan.of(spec)) for spec in known]
    time = predicted_time(table, next(iter(parsed.values())), prices)
    todo += [
        (name, "first_last", plan)
        for name, plan in first_last_rules(table, known, prices, time).items()
    ]
    scored = []
    for done, (name, kind, plan) in enumerate(todo):
        found = (made or {}).get(name) or [
            generate(AttentionSession(plan), prompt, seed) for prompt, seed in pairs
        ]
        scored.append(
            _score(name, kind, plan, predicted_time(table, plan, prices), found, exact, table)
        )
        if progress is not None:
            progress(name, done + 1, len(todo))
    label = prices.card or (str(costs) if isinstance(costs, (str, Path)) else "custom")
    return Evaluation(tuple(scored), label, len(pairs))


def has_cost(spec: str, prices: Mapping[str, float]) -> bool:
    """Can a card with these costs run the spec?"""
    try:
        relative_cost(spec, prices)
    except CostTableError:
        return False
    return True


def first_last_rules(
    table: ScoreTable, specs: Sequence[str], prices: Mapping[str, float], time: float
) -> dict[str, PrecisionPlan]:
    """Plans that run the first and last steps in 8 bit and the others in 4 bit, within ``time``."""
    low = [s for s in specs if s.startswith(("int4", "fp4"))]
    high = [s for s in specs if s.startswith("int8")]
    if not low or not high:
        return {}
    cheap, dear = (min(some, key=lambda s: relative_cost(s, prices)) for some in (low, high))
    plans = {}
    count = 0
    for n in range(1, table.steps):
        plan = _ends(cheap, dear, 0, n, table.steps)
        if predicted_time(table, plan, prices) > time * (1 + 1e-6):
            break
        count = n
    for first in sorted({0, count // 2, count}):
        last = count - first
        if count:
            plan = _ends(cheap, dear, first, last, table.steps)
            plans[f"{dear} first {first} last {last}, {cheap}"] = plan
    return plans


def _ends(low: str, high: str, first: int, last: int, steps: int) -> PrecisionPlan:
    ranges = ([(0, first)] if first else []) + ([(steps - last, steps)] if last else [])
    spec = AttentionSpec.parse(high)
    rules = tuple(Rule(spec, "*", *step_range(a, b, steps)) for a, b in ranges)
    return PrecisionPlan(AttentionSpec.parse(low), rules)


def _score(
    name: str,
    kind: str,
    plan: PrecisionPlan,
    time: float,
    found: Sequence[Generation],
    exact: Sequence[Generation],
    table: ScoreTable,
) -> Scored:
    reports = [end_to_end(a, b) for a, b in zip(found, exact, strict=True)]
    errors = [10 ** (-value / 10) for r in reports for value in r.psnr]
    frechet = None
    if not errors:  # a host that ends in latents: their own range stands for the pictures'
        ends = [[g.latents[-1].float() for g in some] for some in (found, exact)]
        last = list(zip(*ends, strict=True))
        top = max(float(b.max() - b.min()) for _, b in last) ** 2
        errors = [float((a - b).square().mean()) / top for a, b in last]
    else:
        a, b = (
            torch.cat([g.images for g in some if g.images is not None]) for some in (found, exact)
        )
        if len(a) > 1:
            frechet = frechet_distance(picture_features(a), picture_features(b))
    error = sum(errors) / len(errors)
    ssims = [r.mean_ssim for r in reports if r.mean_ssim is not None]
    cosines = [r.latent_cosine for r in reports if r.latent_cosine]
    return Scored(
        name,
        kind,
        time,
        -10 * math.log10(error) if error > 0 else math.inf,
        sum(ssims) / len(ssims) if ssims else None,
        tuple(sum(c) / len(c) for c in zip(*cosines, strict=True)) if cosines else (),
        frechet,
        _below_8_bit(table, plan),
        tuple(-10 * math.log10(e) if e > 0 else math.inf for e in errors),
    )


def _below_8_bit(table: ScoreTable, plan: PrecisionPlan) -> float:
    work = table.filled_work()
    total = 0.0
    for i, layer in enumerate(table.layers):
        for step in range(table.steps):
            place = step_progress(step, table.steps)
            for b, branch in enumerate(table.branches):
                spec = plan.resolve(layer, place, branch=None if branch == BOTH else branch)
                total += work[i, step, b] * (spec.qk in (Precision.INT4, Precision.FP4))
    return float(total / work.sum())
