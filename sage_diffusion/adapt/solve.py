"""The multiple-choice knapsack: one option per cell, least damage within a budget of time.

Lagrangian relaxation gives a bound and a nearly best choice; options that the bound rules out are
fixed, and what is left is searched exactly by dynamic programming over undominated states.
(Kellerer, Pferschy, Pisinger, "Knapsack Problems", chapter 11.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

#: Undominated states kept by the search; beyond it the gap is reported instead of closed.
_MAX_STATES = 50_000


class Infeasible(ValueError):
    """No choice meets the limit; ``best`` is the least that any choice needs."""

    def __init__(self, limit: float, best: float):
        self.limit, self.best = limit, best
        super().__init__(f"no choice stays within {limit:.6g}, the least reachable is {best:.6g}")


@dataclass(frozen=True)
class Choice:
    """A solved knapsack.

    Attributes:
        index: chosen option of every item, ``[N]``.
        objective: what was minimized.
        weight: what was limited.
        bound: no choice can have a smaller objective.
    """

    index: np.ndarray
    objective: float
    weight: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the objective may be from the best, relative to it; 0 is proven best."""
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-300)


def solve(objective: np.ndarray, weight: np.ndarray, limit: float) -> Choice:
    """Choose one option per item: least total ``objective`` with total ``weight <= limit``.

    Args:
        objective, weight: ``[N, K]``, not negative; infinite objective forbids an option.
        limit: on the sum of the weights.

    Raises:
        Infeasible: even the lightest choice weighs more than ``limit``.
        ValueError: shapes differ, or a value is NaN or negative.
    """
    if objective.shape != weight.shape or objective.ndim != 2 or not objective.size:
        raise ValueError(
            f"objective and weight must both be [N, K], got {objective.shape} and {weight.shape}"
        )
    if np.isnan(objective).any() or np.isnan(weight).any() or (objective < 0).any():
        raise ValueError("objective and weight must be numbers, objective not negative")
    allowed = np.where(np.isfinite(objective), weight, np.inf)
    lightest = allowed.min(1).sum()
    tolerance = 1e-9 * max(1.0, abs(limit))
    if lightest > limit + tolerance:
        raise Infeasible(limit, float(lightest))
    price, incumbent = _relax(objective, allowed, limit + tolerance)
    rows = np.arange(len(objective))
    reduced = objective + price * np.where(np.isfinite(objective), weight, 0.0)
    reduced = np.where(np.isfinite(objective), reduced, np.inf)
    bound = float(reduced.min(1).sum() - price * (limit + tolerance))
    best = float(objective[rows, incumbent].sum())
    if best > bound + 1e-12 * max(abs(best), 1e-300):
        found, closed = _search(objective, weight, reduced, limit + tolerance, bound, best)
        if found is not None:
            incumbent = found
            best = float(objective[rows, incumbent].sum())
        if closed:
            bound = best
    return Choice(incumbent, best, float(weight[rows, incumbent].sum()), min(bound, best))


def _relax(objective: np.ndarray, weight: np.ndarray, limit: float) -> tuple[float, np.ndarray]:
    """The price of weight, and a feasible choice: steepest steps along each item's convex hull."""
    count = len(objective)
    index = np.empty(count, dtype=np.int64)
    steps: list[tuple[float, int, int, int, float, float]] = []
    spent = 0.0
    for i in range(count):
        hull = _hull(weight[i], objective[i])
        index[i] = hull[0]
        spent += weight[i, hull[0]]
        for order, (a, b) in enumerate(itertools.pairwise(hull)):
            more = weight[i, b] - weight[i, a]
            less = objective[i, a] - objective[i, b]
            steps.append((-less / more, i, order, b, more, less))
    steps.sort()
    price, blocked = 0.0, False
    stopped: set[int] = set()
    for slope, i, _, option, more, _ in steps:
        if i in stopped:
            continue
        if spent + more <= limit:
            index[i] = option
            spent += more
            continue
        stopped.add(i)  # a later step of this item would skip this one
        if not blocked:
            price, blocked = -slope, True
    return price, index


def _hull(weight: np.ndarray, objective: np.ndarray) -> list[int]:
    """Options on the lower convex hull, lightest first, objective strictly falling."""
    order = sorted(range(len(weight)), key=lambda j: (weight[j], objective[j]))
    hull: list[int] = []
    for j in order:
        if not np.isfinite(weight[j]) or not np.isfinite(objective[j]):
            continue
        if hull and objective[j] >= objective[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            left = (objective[a] - objective[b]) * (weight[j] - weight[b])
            right = (objective[b] - objective[j]) * (weight[b] - weight[a])
            if left > right:
                break
            hull.pop()
        hull.append(j)
    return hull


def _search(
    objective: np.ndarray,
    weight: np.ndarray,
    reduced: np.ndarray,
    limit: float,
    bound: float,
    best: float,
) -> tuple[np.ndarray | None, bool]:
    """Look for something better than ``best``; True if nothing better was overlooked."""
    least = reduced.min(1)
    regret = reduced - least[:, None]
    slack = best - bound
    keep = regret < slack
    choice = reduced.argmin(1)
    core = np.flatnonzero(keep.sum(1) > 1)
    # The most undecided items first: states then part early and prune late ones.
    core = core[np.argsort(np.partition(regret[core], 1, axis=1)[:, 1], kind="stable")]
    fixed = np.ones(len(objective), dtype=bool)
    fixed[core] = False
    rows = np.arange(len(objective))
    weights = np.array([weight[rows, choice][fixed].sum()])
    costs = np.array([objective[rows, choice][fixed].sum()])
    regrets = np.zeros(1)
    lightest = np.array([weight[i][keep[i]].min() for i in core])
    remaining = np.append(np.cumsum(lightest[::-1])[::-1][1:], 0.0)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    closed = True
    for place, i in enumerate(core):
        options = np.flatnonzero(keep[i])
        parent = np.tile(np.arange(len(weights)), len(options))
        option = np.repeat(options, len(weights))
        w, c, r = (
            base[parent] + extra[i, option]
            for base, extra in ((weights, weight), (costs, objective), (regrets, regret))
        )
        alive = np.flatnonzero((w + remaining[place] <= limit) & (r < slack))
        alive = alive[np.lexsort((c[alive], w[alive]))]
        if len(alive):
            previous = np.minimum.accumulate(np.concatenate([[np.inf], c[alive][:-1]]))
            alive = alive[c[alive] < previous]
        if len(alive) > _MAX_STATES:
            closed = False
            alive = np.sort(alive[np.argsort(r[alive], kind="stable")[:_MAX_STATES]])
        trail.append((parent[alive], option[alive]))
        weights, costs, regrets = w[alive], c[alive], r[alive]
        if not len(alive):
            return None, closed
    if not len(costs) or costs.min() >= best:
        return None, closed
    state = int(costs.argmin())
    found = choice.copy()
    for i, (parent, option) in zip(core[::-1], reversed(trail), strict=True):
        found[i] = option[state]
        state = int(parent[state])
    return found, closed
