"""Low-rank completion of score tables, which Gaussian processes are compared with.

Alternating minimization (the idea of 2302.11068; none of its bounds is claimed here) on the
logarithm of the error: rows are (layer, branch, spec), columns are steps.  Neighbouring steps
resemble each other, so the step factors are also drawn to their neighbours.
"""

from __future__ import annotations

import itertools

import numpy as np

#: (rank, ridge, smoothness) that cross-validation chooses from.
CANDIDATES = tuple(itertools.product((1, 2, 3), (0.01, 0.03), (0.3, 1.0, 3.0)))

_SWEEPS = 20
_FOLDS = 5


def complete_log(
    values: np.ndarray, measured: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The same as :func:`sage_diffusion.adapt.complete.complete_log`.

    Its bars are one for all: 1.96 times the root mean square over the cells that were left out.
    """
    layers, steps, branches, specs = values.shape
    rows = values.transpose(0, 2, 3, 1).reshape(-1, steps)
    known = _rows(measured, specs)
    kind = np.tile(np.arange(specs), layers * branches)

    def folds(number: int) -> np.ndarray:
        """A fold for every cell; all specs of a cell are held out together."""
        rng = np.random.default_rng((seed, number))
        places = np.flatnonzero(measured)
        fold = np.full(measured.size, -1)
        fold[rng.permutation(places)] = np.arange(len(places)) % _FOLDS
        return _rows(fold.reshape(measured.shape), specs)

    def held_out(candidate: tuple[int, float, float], fold: np.ndarray) -> float:
        total = 0.0
        for i in range(_FOLDS):
            out = known & (fold == i)
            fitted = _fit(rows, known & ~out, kind, *candidate)
            total += float(((fitted - rows)[out] ** 2).sum())
        return np.sqrt(total / known.sum())

    chosen_by = folds(0)
    candidate = min(CANDIDATES, key=lambda c: held_out(c, chosen_by))
    # The bar comes from another split than the one that the candidate won on.
    bar = 1.96 * held_out(candidate, folds(1))
    fitted = _fit(rows, known, kind, *candidate).reshape(layers, branches, specs, steps)
    return fitted.transpose(0, 3, 1, 2), np.full(values.shape, bar)


def _rows(cells: np.ndarray, specs: int) -> np.ndarray:
    """``[L, S, B]`` for every spec, as ``[L * B * K, S]``."""
    return np.repeat(cells.transpose(0, 2, 1)[:, :, None], specs, 2).reshape(-1, cells.shape[1])


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
