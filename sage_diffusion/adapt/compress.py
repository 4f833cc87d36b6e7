"""A table of specs as few rules: layers with like needs share step ranges, within a stated loss.

The choice is made anew with a price on every change of spec along the steps (Viterbi) and on every
group of layers (agglomeration); the price rises until the loss would pass its limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from sage_diffusion.adapt.table import BOTH
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import Rule
from sage_diffusion.plan.globs import cover, step_range

#: Prices of one rule that are tried, in units of the whole objective.
_PRICES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Packed:
    """Rules and what they resolve to.

    Attributes:
        default: name of the default spec.
        rules: first match wins.
        index: option of every cell, ``[L, S, B]``; exactly what the rules resolve to.
    """

    default: str
    rules: tuple[Rule, ...]
    index: np.ndarray


def compress(
    damage: np.ndarray,
    time: np.ndarray,
    exists: np.ndarray,
    index: np.ndarray,
    specs: Sequence[str],
    layers: Sequence[str],
    branches: Sequence[str],
    *,
    max_loss: float,
    limit_damage: float | None = None,
    limit_time: float | None = None,
) -> Packed:
    """The fewest rules found whose damage and time stay near those of ``index``.

    Args:
        damage, time: ``[L, S, B, K]``.
        exists: ``[L, S, B]`` bool; other cells may become anything.
        index: the ideal choice, ``[L, S, B]``.
        specs, layers, branches: names along the axes.
        max_loss: factor on the damage (with ``limit_time``), or on the time in excess of the ideal
            (with ``limit_damage``), that few rules may cost; 1 keeps ``index`` as it is.
        limit_damage, limit_time: exactly one is given and holds for the result too.
    """
    exact = rules_of(index, exists, specs, layers, branches)
    if max_loss <= 1:
        return exact
    d = np.where(exists[..., None], damage, 0.0)
    t = np.where(exists[..., None], time, 0.0)
    ideal_d, ideal_t = _total(d, index), _total(t, index)
    best = exact
    for price in _PRICES:
        found = _priced(d, t, index, layers, price, limit_damage, limit_time)
        if found is None:
            break
        loss_d, loss_t = _total(d, found), _total(t, found)
        if limit_time is not None and loss_d > ideal_d * max_loss:
            break
        # In time, the same relative loss of what the plan saves.
        if limit_damage is not None and 1 - loss_t < (1 - ideal_t) / max_loss:
            break
        packed = rules_of(found, exists, specs, layers, branches)
        if len(packed.rules) < len(best.rules):
            best = packed
    return best


def rules_of(
    index: np.ndarray,
    exists: np.ndarray,
    specs: Sequence[str],
    layers: Sequence[str],
    branches: Sequence[str],
) -> Packed:
    """Rules that resolve to ``index`` wherever ``exists``, shared by layers with equal step ranges.

    A branch that a layer never serves costs no rule.
    """
    return min(
        (_rules(index, exists, specs, layers, branches, base) for base in ("column", "none")),
        key=lambda found: len(found.rules),
    )


def _rules(
    index: np.ndarray,
    exists: np.ndarray,
    specs: Sequence[str],
    layers: Sequence[str],
    branches: Sequence[str],
    base: str,
) -> Packed:
    """Default and rules; with ``base="column"`` the usual spec of a step is a rule for ``*``."""
    _, steps, _ = index.shape
    default = _mode(index[exists])
    usual = np.full(steps, default)
    if base == "column":
        usual = np.array(
            [_mode(index[:, s][exists[:, s]], default) for s in range(steps)], dtype=np.int64
        )
    found: dict[tuple[int, int, int, str | None], list[str]] = {}
    resolved = index.copy()
    for i, name in enumerate(layers):
        rows = index[i]
        served = [b for b in range(len(branches)) if exists[i, :, b].any()]
        together = all((rows[:, b] == rows[:, served[0]]).all() for b in served)
        rest = usual  # what branches get that have no rule of their own
        for b in served[:1] if together else served:
            which = None if together or branches[b] == BOTH else branches[b]
            if which is None:
                rest = rows[:, b]
            for first, stop, option in _segments(rows[:, b], usual):
                found.setdefault((first, stop, option, which), []).append(name)
        resolved[i] = np.where(exists[i].any(0), rows, rest[:, None])
    rules = []
    for (first, stop, option, which), names in found.items():
        start, end = step_range(first, stop, steps)
        for glob in cover(names, layers):
            rules.append(Rule(AttentionSpec.parse(specs[option]), glob, start, end, which))
    for option, run in groupby(range(steps), key=lambda s: int(usual[s])):
        run_steps = list(run)
        if option != default:
            start, end = step_range(run_steps[0], run_steps[-1] + 1, steps)
            rules.append(Rule(AttentionSpec.parse(specs[option]), "*", start, end))
    return Packed(specs[default], tuple(rules), resolved)


def _segments(row: np.ndarray, usual: np.ndarray) -> list[tuple[int, int, int]]:
    """``(first, stop, option)`` runs where ``row`` differs from ``usual``, stretched over steps
    where it doesn't as long as the option is the same (a longer run may need fewer rules)."""
    runs: list[list[int]] = []
    for s, option in enumerate(row.tolist()):
        if runs and runs[-1][2] == option and runs[-1][1] == s:
            runs[-1][1] = s + 1
        else:
            runs.append([s, s + 1, option])
    found = []
    for first, stop, option in runs:
        differs = np.flatnonzero(usual[first:stop] != option)
        if len(differs):
            found.append((first + int(differs[0]), first + int(differs[-1]) + 1, option))
    return found


