"""From a score table and a card's costs to the plan of least time or of best quality."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.compress import Packed, compress, rules_of
from sage_diffusion.adapt.costs import Costs, CostTableError, load_costs, relative_cost
from sage_diffusion.adapt.coupling import (
    Coupling,
    correlation_matrix,
    exchange,
    groups_of,
    lower_bound,
)
from sage_diffusion.adapt.sensitivity import cell_damage, stage_of
from sage_diffusion.adapt.solve import Infeasible, solve
from sage_diffusion.adapt.table import BOTH, ScoreTable
from sage_diffusion.adapt.times import cell_times, of_calls
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PlanError, PrecisionPlan, step_progress

#: Prices of one change of spec along the steps that are tried, where errors add up: relative to a
#: cell's share of the final error.
_PRICES = (0.25, 0.75, 2.5)

#: Halvings of the range of budgets, when a floor is given and errors add up.
_BUDGETS = 10


class Unreachable(PlanError):
    """No plan meets the floor or the budget; the message says the best reachable."""


@dataclass(frozen=True)
class Problem:
    """What there is to choose from.

    Attributes:
        specs: options, fp16 among them.
        damage: final squared error of every cell and option, ``[L, S, B, K]``.
        time: of every cell and option, as a share of all of FP16 attention's, same shape.
        peak: range of the reference latents, None if only local errors are known.
        table: where the numbers come from.
        bar_db: root mean square that completed cells are expected to be off by, dB.
        coupling: how cells' errors add up, None if they are taken as independent.
    """

    specs: tuple[str, ...]
    damage: np.ndarray
    time: np.ndarray
    peak: float | None
    table: ScoreTable
    bar_db: float
    coupling: Coupling | None = None

    @property
    def exists(self) -> np.ndarray:
        """Cells that there are, ``[L, S, B]``."""
        return self.table.exists

    def quality(self, damage: float) -> float:
        """PSNR of the final latents in dB; without sensitivity, signal to error of attention."""
        top = 1.0 if self.peak is None else self.peak**2
        return 10 * math.log10(top / max(damage, 1e-14 * top))

    def allowed_damage(self, quality: float) -> float:
        """Inverse of :meth:`quality`."""
        return (1.0 if self.peak is None else self.peak**2) * 10 ** (-quality / 10)

    def totals(self, index: np.ndarray) -> tuple[float, float]:
        """Predicted time and damage of a choice ``[L, S, B]`` of options."""
        pick = np.take_along_axis(self.time, index[..., None], -1)[..., 0]
        spent = float(pick[self.exists].sum())
        if self.coupling is not None:
            return spent, self.coupling.total(index.reshape(len(index), -1))
        hurt = np.take_along_axis(self.damage, index[..., None], -1)[..., 0]
        return spent, float(hurt[self.exists].sum())


@dataclass(frozen=True)
class Planned:
    """A plan and what is predicted of it.

    Attributes:
        plan: few rules that resolve to ``index`` exactly.
        index: option of every cell, ``[L, S, B]``.
        specs: the options.
        time: relative to FP16 attention.
        quality: predicted, dB (see :meth:`Problem.quality`).
        ideal_time, ideal_quality: before the plan was compressed into few rules.
        gap: how far the ideal may be from the best, relative to its objective; 0 is proven best.
            Where errors add up, of its final error against that of mixed options.
    """

    plan: PrecisionPlan
    index: np.ndarray
    specs: tuple[str, ...]
    time: float
    quality: float
    ideal_time: float
    ideal_quality: float
    gap: float

    def share(self, test: Any) -> float:
        """Share of the cells whose spec's name passes ``test``."""
        hits = [test(self.specs[k]) for k in self.index.ravel().tolist()]
        return sum(hits) / len(hits)


