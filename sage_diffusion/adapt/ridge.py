"""What groups of cells do to the result, fitted to few runs and drawn toward the local error.

There are more groups than runs, and runs are noisy, so that a fit that only meets the runs is worse
than none.  Here the final squared error per local one is, of a group in layers l, steps s and
branches b,

    exp(level + layer_l + step_s + branch_b + own_lsb)

and all but the level are drawn to 0, the local error's own opinion, by ridge (Hoerl and Kennard,
1970).  How strongly is decided by leaving runs out; infinitely strongly is a choice, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Weights of the ridge that are tried; with the last one the local error is kept.
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, np.inf)

#: Least measured error that counts, relative to the largest and at all.
_FLOOR, _LEAST = 1e-3, 1e-200

#: By how much branches are expected to differ more than layers and steps do: of the halves of
#: guidance one is weighed by its scale, the other by that less one.
_APART = 3.0

#: Of the fit; the logarithms change by at most this in one.
_ITERATIONS, _STRIDE = 30, 1.0

_DECIBEL = 10 / math.log(10)


@dataclass(frozen=True)
class Fit:
    """A fit, and how it did on runs that it had not seen.

    Attributes:
        rate: final squared error per local one of every group, the masks' shape.
        weight: of the ridge, infinite where the local error is kept.
        left_out_db, checked_db: root mean square error in predicting each run from the others, and
            the runs that took no part, dB.
        local_left_out_db, local_checked_db: the same of the local error, its level fitted.
    """

    rate: np.ndarray
    weight: float
    left_out_db: float
    checked_db: float
    local_left_out_db: float
    local_checked_db: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the rates; ``ridge`` is null where the local error is kept."""
        return {
            "ridge": None if math.isinf(self.weight) else self.weight,
            "left_out_db": round(self.left_out_db, 3),
            "checked_db": round(self.checked_db, 3),
            "local_left_out_db": round(self.local_left_out_db, 3),
            "local_checked_db": round(self.local_checked_db, 3),
        }


def fit(local: np.ndarray, masks: Sequence[np.ndarray], errors: np.ndarray, checks: int) -> Fit:
    """Fit the groups to the runs, or keep the local error where that predicts unseen runs better.

    Args:
        local: squared errors that each group adds by itself, ``[LG, SG, BG]``, not negative.
        masks: which groups were in the low spec, one of ``[LG, SG, BG]`` per run.
        errors: final squared errors of the runs.
        checks: so many of the last runs are kept for checking.
    """
    runs = len(masks) - checks
    logs = np.log(np.maximum(errors, max(_FLOOR * errors.max(), _LEAST)))
    design = np.stack([(mask * local).ravel() for mask in masks])
    useful = design[:runs].sum(1) > 0
    seen = np.flatnonzero(useful)
    features = _features(local.shape)

    def off(weight: float, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        rate = _rates(design[train], logs[train], features, weight)
        return np.log(np.maximum(design[test] @ rate, _LEAST)) - logs[test]

    def left_out(weight: float) -> float:
        each = [off(weight, seen[seen != i], np.array([i])) for i in seen]
        return _rms(np.concatenate(each))

    last = np.flatnonzero(design.sum(1) > 0)
    last = last[last >= runs]
    scores = {weight: left_out(weight) for weight in WEIGHTS}
    best = min(scores, key=lambda weight: scores[weight])
    checked = {weight: _rms(off(weight, seen, last)) for weight in (best, np.inf)}
    if checked[best] > checked[np.inf]:
        best = np.inf
    rate = _rates(design[seen], logs[seen], features, best).reshape(local.shape)
    return Fit(rate, best, scores[best], checked[best], scores[np.inf], checked[np.inf])


def _rms(logs: np.ndarray) -> float:
    return float(np.sqrt(np.mean(logs**2))) * _DECIBEL if logs.size else 0.0


def _features(shape: tuple[int, ...]) -> np.ndarray:
    """What the logarithm of a group's rate is made of: one column each for its layers, its steps,
    its branches and itself, ``[groups, columns]``."""
    layer, step, branch = np.indices(shape).reshape(len(shape), -1)
    parts = [np.eye(shape[0])[layer], np.eye(shape[1])[step], _APART * np.eye(shape[2])[branch]]
    return np.concatenate([*parts, np.eye(math.prod(shape))], 1)


def _rates(design: np.ndarray, logs: np.ndarray, features: np.ndarray, weight: float) -> np.ndarray:
    """Rates of the groups, by Gauss-Newton steps on the logarithms of the runs' errors."""
    level = float(np.mean(logs - np.log(design.sum(1))))
    x = np.zeros(1 + features.shape[1])
    x[0] = level
    if np.isinf(weight):
        return np.full(design.shape[1], np.exp(level))
    ridge = np.diag([0.0] + [weight] * features.shape[1])
    for _ in range(_ITERATIONS):
        each = design * np.exp(x[0] + features @ x[1:])
        total = each.sum(1)
        slope = np.concatenate([np.ones((len(logs), 1)), (each / total[:, None]) @ features], 1)
        right = slope.T @ (logs - np.log(total)) - ridge @ x
        step = np.linalg.solve(slope.T @ slope + ridge, right)
        x += np.clip(step, -_STRIDE, _STRIDE)
        if np.abs(step).max() < 1e-6:
            break
    return np.exp(x[0] + features @ x[1:])
