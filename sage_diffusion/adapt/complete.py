"""Completing a score table of which only some cells were measured.

The logarithm of the errors is a Gaussian process over layers, steps and branches (:mod:`.process`).
Specs vary together: each principal direction of what is known of them is a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sage_diffusion.adapt.process import directions_of, fit_together
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError

_FOLDS = 5
#: Fewer measured cells can't be split into folds.
LEAST_CELLS = 2 * _FOLDS
#: Errors below this are exact for every purpose; their logarithm is cut off here.
_FLOOR = 1e-14

#: Of a normal variable 95 % lie within so many standard deviations.
_WITHIN, _SHARE = 1.96, 0.95

#: Of the logarithm of a squared error.
_DECIBEL = 10 / np.log(10)


@dataclass(frozen=True)
class Completed:
    """Errors of every cell.

    Attributes:
        error: relative squared error, ``[L, S, B, K]``; measured values where there are any.
        measured: ``[L, S, B]`` bool.
        bar_db: half of the 95 % interval of every value, dB of squared error, ``[L, S, B, K]``; 0
            where measured.
    """

    error: np.ndarray
    measured: np.ndarray
    bar_db: np.ndarray

    @property
    def rms_db(self) -> float:
        """Root mean square that the completed values are expected to be off by, dB of squared
        error; 0 if nothing had to be completed."""
        bars = self.bar_db[self.bar_db > 0] / _WITHIN
        return float(np.sqrt(np.mean(bars**2))) if bars.size else 0.0


def complete(table: ScoreTable, seed: int = 0) -> Completed:
    """Fill the cells that were not measured.

    Raises:
        TableError: nothing was measured, or too little to judge the completion.
    """
    measured, exists = table.measured, table.exists
    if not measured.any():
        raise TableError("nothing was measured: the table has no cells to complete from")
    error = table.metric("error")
    there = np.isfinite(error)  # what a spec made infinite is unknown like what was not measured
    if (there | ~exists[..., None]).all():
        return Completed(error.copy(), measured, np.zeros(error.shape))
    known = there.all(-1)
    if known.sum() < LEAST_CELLS:
        raise TableError(
            f"only {int(known.sum())} cells are measured, completing needs {LEAST_CELLS}: "
            "measure a larger share"
        )
    filled, bar = complete_log(np.log(np.maximum(error, _FLOOR)), known, seed)
    out = np.where(there, error, np.exp(filled))
    bar_db = np.where(there, 0.0, bar * _DECIBEL)
    out[~exists], bar_db[~exists] = np.nan, 0.0
    return Completed(out, measured, bar_db)


def complete_log(
    values: np.ndarray, measured: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Complete ``values [L, S, B, K]`` (logarithms) from the cells in ``measured [L, S, B]``.

    The process knows how far its values may be off as long as its parameters are right.  How well
    they are known is found by leaving cells out: the bars are widened until they hold 95 % of the
    cells that another fit has not seen.

    Args:
        values: anything where not measured.
        measured: at least :data:`LEAST_CELLS`.
        seed: of the choice of what is left out.

    Returns:
        The fitted values everywhere, and half of their 95 % intervals, ``[L, S, B, K]`` each.
    """
    some = values[measured]
    directions = directions_of(some)
    whole = fit_together(values, measured, directions)
    places = np.argwhere(measured)
    fold = np.random.default_rng(seed).permutation(len(places)) % _FOLDS
    off = np.empty(some.shape)
    for i in range(_FOLDS):
        out, kept = tuple(places[fold == i].T), measured.copy()
        kept[out] = False
        part = fit_together(values, kept, directions, whole.thetas)
        off[fold == i] = np.abs(values[out] - part.mean[out]) / part.deviation[out]
    count = len(places)
    wide = np.quantile(off, min(1.0, _SHARE * (count + 1) / count))
    return whole.mean, whole.deviation * max(wide, _WITHIN)
