"""Errors that add up: neighbouring steps err alike, so 4 bit hurts less in every other step.

From one step to the next a layer's Q and K hardly change, and so, under one rotation, rounding goes
wrong in the same direction: what two steps do to the final latents is correlated, positively from
step to step and negatively between the two halves of guidance, of which one is subtracted.  With
``d`` the effect of every cell alone and ``C`` the correlation, the squared error of a plan is

    sum over layers and formats of Q K^T of  r^T C r,   r = sqrt(d) of the cells in that format

instead of the sum of ``d``.  Specs with the same format of Q and K round the same way; different
formats are taken as independent, as layers are.  Choosing options is then no knapsack any more:
:func:`exchange` goes on from a knapsack's solution by pairs of changes, and :func:`lower_bound`
says how far that can be from the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sage_diffusion.kernels.spec import AttentionSpec

#: Changes that are tried in pairs: the most promising ones of either kind.
_PAIRED = 400

#: Steps of the convex relaxation, and halvings of its price of time.
_RELAXED, _HALVINGS = 80, 60


@dataclass(frozen=True)
class Coupling:
    """What every option does to the final result together with the others.

    Attributes:
        root: ``[L, N, K]``, the root of each option's own effect; N are steps x branches.
        member: ``[K, G]`` 0 or 1, which format of Q and K an option has; none if it is exact.
        matrix: ``[G, N, N]`` correlation of the cells of a layer, positive semidefinite.
    """

    root: np.ndarray
    member: np.ndarray
    matrix: np.ndarray

    def amplitudes(self, share: np.ndarray) -> np.ndarray:
        """``[L, N, G]`` of shares of options ``[L, N, K]`` (one-hot for a plan)."""
        return np.einsum("lnk,kg->lng", self.root * share, self.member)

    def field(self, amplitude: np.ndarray) -> np.ndarray:
        """``C r``, ``[L, N, G]``."""
        return np.einsum("gnm,lmg->lng", self.matrix, amplitude)

    def total(self, index: np.ndarray) -> float:
        """Squared final error of a choice ``[L, N]``."""
        amplitude = self.amplitudes(np.eye(self.root.shape[2])[index])
        return float((amplitude * self.field(amplitude)).sum())


def groups_of(specs: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Formats of Q and K of these options, and ``member`` of :class:`Coupling`."""
    parsed = [AttentionSpec.parse(name) for name in specs]
    formats = tuple(dict.fromkeys(spec.qk.value for spec in parsed if spec.quantized))
    member = [
        [float(spec.quantized and spec.qk.value == name) for name in formats] for spec in parsed
    ]
    return formats, np.array(member).reshape(len(specs), len(formats))


def correlation_matrix(lags: np.ndarray) -> np.ndarray:
    """``[S * B, S * B]``, the nearest positive semidefinite one with a diagonal of ones.

    Args:
        lags: ``[B, B, S]``; ``lags[b, c, n]`` is that of branch b with branch c, n steps later.
    """
    branches, _, steps = lags.shape
    full = np.empty((steps, branches, steps, branches))
    for s in range(steps):
        for t in range(steps):
            full[s, :, t, :] = lags[:, :, t - s] if t >= s else lags[:, :, s - t].T
    flat = full.reshape(steps * branches, -1)
    np.fill_diagonal(flat, 1.0)
    values, vectors = np.linalg.eigh((flat + flat.T) / 2)
    flat = (vectors * np.maximum(values, 0.0)) @ vectors.T
    scale = 1.0 / np.sqrt(np.maximum(np.diag(flat), 1e-12))
    return flat * scale[:, None] * scale


def exchange(
    coupling: Coupling,
    time: np.ndarray,
    exists: np.ndarray,
    index: np.ndarray,
    limit: float,
    *,
    branches: int,
    price: float = 0.0,
    most: int = 400,
) -> np.ndarray:
    """Improve a choice by single changes and pairs of changes while it stays within a time.

    Args:
        coupling: what is minimized.
        time: ``[L, N, K]`` of every option.
        exists: ``[L, N]`` bool; other cells stay as they are.
        index: ``[L, N]``, within the limit.
        limit: on the total time.
        branches: N are steps x branches.
        price: of one change of option from a step to the next, relative to the first total.
        most: rounds of changes at the most.
    """
    index = index.copy()
    layers, cells, options = coupling.root.shape
    rows = np.arange(layers)[:, None], np.arange(cells)
    change = price * max(coupling.total(index), 1e-300)
    own, alone = np.arange(options), (coupling.root * coupling.member.sum(1)) ** 2
    before = coupling.total(index) + change * _count(index, branches)
    for _ in range(most):
        amplitude = coupling.amplitudes(np.eye(options)[index])
        field = coupling.field(amplitude)
        root = coupling.root[(*rows, index)]  # [L, N]
        had = coupling.member[index]  # [L, N, G]
        # Out goes the present option, in comes another: what each alone would do.
        without = field - root[..., None] * had
        inner = np.einsum("lng,kg->lnk", without, coupling.member)
        new = alone + 2 * coupling.root * inner
        gain = new - np.take_along_axis(new, index[..., None], 2)
        gain += change * _changes(index, branches, options)
        more = time - np.take_along_axis(time, index[..., None], 2)
        allowed = exists[..., None] & (own != index[..., None])
        slack = limit * (1 + 1e-9) - float(np.take_along_axis(time, index[..., None], 2).sum())
        found = _best_changes(coupling, gain, more, allowed, index, slack)
        trial = index.copy()
        for layer, cell, option in found:
            trial[layer, cell] = option
        after = coupling.total(trial) + change * _count(trial, branches)
        if after >= before * (1 - 1e-9):
            return index
        index, before = trial, after
    return index


