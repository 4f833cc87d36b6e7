"""Completing a score table of which only some cells were measured.

Low-rank matrix completion by alternating minimization (the idea of 2302.11068; none of its bounds
is claimed here) on the logarithm of the error: rows are (layer, branch, spec), columns are steps.
Neighbouring steps resemble each other, so the step factors are also drawn to their neighbours.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError

#: (rank, ridge, smoothness) that cross-validation chooses from.
CANDIDATES = tuple(itertools.product((1, 2, 3), (0.01, 0.03), (0.3, 1.0, 3.0)))

_SWEEPS = 20
_FOLDS = 5
#: Fewer measured cells can't be split into folds.
LEAST_CELLS = 2 * _FOLDS
#: Errors below this are exact for every purpose; their logarithm is cut off here.
_FLOOR = 1e-14


@dataclass(frozen=True)
class Completed:
    """Errors of every cell.

    Attributes:
        error: relative squared error, ``[L, S, B, K]``; measured values where there are any.
        measured: ``[L, S, B]`` bool.
        bar_db: held-out root mean square of the completion, in dB of squared error; 0 if nothing
            had to be completed.
        doubt_db: spread of every cell's completion over the folds, dB, ``[L, S, B]``; 0 where
            measured.
        rank: of the chosen model.
    """

    error: np.ndarray
    measured: np.ndarray
    bar_db: float
    doubt_db: np.ndarray
    rank: int


def complete(table: ScoreTable, seed: int = 0) -> Completed:
    """Fill the cells that were not measured.

    Raises:
        TableError: nothing was measured, or too little to judge the completion.
    """
    measured, exists = table.measured, table.exists
    if not measured.any():
        raise TableError("nothing was measured: the table has no cells to complete from")
    error = table.metric("error")
    if (measured | ~exists).all():
        return Completed(error.copy(), measured, 0.0, np.zeros(measured.shape), 0)
    if measured.sum() < LEAST_CELLS:
        raise TableError(
            f"only {int(measured.sum())} cells are measured, completing needs {LEAST_CELLS}: "
            "measure a larger share"
        )
    filled, bar, doubt, rank = complete_log(np.log(np.maximum(error, _FLOOR)), measured, seed)
    out = np.where(measured[..., None], error, np.exp(filled))
    out[~exists] = np.nan
    decibel = 10 / np.log(10)
    return Completed(out, measured, bar * decibel, np.where(measured, 0, doubt * decibel), rank)


def complete_log(
    values: np.ndarray, measured: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, float, np.ndarray, int]:
    """Complete ``values [L, S, B, K]`` (logarithms) from the cells in ``measured [L, S, B]``.

    Returns:
        The fitted values everywhere, the held-out RMS, the spread over folds ``[L, S, B]`` and the
        rank.
    """
    layers, steps, branches, specs = values.shape
    rows = values.transpose(0, 2, 3, 1).reshape(-1, steps)
    known = np.broadcast_to(
        measured.transpose(0, 2, 1)[:, :, None], (layers, branches, specs, steps)
    ).reshape(-1, steps)
    kind = np.tile(np.arange(specs), layers * branches)

    def folds(number: int) -> np.ndarray:
        """A fold for every cell; all specs of a cell are held out together."""
        rng = np.random.default_rng((seed, number))
        places = np.flatnonzero(measured)
        fold = np.full(measured.size, -1)
        fold[rng.permutation(places)] = np.arange(len(places)) % _FOLDS
        cells = fold.reshape(measured.shape).transpose(0, 2, 1)[:, :, None]
        return np.broadcast_to(cells, (layers, branches, specs, steps)).reshape(-1, steps)

    def held_out(candidate: tuple[int, float, float], fold: np.ndarray) -> tuple[float, np.ndarray]:
        total, predictions = 0.0, []
        for i in range(_FOLDS):
            out = known & (fold == i)
            fitted = _fit(rows, known & ~out, kind, *candidate)
            total += float(((fitted - rows)[out] ** 2).sum())
            predictions.append(fitted)
        spread = np.std(predictions, axis=0)
        return np.sqrt(total / known.sum()), spread

    chosen_by = folds(0)
    candidate = min(CANDIDATES, key=lambda c: held_out(c, chosen_by)[0])
    # The bar comes from another split than the one that the candidate won on.
    bar, spread = held_out(candidate, folds(1))
    fitted = _fit(rows, known, kind, *candidate)
    shape = layers, branches, specs, steps
    doubt = spread.reshape(shape).max(2).transpose(0, 2, 1)
    return fitted.reshape(shape).transpose(0, 3, 1, 2), bar, doubt, candidate[0]


def _fit(
    rows: np.ndarray, known: np.ndarray, kind: np.ndarray, rank: int, ridge: float, smooth: float
) -> np.ndarray:
    """``mean[kind] + a_r + b_s + U_r V_s`` fitted to the known entries of ``rows [R, S]``."""
    count, steps = rows.shape
    weight = known.astype(float)
    target = np.where(known, rows, 0.0)
    means = np.array(
        [
            target[kind == k].sum() / max(weight[kind == k].sum(), 1.0)
            for k in range(int(kind.max()) + 1)
        ]
    )[kind]
    target = np.where(known, rows - means[:, None], 0.0)
    rng = np.random.default_rng(0)
    # Columns: [offset, factors]; the row offset is hardly penalized, so rows of any level fit.
    u = np.zeros((count, rank + 1))
    v = np.concatenate([np.zeros((steps, 1)), rng.normal(size=(steps, rank))], 1)
    u_ridge = np.diag([0.01, *[ridge] * rank])
    neighbours = np.diff(np.eye(steps), axis=0)
    laplacian = smooth * neighbours.T @ neighbours + ridge * 0.1 * np.eye(steps)
    per_column = len(np.unique(kind)) * max(count / len(np.unique(kind)), 1)
    laplacian = laplacian * per_column / count * weight.sum(0).mean()
    for _ in range(_SWEEPS):
        design = np.concatenate([np.ones((steps, 1)), v[:, 1:]], 1)
        gram = _grams(weight, design) + u_ridge
        right = (weight * (target - v[:, 0])) @ design
        u = np.linalg.solve(gram, right[..., None])[..., 0]
        design = np.concatenate([np.ones((count, 1)), u[:, 1:]], 1)
        gram = _grams(weight.T, design)
        right = (weight * (target - u[:, :1])).T @ design
        size = rank + 1
        system = np.kron(laplacian, np.eye(size))
        for s in range(steps):
            system[s * size : (s + 1) * size, s * size : (s + 1) * size] += gram[s]
        v = np.linalg.solve(system, right.reshape(-1)).reshape(steps, size)
        if rank:  # keep the scale of the factors in U, so that `smooth` means the same throughout
            norm = np.sqrt((v[:, 1:] ** 2).mean(0)).clip(1e-9)
            v[:, 1:] /= norm
            u[:, 1:] *= norm
    return means[:, None] + u[:, :1] + v[:, 0] + u[:, 1:] @ v[:, 1:].T


def _grams(weight: np.ndarray, design: np.ndarray) -> np.ndarray:
    """``design^T diag(weight_i) design`` of every row of ``weight [N, M]``, ``[N, k, k]``."""
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None]).reshape(len(design), size * size)
    return (weight @ products).reshape(-1, size, size)
