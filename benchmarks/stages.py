"""What :mod:`benchmarks.adaptive` compares of calibration's own guesses.

* Completing a table from some of its cells: the Gaussian process beside low rank.
* Where a plan's weights come from: the local error, groups of cells, gradients; of the groups also
  with the fit of before, multiplicative updates (Lee and Seung, 2001) that only meet the runs, of
  the gradients also as they were measured and averaged over a fixed width of steps.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import low_rank
from sage_diffusion.adapt import DEFAULT_SHARE, complete
from sage_diffusion.adapt.calibrate import Calibrator, calibrate, rated_pictures
from sage_diffusion.adapt.gradient import cell_means, measure_gradient
from sage_diffusion.adapt.sensitivity import Groups, measure_sensitivity
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.files import write_text

#: Shares of the cells that the others are completed from, and how many choices of them.
SHARES, PATTERNS = (0.12, 0.15, 0.25), 6

#: Shares of the cells that are measured for plans from the local error alone.
MEASURED = (DEFAULT_SHARE, 0.25, 1.0)

COMPLETIONS = {"process": complete.complete_log, "low rank": low_rank.complete_log}

#: Neighbouring steps of a fixed width, the standard deviation of their weights.
_STEP_WIDTH = 2.5

_DECIBEL = 10 / math.log(10)


@dataclass(frozen=True)
class Measured:
    """Score tables of a model without an end-to-end stage, and both stages.

    Attributes:
        tables: by the share of the cells that was to be measured.
        groups, gradients: of the end-to-end stage, None where they were not asked for.
        raw_groups, raw_gradients: what was measured for them.
    """

    tables: dict[float, ScoreTable]
    groups: dict[str, Any] | None
    raw_groups: dict[str, Any]
    gradients: dict[str, Any] | None
    raw_gradients: dict[str, Any]

    @property
    def usual(self) -> ScoreTable:
        """With the default share, and the stage by gradients if there is one."""
        return with_stage(self.tables[DEFAULT_SHARE], self.gradients)


def measure(
    sampler: Any,
    batches: Sequence[Any],
    seeds: Sequence[int],
    *,
    specs: Sequence[str],
    rated: int,
    grouped: int,
    folder: Path,
) -> Measured:
    """Measure everything that is compared; what lies in ``folder`` already is not measured again.

    Args:
        sampler: of the model.
        batches, seeds: of the calibration.
        specs: candidates.
        rated: pictures of the stage by gradients, 0 for none.
        grouped: the same by groups, in whole batches.
        folder: of tables, and of what stages have measured so far.
    """
    tables = {
        share: calibrate(
            sampler, batches, seeds, share=share, specs=specs, path=folder / f"scores-{share}.json"
        )
        for share in MEASURED
    }
    usual = tables[DEFAULT_SHARE]
    groups = gradients = None
    keep_groups, keep_gradients = (
        _Kept(folder / f"{name}.json") for name in ("groups", "gradients")
    )
    if grouped:
        runs = [(batch, seed) for seed in seeds for batch in batches]
        runs = runs[: -(-grouped // len(batches[0]))]
        groups = measure_sensitivity(sampler, usual, runs, **keep_groups.options)
    if rated:
        pictures = rated_pictures(sampler, batches, seeds, rated)
        gradients = measure_gradient(sampler, usual, pictures, **keep_gradients.options)
    return Measured(tables, groups, keep_groups.state, gradients, keep_gradients.state)


class _Kept:
    """What a stage has measured, in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, state: dict[str, Any]) -> None:
        self.state = state
        write_text(self.path, json.dumps(state))

    @property
    def options(self) -> dict[str, Any]:
        return {"unfinished": self.state or None, "keep": self.keep}


def stages(found: Measured) -> dict[str, ScoreTable]:
    """Tables with the weights of each stage, by what these come from."""
    usual = found.tables[DEFAULT_SHARE]
    tables = {
        f"local error, {share:.0%} of the cells": table for share, table in found.tables.items()
    }
    if found.groups is not None:
        before = multiplicative(usual, found.raw_groups, found.groups)
        tables["groups, multiplicative fit"] = with_stage(usual, before)
        tables["groups"] = with_stage(usual, found.groups)
    if found.gradients is not None:
        raw = cell_means(found.raw_gradients, (*usual.shape, len(usual.specs)))
        for name, effect in (("as measured", raw), ("fixed width", fixed_width(raw))):
            stage = found.gradients | {"effect": effect.tolist()}
            tables[f"gradients, {name}"] = with_stage(usual, stage)
        tables["gradients"] = found.usual
    return tables