def _best_changes(
    coupling: Coupling,
    gain: np.ndarray,
    more: np.ndarray,
    allowed: np.ndarray,
    index: np.ndarray,
    slack: float,
) -> list[tuple[int, int, int]]:
    """The changes ``(layer, cell, option)`` that lower the total most: pairs of a dearer and a
    cheaper one, each pair in layers of its own, or else a single one."""
    places = np.argwhere(allowed)
    g, t = gain[allowed], more[allowed]
    dearer, cheaper = np.flatnonzero((t > 0) & (g < 0)), np.flatnonzero(t < 0)
    dearer = dearer[np.argsort(g[dearer] / t[dearer], kind="stable")[:_PAIRED]]
    cheaper = cheaper[np.argsort(g[cheaper] / -t[cheaper], kind="stable")[:_PAIRED]]
    chosen: list[int] = []
    fits = np.flatnonzero(t <= slack)
    single = fits[g[fits].argmin()] if len(fits) else None
    if len(dearer) and len(cheaper):
        up, down = places[dearer], places[cheaper]
        steps = [_step(coupling, some, index) for some in (up, down)]  # [n, G]
        same = up[:, None, 0] == down[None, :, 0]
        cross = np.zeros(same.shape)
        for group, matrix in enumerate(coupling.matrix):
            outer = steps[0][:, group, None] * steps[1][None, :, group]
            cross += 2 * outer * matrix[up[:, None, 1], down[None, :, 1]]
        time = t[dearer][:, None] + t[cheaper][None]
        pair = g[dearer][:, None] + g[cheaper][None] + np.where(same, cross, 0.0)
        pair[(same & (up[:, None, 1] == down[None, :, 1])) | (time > slack)] = np.inf
        flat = pair.ravel()
        first = np.argpartition(flat, min(_PAIRED, len(flat) - 1))[:_PAIRED]
        used: set[int] = set()
        for at in first[np.argsort(flat[first], kind="stable")]:
            i, j = divmod(int(at), len(cheaper))
            layers = {int(up[i, 0]), int(down[j, 0])}
            if pair[i, j] >= 0 or layers & used or time[i, j] > slack:
                continue
            used |= layers
            slack -= time[i, j]
            chosen += [int(dearer[i]), int(cheaper[j])]
    if single is not None and g[single] < min(0.0, g[chosen].sum() if chosen else 0.0):
        chosen = [int(single)]
    return [(int(a), int(b), int(c)) for a, b, c in places[chosen]]


def _step(coupling: Coupling, places: np.ndarray, index: np.ndarray) -> np.ndarray:
    """By how much each change moves its cell's amplitude, ``[n, G]``."""
    layer, cell, option = places.T
    old = index[layer, cell]
    return (
        coupling.root[layer, cell, option][:, None] * coupling.member[option]
        - coupling.root[layer, cell, old][:, None] * coupling.member[old]
    )


def _changes(index: np.ndarray, branches: int, options: int) -> np.ndarray:
    """By how many changes along the steps a row has more with another option, ``[L, N, K]``."""
    rows = index.reshape(len(index), -1, branches)
    own = np.arange(options)
    more = np.zeros((*rows.shape, options))
    for near, here in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        neighbour = rows[:, near]
        differs = neighbour[..., None] != own
        more[:, here] += differs.astype(float) - (neighbour != rows[:, here])[..., None]
    return more.reshape(*index.shape, options)


def _count(index: np.ndarray, branches: int) -> int:
    rows = index.reshape(len(index), -1, branches)
    return int((rows[:, 1:] != rows[:, :-1]).sum())


def lower_bound(coupling: Coupling, time: np.ndarray, exists: np.ndarray, limit: float) -> float:
    """No choice within the limit has a smaller total.

    The total is convex where options may be mixed; the best mixture is sought by Frank-Wolfe steps
    (1956), each of which bounds it from below by the tangent's minimum.
    """
    share = _cheapest(np.zeros_like(time), time, exists, limit)
    best = 0.0
    for _ in range(_RELAXED):
        amplitude = coupling.amplitudes(share)
        field = coupling.field(amplitude)
        total = float((amplitude * field).sum())
        slope = 2 * coupling.root * np.einsum("lng,kg->lnk", field, coupling.member)
        corner = _cheapest(slope, time, exists, limit)
        way = corner - share
        fall = -float((slope * way).sum())
        best = max(best, total - fall)
        if fall <= 1e-3 * total:
            break
        bend = coupling.amplitudes(way)
        curve = 2 * float((bend * coupling.field(bend)).sum())
        share = share + min(1.0, fall / max(curve, 1e-300)) * way
    return best


def _cheapest(slope: np.ndarray, time: np.ndarray, exists: np.ndarray, limit: float) -> np.ndarray:
    """Shares of least slope within the limit: at most two corners mixed (a Lagrangian's)."""
    cells = exists[..., None]
    price_low, price_high = 0.0, 1.0
    eye = np.eye(slope.shape[2])

    def choose(price: float) -> tuple[np.ndarray, float]:
        share = eye[(slope + price * time).argmin(2)]
        return share, float((share * time * cells).sum())

    share, spent = choose(0.0)
    if spent <= limit:
        return share
    while choose(price_high)[1] > limit and price_high < 1e30:
        price_low, price_high = price_high, price_high * 16
    for _ in range(_HALVINGS):
        middle = (price_low + price_high) / 2
        if choose(middle)[1] > limit:
            price_low = middle
        else:
            price_high = middle
    (dear, much), (cheap, little) = choose(price_low), choose(price_high)
    part = (limit - little) / (much - little) if much > little else 0.0
    return cheap + min(max(part, 0.0), 1.0) * (dear - cheap)