def problem(
    table: ScoreTable,
    costs: str | Path | Mapping[str, float] = "rtx4090",
    specs: Sequence[str] | None = None,
) -> Problem:
    """Score table and costs as one knapsack.

    Args:
        table: calibrated.
        costs: a card's name, a mapping spec -> cost, or a JSON file of one.
        specs: options; fp16 and all that the table has and the card can run if None.

    Raises:
        CostTableError: a named spec has no cost, or the card can run none of the table's.
        PlanError: a named spec was not calibrated.
    """
    prices = load_costs(costs)
    exact = True
    if specs is None:
        chosen = []
        for name in table.specs:
            try:
                relative_cost(name, prices)
            except CostTableError:
                continue  # the card can't run it
            chosen.append(name)
        if not chosen:
            raise CostTableError(f"the card can run none of {', '.join(table.specs)}")
    else:
        chosen = [str(AttentionSpec.parse(name)) for name in specs]
        exact = "fp16" in chosen
        chosen = [name for name in dict.fromkeys(chosen) if name != "fp16"]
        for name in chosen:
            if name not in table.specs:
                raise PlanError(
                    f"{name} was not calibrated; the table has {', '.join(table.specs)}"
                )
    completed = complete(table)
    columns = [table.specs.index(name) for name in chosen]
    damage = cell_damage(table, completed.error)[..., columns]
    damage = np.nan_to_num(damage)
    if exact:
        damage = np.concatenate([np.zeros_like(damage[..., :1]), damage], -1)
    options = ("fp16", *chosen) if exact else tuple(chosen)
    return Problem(
        options,
        damage,
        cell_times(table, options, prices),
        None if table.sensitivity is None else float(table.sensitivity["peak"]),
        table,
        completed.rms_db,
        _coupling(table, options, damage),
    )


def _coupling(table: ScoreTable, specs: Sequence[str], damage: np.ndarray) -> Coupling | None:
    """How errors add up, if a gradient stage measured it; one spec everywhere adds up to the same
    total as its ``damage``."""
    found = table.sensitivity or {}
    if found.get("correlation") is None or list(found["branches"]) != list(table.branches):
        return None
    formats, member = groups_of(specs)
    measured, known = groups_of(table.specs)
    lags = np.einsum("kbcs,kg->gbcs", np.array(found["correlation"], dtype=np.float64), known)
    lags /= known.sum(0)[:, None, None, None]
    matrix = np.stack([correlation_matrix(lags[measured.index(name)]) for name in formats])
    flat = damage.reshape(len(damage), -1, damage.shape[-1])
    raw = Coupling(np.sqrt(flat), member, matrix)
    together = [raw.total(np.full(flat.shape[:2], k)) for k in range(len(specs))]
    scale = flat.sum((0, 1)) / np.maximum(together, 1e-300)
    return Coupling(np.sqrt(flat * scale), member, matrix)


def make_plan(
    table: ScoreTable,
    *,
    floor: float | None = None,
    budget: float | None = None,
    costs: str | Path | Mapping[str, float] = "rtx4090",
    specs: Sequence[str] | None = None,
    max_loss_db: float = 0.25,
    name: str | None = None,
) -> Planned:
    """The fastest plan that keeps a quality, or the best plan within a time.

    Args:
        table: calibrated.
        floor: least predicted quality in dB; the fastest such plan is made.
        budget: most predicted time, relative to FP16 attention; the best such plan is made.
        costs, specs: see :func:`problem`.
        max_loss_db: how much predicted quality the compression into few rules may cost (with a
            floor, the loss is taken from time instead and the floor holds).
        name: title of the plan.

    Raises:
        Unreachable: no plan meets the floor or the budget; says the best reachable.
        ValueError: not exactly one of ``floor`` and ``budget``, or one that is no number.
    """
    if (floor is None) == (budget is None):
        raise ValueError(f"give either floor or budget, got floor={floor}, budget={budget}")
    for name_of, goal in (("floor", floor), ("budget", budget)):
        if goal is not None and math.isnan(goal):
            raise ValueError(f"{name_of} must be a number, got {goal}")
    prices = load_costs(costs)
    task = problem(table, prices, specs)
    find = _independent if task.coupling is None else _together
    try:
        index, packed, gap = find(task, floor, budget, 10 ** (max_loss_db / 10))
    except Infeasible as error:
        if floor is not None:
            best = task.quality(error.best)
            message = f"no plan keeps {floor:.1f} dB, the best reachable is {best:.1f} dB"
        else:
            calls = " (whole calls, with quantization and launches)"
            message = (
                f"no plan takes {budget:.3f} of FP16's time, the fastest takes {error.best:.3f}"
                f"{calls if of_calls(table, prices) else ''}"
            )
        raise Unreachable(message) from None
    ideal_time, ideal_damage = task.totals(index)
    time_, damage_ = task.totals(packed.index)
    schedule = table.schedule if table.steps > 1 else None  # one step covers any schedule
    plan = PrecisionPlan(
        AttentionSpec.parse(packed.default),
        packed.rules,
        model=table.fingerprint.get("model"),
        name=name,
        schedule=None if schedule is None else tuple(schedule),
        schedule_unit=None if schedule is None else table.schedule_unit,
        fingerprint=table.fingerprint or None,
        calibration=_provenance(task, time_, damage_, floor, budget, prices),
        sign_seed=table.unquantized.sign_seed,
    )
    return Planned(
        plan,
        packed.index,
        task.specs,
        time_,
        task.quality(damage_),
        ideal_time,
        task.quality(ideal_damage),
        gap,
    )


