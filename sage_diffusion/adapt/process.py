"""A Gaussian process over layers x steps x branches: from some cells' values to all, with bars.

What is known of a layer says something about its other steps and its other branch, and what all
layers have in common says something about each.  So a value is a sum of independent parts

    all layers + all layers x branch + layer + layer x branch + noise

each but the noise once constant and once smooth in the step (the idea of 2311.04465, covariances
with the structure of the grid and fitted parameters; its spectral mixture brings nothing here).
How much each part varies, and over how many steps, is what makes the known values most likely, with
a weak prior.  Given what is common, layers are independent: all of it is exact, and costs a
factorization of each layer's known cells and one of steps x branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Prior of the logarithm of a variance relative to the values' own: mean and standard deviation.
_VARIANCE = math.log(0.2), 2.0

#: The same of the smooth parts' width, relative to all steps.
_WIDTH = math.log(0.2), 0.7

#: The same of the noise's variance.
_NOISE = math.log(0.05), 2.0

#: Of the logarithms of the parameters: the parts', the smooth parts' width, the noise's.
_PRIOR = [_VARIANCE] * 6 + [_WIDTH, _NOISE]

#: So many standard deviations of their prior the parameters keep to: beyond, a matrix that says
#: nothing more of the values may not be factorized any more.
_REACH = 4.0

#: Variance of the constants that all layers have in common, relative to the values' own: nothing
#: is known of them beforehand.
_VAGUE = 100.0

#: Relative to the values' variance; keeps factorizations possible where nothing varies.
_JITTER = 1e-8

#: Numbers in the covariances that are worked on at once.
_BLOCK = 4_000_000

#: Standard deviation of values that are taken as equal.
_LEAST_SCALE = 1e-6

#: Of the search for the parameters, from nowhere and from those of similar values.
_ITERATIONS, _FEW_ITERATIONS = 50, 10


@dataclass(frozen=True)
class Known:
    """Cells whose values are known, by layer.

    Attributes:
        place: ``[L, n]``, step * branches + branch of each; 0 where a layer has fewer than n.
        there: ``[L, n]`` bool, which are no padding.
        steps, branches: how many there are.
    """

    place: Tensor
    there: Tensor
    steps: int
    branches: int

    @classmethod
    def of(cls, known: np.ndarray) -> Known:
        """Of the cells in ``known [L, S, B]``."""
        layers, steps, branches = known.shape
        rows = [np.flatnonzero(row) for row in known.reshape(layers, -1)]
        most = max(map(len, rows))
        place, there = np.zeros((layers, most), np.int64), np.zeros((layers, most), bool)
        for i, row in enumerate(rows):
            place[i, : len(row)], there[i, : len(row)] = row, True
        return cls(torch.from_numpy(place), torch.from_numpy(there), steps, branches)

    def gather(self, values: np.ndarray) -> Tensor:
        """``values [L, S, B]`` at the known cells, ``[L, n]``, 0 at the padding."""
        flat = torch.from_numpy(values.reshape(len(values), -1).astype(np.float64))
        return flat.gather(1, self.place).where(self.there, 0.0)

    def blocks(self) -> list[slice]:
        """Layers that are worked on at once."""
        layers, count = self.place.shape
        size = max(1, _BLOCK // max(count * count, 1))
        return [slice(i, i + size) for i in range(0, layers, size)]


@dataclass(frozen=True)
class Fitted:
    """What a process says of every cell.

    Attributes:
        mean, deviation: of each value, ``[L, S, B]``; the noise of one measurement counts.
        theta: logarithms of the parameters.
    """

    mean: np.ndarray
    deviation: np.ndarray
    theta: Tensor


def fit(values: np.ndarray, known: np.ndarray, start: Tensor | None = None) -> Fitted:
    """Fit a process to some values.

    Args:
        values: ``[L, S, B]``, finite where known.
        known: ``[L, S, B]`` bool, at least one.
        start: where the search for the parameters begins, ``theta`` of a fit to similar values.
    """
    some = values[known]
    center, scale = float(some.mean()), max(float(some.std()), _LEAST_SCALE)
    # The search needs gradients wherever it is asked for; hosts may have set inference mode.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        cells = Known.of(known)
        y = cells.gather((np.where(known, values, center) - center) / scale)
        theta = _likeliest(cells, y, start)
        mean, deviation = _Posterior(cells, y, theta).predict()
    return Fitted(
        mean.numpy().reshape(values.shape) * scale + center,
        deviation.numpy().reshape(values.shape) * scale,
        theta,
    )


@dataclass(frozen=True)
class Together:
    """What processes of specs that vary together say of every cell.

    Attributes:
        mean, deviation: of each value, ``[L, S, B, K]``; the noise of one measurement counts.
        thetas: of each direction's process.
    """

    mean: np.ndarray
    deviation: np.ndarray
    thetas: tuple[Tensor, ...]


def directions_of(values: np.ndarray) -> np.ndarray:
    """Principal directions ``[K, K]``, in columns, of values ``[N, K]``."""
    if len(values) < 2:
        return np.eye(values.shape[-1])
    return np.linalg.eigh(np.atleast_2d(np.cov(values.T)))[1]


def fit_together(
    values: np.ndarray,
    known: np.ndarray,
    directions: np.ndarray,
    starts: Sequence[Tensor] | None = None,
) -> Together:
    """Fit a process of its own to each direction of the specs.

    Args:
        values: ``[L, S, B, K]``, finite where known.
        known: ``[L, S, B]`` bool, at least one.
        directions: ``[K, K]``, see :func:`directions_of`.
        starts: where the searches begin, ``thetas`` of a fit to similar values.
    """
    along = np.where(known[..., None], values, 0.0) @ directions
    begin: Sequence[Tensor | None] = starts or [None] * along.shape[-1]
    fits = [fit(along[..., q], known, start) for q, start in enumerate(begin)]
    mean = np.stack([each.mean for each in fits], -1) @ directions.T
    variance = np.stack([each.deviation**2 for each in fits], -1) @ (directions.T**2)
    return Together(mean, np.sqrt(variance), tuple(each.theta for each in fits))


class _Covariance:
    """The parts' variances, their width and the noise, from the logarithms ``theta [8]``."""

    def __init__(self, theta: Tensor, steps: int, branches: int):
        self.branches = branches
        self.width = theta[6].exp() * max(steps, 2)
        self.noise = theta[7].exp() + _JITTER
        variance = theta[:6].exp()
        at, vague = torch.arange(steps * branches), theta.new_tensor(_VAGUE)
        #: Of the places of one layer, and of what all layers have in common.
        self.of_layer = self._of(at, at, variance[:4])
        parts = torch.stack([vague, variance[4], vague, variance[5]])
        self.of_all = self._of(at, at, parts) + _VAGUE * _JITTER * torch.eye(len(at)).double()

    def _of(self, a: Tensor, b: Tensor, parts: Tensor) -> Tensor:
        """Between places, of parts that are constant, smooth, and both of one branch alone."""
        gap = (a[:, None] // self.branches - b // self.branches).abs() * (math.sqrt(3) / self.width)
        smooth = (1 + gap) * torch.exp(-gap)  # Matern's of order 3/2
        same = (a[:, None] % self.branches == b % self.branches).double()
        return parts[0] + parts[1] * smooth + same * (parts[2] + parts[3] * smooth)

    def between(self, place: Tensor, there: Tensor) -> Tensor:
        """Of each layer's known cells, noise included, ``[l, n, n]``; padding is independent."""
        found = self.of_layer[place[:, :, None], place[:, None]]
        both = there[:, :, None] & there[:, None]
        eye = torch.eye(place.shape[1], dtype=torch.float64)
        return torch.where(both, found, 0.0) + eye * torch.where(there, self.noise, 1.0)[..., None]


class _Posterior:
    """A process given the known values ``y [L, n]``.

    With H picking each cell's place and G the covariance of what all layers have in common,

        covariance = blockdiag(K_l) + H G H^T,  G = F F^T,

    whose inverse and determinant follow from those of K_l and of 1 + F^T H^T K^-1 H F (Woodbury).
    """

    def __init__(self, cells: Known, y: Tensor, theta: Tensor):
        self.cells, self.y = cells, y
        self.cov = _Covariance(theta, cells.steps, cells.branches)
        size = cells.steps * cells.branches
        gram, pull = y.new_zeros(size * size), y.new_zeros(size)
        self.log_det, self.square = y.new_zeros(()), y.new_zeros(())
        self.inverses = []
        for rows in cells.blocks():
            place, there = cells.place[rows], cells.there[rows]
            root = torch.linalg.cholesky(self.cov.between(place, there))
            inverse = torch.cholesky_inverse(root)
            solved = (inverse @ y[rows][..., None])[..., 0]
            self.log_det = self.log_det + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum()
            self.square = self.square + (solved * y[rows]).sum()
            both = there[:, :, None] & there[:, None]
            at = place[:, :, None] * size + place[:, None]
            gram = gram.index_add(0, at.flatten(), inverse.where(both, 0.0).flatten())
            pull = pull.index_add(0, place.flatten(), solved.flatten())
            self.inverses.append(inverse)
        factor = torch.linalg.cholesky(self.cov.of_all)
        inner = torch.eye(size).double() + factor.T @ gram.view(size, size) @ factor
        inner = torch.linalg.cholesky(inner)
        #: Of what is common: the root of its posterior covariance, and its posterior mean.
        self.spread = torch.linalg.solve_triangular(inner, factor.T, upper=False).T
        part = self.spread.T @ pull
        self.common = self.spread @ part
        self.log_det = self.log_det + 2 * inner.diagonal().log().sum()
        self.square = self.square - part.square().sum()

    def surprise(self) -> Tensor:
        """Negative logarithm of the likelihood, up to a constant."""
        return (self.log_det + self.square) / 2

    def predict(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every place, ``[L, S * B]`` each."""
        means, deviations = [], []
        prior = self.cov.of_layer
        for rows, inverse in zip(self.cells.blocks(), self.inverses, strict=True):
            place, there = self.cells.place[rows], self.cells.there[rows]
            across = prior[:, place].transpose(0, 1).where(there[:, None], 0.0)  # [l, S * B, n]
            gain = across @ inverse
            rest = (self.y[rows] - self.common[place]).where(there, 0.0)
            means.append(self.common + (gain @ rest[..., None])[..., 0])
            own = prior.diagonal() - (gain * across).sum(-1)
            # What the layer's cells say is relative to what is common, which is not sure either.
            shared = self.spread - gain @ self.spread[place].where(there[..., None], 0.0)
            variance = own + shared.square().sum(-1) + self.cov.noise
            deviations.append(variance.clamp_min(_JITTER).sqrt())
        return torch.cat(means), torch.cat(deviations)


def _likeliest(cells: Known, y: Tensor, start: Tensor | None) -> Tensor:
    """The parameters that make the values most likely, weighed with their prior."""
    center, spread = torch.tensor(_PRIOR, dtype=torch.float64).T
    low, high = center - _REACH * spread, center + _REACH * spread
    theta = (center if start is None else start).clone().requires_grad_()
    search = torch.optim.LBFGS(
        [theta],
        max_iter=_ITERATIONS if start is None else _FEW_ITERATIONS,
        tolerance_grad=1e-3,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        with torch.enable_grad():
            found = _Posterior(cells, y, theta.clamp(low, high)).surprise()
            found = found + ((theta - center) / spread).square().sum() / 2
            found.backward()
        return found.detach()

    search.step(loss)
    return theta.detach().clamp(low, high)
