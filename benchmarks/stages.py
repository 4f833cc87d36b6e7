"""What :mod:`benchmarks.adaptive` compares of calibration's own guesses.

* Completing a table from some of its cells: the Gaussian process beside low rank.
* Where a plan's weights come from: the local error, groups of cells, gradients; of the groups also
  with the fit of before, multiplicative updates (Lee and Seung, 2001) that only meet the runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import low_rank
from sage_diffusion.adapt import complete
from sage_diffusion.adapt.sampling import Sampler
from sage_diffusion.adapt.sensitivity import Groups, measure_sensitivity
from sage_diffusion.adapt.table import ScoreTable

#: Shares of the cells that the others are completed from, and random choices of them.
SHARES, PATTERNS = (0.12, 0.25), 3

COMPLETIONS = {"process": complete.complete_log, "low rank": low_rank.complete_log}

_DECIBEL = 10 / math.log(10)


def completions(table: ScoreTable) -> list[dict[str, Any]]:
    """Both completions of a table of all cells, judged by the cells that they were not shown.

    Returns:
        One row per share and method: ``rms_db``; ``rank_correlation`` (Spearman's, mean over the
        specs); ``coverage``, the part that the 95 % bars hold.  No row of a share that is too few
        cells.
    """
    from scipy.stats import spearmanr

    truth = np.log(np.maximum(table.metric("error"), 1e-14))
    rows = []
    for share, (name, method) in itertools.product(SHARES, COMPLETIONS.items()):
        if round(share * truth[..., 0].size) < max(complete.LEAST_CELLS, *truth.shape[:2]):
            continue
        found = []
        for known in _patterns(truth.shape[:3], share):
            filled, bar = method(np.where(known[..., None], truth, 0.0), known)
            off = (filled - truth)[~known]
            ranks = [
                spearmanr(a, b).statistic
                for a, b in zip(filled[~known].T, truth[~known].T, strict=True)
            ]
            inside = np.mean(np.abs(off) <= bar[~known])
            found.append((np.sqrt(np.mean(off**2)) * _DECIBEL, np.mean(ranks), inside))
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


def _patterns(shape: tuple[int, ...], share: float) -> list[np.ndarray]:
    """So many cells at random, at least one of every layer and of every step."""
    found: list[np.ndarray] = []
    size = math.prod(shape)
    for number in range(PATTERNS):
        rng = np.random.default_rng(number)
        while len(found) <= number:
            known = np.zeros(size, dtype=bool)
            known[rng.permutation(size)[: round(share * size)]] = True
            cells = known.reshape(shape)
            if cells.any((1, 2)).all() and cells.any((0, 2)).all():
                found.append(cells)
    return found


def stages(
    sampler: Sampler, table: ScoreTable, pairs: Sequence[tuple[Any, int]]
) -> dict[str, ScoreTable]:
    """The same scores with the weights of each stage.

    Args:
        sampler: of the calibration.
        table: calibrated; its own end-to-end stage, if any, is by gradients.
        pairs: runs of the stage by groups.
    """
    state: dict[str, Any] = {}
    groups = measure_sensitivity(sampler, table, pairs, keep=state.update)
    found = {
        "local error": None,
        "groups, multiplicative fit": multiplicative(table, state, groups),
        "groups": groups,
    }
    if table.sensitivity is not None:
        found["gradients"] = table.sensitivity
    return {name: _with(table, sensitivity) for name, sensitivity in found.items()}


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


def _with(table: ScoreTable, sensitivity: dict[str, Any] | None) -> ScoreTable:
    other = ScoreTable.from_dict(table.to_dict())
    other.sensitivity = sensitivity
    return other