def _independent(
    task: Problem, floor: float | None, budget: float | None, max_loss: float
) -> tuple[np.ndarray, Packed, float]:
    """Ideal choice, its rules and the solver's gap, of cells whose errors don't add up."""
    cells = task.exists
    damage, time = task.damage[cells], task.time[cells]
    allowed = None if floor is None else task.allowed_damage(floor)
    if allowed is not None:
        choice = solve(time, damage, allowed)
    else:
        assert budget is not None
        choice = solve(damage, time, budget)
    index = np.zeros(cells.shape, dtype=np.int64)
    index[cells] = choice.index
    packed = compress(
        task.damage,
        task.time,
        cells,
        index,
        task.specs,
        task.table.layers,
        task.table.branches,
        max_loss=max_loss,
        limit_damage=allowed,
        limit_time=budget,
    )
    return index, packed, choice.gap


def _together(
    task: Problem, floor: float | None, budget: float | None, max_loss: float
) -> tuple[np.ndarray, Packed, float]:
    """The same of cells whose errors add up (:mod:`.coupling`)."""
    assert task.coupling is not None
    fastest = float(task.time[task.exists].min(1).sum())
    if budget is not None:
        limit = most = budget
    else:
        assert floor is not None
        limit = _least_budget(task, task.allowed_damage(floor), fastest)
        most = limit + (max_loss - 1) * (limit - fastest)  # the loss is taken from time
    index = _exchanged(task, _within(task, limit), limit)
    damage = task.totals(index)[1]
    allowed = damage * max_loss if floor is None else task.allowed_damage(floor)
    rows = len(index)
    flat = task.time.reshape(rows, -1, len(task.specs))
    least = lower_bound(task.coupling, flat, task.exists.reshape(rows, -1), limit)
    best = _rules(task, index)
    start = _within(task, most)
    for price in _PRICES if max_loss > 1 else ():
        found = _exchanged(task, start, most, price / int(task.exists.sum()))
        if task.totals(found)[1] > allowed * (1 + 1e-9):
            break
        packed = _rules(task, found)
        if len(packed.rules) < len(best.rules):
            best = packed
    return index, best, max(0.0, 1 - least / max(damage, 1e-300))


def _rules(task: Problem, index: np.ndarray) -> Packed:
    return rules_of(index, task.exists, task.specs, task.table.layers, task.table.branches)


def _within(task: Problem, limit: float) -> np.ndarray:
    """The best choice within a time if errors were independent, ``[L, S, B]``."""
    cells = task.exists
    index = np.zeros(cells.shape, dtype=np.int64)
    index[cells] = solve(task.damage[cells], task.time[cells], limit).index
    return index


def _exchanged(task: Problem, start: np.ndarray, limit: float, price: float = 0.0) -> np.ndarray:
    """A better one, as errors add up."""
    assert task.coupling is not None
    rows = len(start)
    found = exchange(
        task.coupling,
        task.time.reshape(rows, -1, len(task.specs)),
        task.exists.reshape(rows, -1),
        start.reshape(rows, -1),
        limit,
        branches=start.shape[2],
        price=price,
    )
    return found.reshape(start.shape)