def with_stage(table: ScoreTable, stage: dict[str, Any] | None) -> ScoreTable:
    """The same scores with another end-to-end stage."""
    other = ScoreTable.from_dict(table.to_dict())
    other.sensitivity = stage
    return other


def completions(table: ScoreTable) -> list[dict[str, Any]]:
    """Both completions of a table of all cells from those that calibration would measure, judged by
    the others.

    Returns:
        One row per share and method: ``rms_db``; ``rank_correlation`` (Spearman's, mean over the
        specs); ``coverage``, the part that the 95 % bars hold.  No row of a share that is too few
        cells.
    """
    truth = np.log(np.maximum(table.metric("error"), 1e-14))
    rows = []
    for share, (name, method) in itertools.product(SHARES, COMPLETIONS.items()):
        patterns = [_chosen(table, share, seed) for seed in range(PATTERNS)]
        if patterns[0].mean() > 1.2 * share:  # a small table has more measured
            continue
        found = [_judged(method, truth, known) for known in patterns]
        rms, rank, coverage = np.mean(found, 0).tolist()
        rows.append(
            {
                "share": share,
                "method": name,
                "rms_db": round(rms, 3),
                "rank_correlation": round(rank, 4),
                "coverage": round(coverage, 3),
            }
        )
    return rows


def _judged(
    method: Callable[..., tuple[np.ndarray, np.ndarray]], truth: np.ndarray, known: np.ndarray
) -> tuple[float, float, float]:
    """RMS in dB, mean rank correlation and coverage of the bars on the cells that are not known."""
    from scipy.stats import spearmanr

    filled, bar = method(np.where(known[..., None], truth, 0.0), known)
    off = (filled - truth)[~known]
    pairs = zip(filled[~known].T, truth[~known].T, strict=True)
    rank = np.mean([spearmanr(a, b).statistic for a, b in pairs])
    inside = np.mean(np.abs(off) <= bar[~known])
    return float(np.sqrt(np.mean(off**2))) * _DECIBEL, float(rank), float(inside)


def _chosen(table: ScoreTable, share: float, seed: int) -> np.ndarray:
    """Cells that calibration measures, ``[L, S, B]`` bool."""
    session = AttentionSession("fp16")
    session.start(table.steps)
    for layer in table.layers:
        session.adopt(session.layer(layer))
    watcher = Calibrator([], session, share=share, rows=1, seed=seed)
    cells = itertools.product(table.layers, range(table.steps), table.branches)
    return np.array([watcher.chooses(*cell) for cell in cells]).reshape(table.shape)


def multiplicative(
    table: ScoreTable, state: dict[str, Any], groups: dict[str, Any]
) -> dict[str, Any]:
    """The stage ``groups`` with the fit of before, on the same runs (the last state kept)."""
    error = complete.complete(table).error
    parts = Groups.of(table, error)
    count = len(parts.plans(table))
    errors = np.array([list(itertools.chain(*state["runs"][i::count])) for i in range(count)])
    votes, sums = np.sqrt(errors).mean(1) ** 2, parts.sums(table, error)
    design = np.stack([(mask * sums[..., parts.low]).ravel() for mask in parts.masks])
    target = np.maximum(votes[: len(design)], votes.max() * 1e-3)
    a = design / target[:, None]
    gram, right = a.T @ a, a.sum(0)
    rate = np.full(design.shape[1], target.mean() / design.sum(1).mean())
    for _ in range(5000):
        rate = rate * right / np.maximum(gram @ rate, 1e-300)
    rates = rate.reshape(parts.masks[0].shape)
    predicted = np.einsum("ijbk,ijb->k", sums, rates)
    factor = errors.mean(1)[len(design) :] / np.maximum(predicted, 1e-300)
    return groups | {"weight": rates.tolist(), "factor": factor.tolist()}


def fixed_width(effect: np.ndarray) -> np.ndarray:
    """``[L, S, B, K]`` averaged over neighbouring steps, as effects were smoothed before."""
    at = np.arange(effect.shape[1])
    kernel = np.exp(-(((at[:, None] - at) / _STEP_WIDTH) ** 2) / 2)
    known = np.isfinite(effect)
    total = np.einsum("st,ltbk->lsbk", kernel, np.where(known, effect, 0))
    weight = np.einsum("st,ltbk->lsbk", kernel, known.astype(float))
    return np.where(known, total / np.maximum(weight, 1e-300), np.nan)