def _mode(values: np.ndarray, otherwise: int = 0) -> int:
    return int(np.bincount(values).argmax()) if values.size else otherwise


def _total(values: np.ndarray, index: np.ndarray) -> float:
    return float(np.take_along_axis(values, index[..., None], -1).sum())


def _priced(
    d: np.ndarray,
    t: np.ndarray,
    index: np.ndarray,
    layers: Sequence[str],
    price: float,
    limit_damage: float | None,
    limit_time: float | None,
) -> np.ndarray | None:
    """A choice with few changes that meets the limit, or None."""
    ideal_d, ideal_t = _total(d, index), _total(t, index)
    scale_d, scale_t = max(ideal_d, 1e-300), max(ideal_t, 1e-300)

    def choice(
        exchange: float, groups: list[list[int]] | None
    ) -> tuple[np.ndarray, list[list[int]]]:
        cost = d / scale_d + exchange * t / scale_t
        joined = groups if groups is not None else _group(cost, price)
        out = np.empty(cost.shape[:3], dtype=np.int64)
        for group in joined:
            out[group] = _viterbi(cost[group].sum(0)[None], price)[0]
        return out, joined

    # The exchange rate of time for damage at which the ideal choice was made lies between these.
    low, high = 1e-4, 1e4
    groups: list[list[int]] | None = None
    best = None
    for i in range(18):
        middle = np.sqrt(low * high)
        # Regroup while the rate is still coarse, then keep the groups and fine-tune the rate.
        out, groups = choice(middle, groups if i > 6 else None)
        total_d, total_t = _total(d, out), _total(t, out)
        if limit_time is not None:
            fits = total_t <= limit_time * (1 + 1e-9)
            low, high = (low, middle) if fits else (middle, high)
        else:
            assert limit_damage is not None
            fits = total_d <= limit_damage * (1 + 1e-9)
            low, high = (middle, high) if fits else (low, middle)
        if fits:
            value = total_d if limit_time is not None else total_t
            if best is None or value < best[0]:
                best = (value, out)
    return None if best is None else best[1]


def _viterbi(cost: np.ndarray, price: float) -> np.ndarray:
    """Cheapest options along the steps with a price on every change.

    ``cost [N, S, B, K]`` -> ``[N, S, B]``; branches are independent.
    """
    count, steps, branches, options = cost.shape
    total = cost[:, 0]
    back = np.empty((steps, count, branches, options), dtype=np.int64)
    stay = np.arange(options)
    for s in range(1, steps):
        jump = total.argmin(-1)[..., None]
        least = np.take_along_axis(total, jump, -1) + price
        back[s] = np.where(total <= least, stay, jump)
        total = np.minimum(total, least) + cost[:, s]
    out = np.empty((count, steps, branches), dtype=np.int64)
    out[:, -1] = total.argmin(-1)
    for s in range(steps - 1, 0, -1):
        out[:, s - 1] = np.take_along_axis(back[s], out[:, s, :, None], -1)[..., 0]
    return out


def _value(cost: np.ndarray, price: float) -> np.ndarray:
    """What :func:`_viterbi`'s choice costs, changes and the first segment included, ``[N]``."""
    total = cost[:, 0]
    for s in range(1, cost.shape[1]):
        total = np.minimum(total, total.min(-1, keepdims=True) + price) + cost[:, s]
    return total.min(-1).sum(-1) + price * cost.shape[2]


def _group(cost: np.ndarray, price: float) -> list[list[int]]:
    """Layers joined as long as sharing one row of options saves more than it costs."""
    groups = [[i] for i in range(len(cost))]
    sums = [cost[i] for i in range(len(cost))]
    alone = list(_value(np.stack(sums), price))
    gains: dict[tuple[int, int], float] = {}

    def consider(pairs: list[tuple[int, int]]) -> None:
        if pairs:
            joined = _value(np.stack([sums[a] + sums[b] for a, b in pairs]), price)
            for pair, value in zip(pairs, joined, strict=True):
                gains[pair] = alone[pair[0]] + alone[pair[1]] - float(value)

    count = len(groups)
    consider([(a, b) for a in range(count) for b in range(a + 1, count)])
    alive = set(range(count))
    while gains:
        (a, b), gain = max(gains.items(), key=lambda item: item[1])
        if gain <= 0:
            break
        groups.append(sorted(groups[a] + groups[b]))
        sums.append(sums[a] + sums[b])
        alone.append(alone[a] + alone[b] - gain)
        alive -= {a, b}
        gains = {pair: g for pair, g in gains.items() if a not in pair and b not in pair}
        fresh = len(groups) - 1
        consider([(other, fresh) for other in sorted(alive)])
        alive.add(fresh)
    return [groups[i] for i in sorted(alive)]