def _least_budget(task: Problem, allowed: float, fastest: float) -> float:
    """The least time in which a plan keeps the damage below this.

    Raises:
        Infeasible: none does in any time.
    """
    low, high = fastest, float(task.time[task.exists].max(1).sum())
    damage = task.totals(_exchanged(task, _within(task, high), high))[1]
    if damage > allowed:
        raise Infeasible(allowed, damage)
    for _ in range(_BUDGETS):
        middle = (low + high) / 2
        spent, damage = task.totals(_exchanged(task, _within(task, middle), middle))
        low, high = (low, min(middle, spent)) if damage <= allowed else (middle, high)
    return high * (1 + 1e-9)


def predict(task: Problem, plan: PrecisionPlan | str) -> tuple[float, float]:
    """Predicted time and quality of any plan whose specs the problem knows.

    Raises:
        PlanError: the plan uses a spec that was not calibrated or has no cost.
    """
    index = plan_index(task.table, PrecisionPlan.of(plan), task.specs)
    time, damage = task.totals(index)
    return time, task.quality(damage)


def predicted_time(
    table: ScoreTable, plan: PrecisionPlan | str, costs: str | Path | Mapping[str, float]
) -> float:
    """Time of all attention under any plan relative to FP16's.

    A table without scores will do: only the sizes of its calls are read.

    Raises:
        CostTableError: the card can't run one of the plan's specs.
    """
    parsed = PrecisionPlan.of(plan)
    specs = list(dict.fromkeys(str(spec) for _, spec in _resolved(table, parsed)))
    times = cell_times(table, specs, load_costs(costs))
    return float(
        sum(times[cell][specs.index(str(spec))] for cell, spec in _resolved(table, parsed))
    )


def _resolved(
    table: ScoreTable, plan: PrecisionPlan
) -> Iterator[tuple[tuple[int, int, int], AttentionSpec]]:
    """Every cell and what a plan resolves to there."""
    for i, layer in enumerate(table.layers):
        for step in range(table.steps):
            place = step_progress(step, table.steps)
            for b, branch in enumerate(table.branches):
                spec = plan.resolve(layer, place, branch=None if branch == BOTH else branch)
                yield (i, step, b), spec


def plan_index(table: ScoreTable, plan: PrecisionPlan, specs: Sequence[str]) -> np.ndarray:
    """The option that a plan resolves to in every cell, ``[L, S, B]``.

    Raises:
        PlanError: it resolves to a spec that is not among ``specs``.
    """
    index = np.zeros(table.shape, dtype=np.int64)
    for cell, spec in _resolved(table, plan):
        if str(spec) not in specs:
            raise PlanError(f"nothing is known of {spec}; known are {', '.join(specs)}")
        index[cell] = specs.index(str(spec))
    return index


def _provenance(
    task: Problem,
    time: float,
    damage: float,
    floor: float | None,
    budget: float | None,
    costs: Costs,
) -> dict[str, Any]:
    table = task.table
    quality = "psnr_db" if task.peak is not None else "attention_snr_db"
    found: dict[str, Any] = {
        "predicted": {"time": round(time, 4), quality: round(task.quality(damage), 2)},
        "asked": {"floor": floor} if floor is not None else {"budget": budget},
        **_costs_in_words(costs, table),
        "runs": len(table.runs),
        "measured_cells": int(table.measured.sum()),
        "cells": int(table.exists.sum()),
        "completion_bar_db": round(task.bar_db, 2),
        "steps": table.steps,
        "stage": stage_of(table),
    }
    return found


def _costs_in_words(costs: Costs, table: ScoreTable) -> dict[str, Any]:
    """Whose the times are, and of what."""
    whole = of_calls(table, costs)
    found: dict[str, Any] = {
        "costs": costs.card or dict(costs),
        "time_of": "calls" if whole else "main loops",
    }
    if whole and costs.tokens is not None:
        found["tokens"] = costs.tokens
    return found
