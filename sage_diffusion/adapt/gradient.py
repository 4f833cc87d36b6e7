"""What every cell's error does to the final latents, all cells at once, by backward passes.

An error ``e`` added to the output of one attention call moves the final latents by ``J e``, J being
the Jacobian through everything that follows: the rest of the network, guidance, later steps.  For a
probe v of random signs, ``v^T J`` is one backward pass through the whole sampling run, it is the
same for all cells, and the mean of ``(v^T J e)^2`` over probes is ``|J e|^2`` (Hutchinson, 1990).
So a few pictures and probes rate every (layer, step, branch, spec), where running the model with
one group of cells perturbed at a time (:mod:`.sensitivity`) rates groups only.

It is linear: it ranks cells, and predicts well only while errors are too small to flip a picture to
another mode.  The graph of a whole run must fit into memory, or that of one call of the network
where the host can make calls anew (:class:`.Replayer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_diffusion.adapt.backward import Rating, signs
from sage_diffusion.adapt.process import directions_of, fit_together
from sage_diffusion.adapt.sampling import Replayer, planned
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError
from sage_diffusion.kernels.spec import AttentionSpec

#: Backward passes per run.
PROBES = 2

#: Least effect that counts as one, relative to its spec's largest.
_FLOOR = 1e-12


def measure_gradient(
    sampler: Any,
    table: ScoreTable,
    pairs: Sequence[tuple[Any, int]],
    *,
    probes: int = PROBES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    unfinished: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Rate every cell and spec of a table by its effect on the final latents.

    Args:
        sampler: a :class:`Tracer` or :class:`Replayer` with the session.
        table: calibrated; its layers, steps and branches are rated.
        pairs: (prompt, seed), one picture each.
        probes: backward passes per picture.
        seed: of the probes.
        progress: called as ``progress("sensitivity", done, total)``.
        unfinished: what ``keep`` was given last when the stage was broken off; it goes on there.
        keep: called with plain data after each graph.

    Returns:
        Plain data for ``ScoreTable.sensitivity``: ``method`` "gradient"; ``layers``, ``branches``;
        ``effect [L][S][B][K]``, the mean squared error of the final latents that each cell adds,
        null where it was never called; ``factor [K]``, by how much the errors of one spec add up
        beyond independence when it is used everywhere; ``correlation [K][B][B][S]``, of what a
        layer does to the result in one branch and, that many steps later, in another (averaged over
        layers and steps); ``peak``, largest minus smallest latent; ``pictures`` rated.

    Raises:
        NoGradient: the host's sampling can't be differentiated.
        TableError: ``unfinished`` is broken.
    """
    specs = [AttentionSpec.parse(name) for name in table.specs]
    job: dict[str, Any] = {"method": "gradient", "probes": probes, "seed": seed}
    job["pairs"] = [[str(prompt), number] for prompt, number in pairs]
    tally = _Tally((*table.shape, len(specs)))
    if unfinished is not None and all(unfinished.get(key) == value for key, value in job.items()):
        tally.load(unfinished)
    generator = torch.Generator().manual_seed(seed)
    for shape in tally.shapes:  # the pictures that are done drew theirs
        for _ in range(probes):
            signs(shape, generator)
    replays = isinstance(sampler, Replayer)
    while True:
        if progress is not None:
            progress("sensitivity", len(tally.shapes), len(pairs))
        some = pairs[len(tally.shapes) :][: 1 if replays else sampler.batch]
        if not some:
            break
        rating = Rating(sampler.session, table, specs, probes, generator)
        with planned(sampler.session, table.unquantized):
            if replays:
                sampler.replay(some[0], rating.replay)
            else:
                rating.trace(sampler, some)
        for latents, found in zip(rating.final.chunk(len(some)), rating.found, strict=True):
            tally.add(latents, found)
        if keep is not None:
            keep(job | tally.to_dict())
    factor = tally.together / np.maximum(tally.apart, 1e-300)
    return {
        "method": "gradient",
        "layers": list(table.layers),
        "branches": list(table.branches),
        "effect": _plain(smooth(tally.effect())),
        "factor": [float(f"{x:.6g}") for x in factor],
        "correlation": np.round(tally.correlation(), 4).tolist(),
        "peak": tally.peak,
        "pictures": len(tally.shapes),
    }


class _Tally:
    """What the pictures say together; plain data while the stage is unfinished.

    Args:
        shape: layers, steps, branches, specs.
    """

    _ARRAYS = ("votes", "seen", "together", "apart", "agree", "compared")

    def __init__(self, shape: tuple[int, ...]):
        self.votes = np.zeros(shape)
        self.seen = np.zeros(shape)  # pictures that called the cell
        self.together, self.apart = np.zeros(shape[-1]), np.zeros(shape[-1])
        _, steps, branches, specs = shape
        self.agree, self.compared = np.zeros((2, specs, branches, branches, steps))
        self.levels: list[float] = []
        self.shapes: list[tuple[int, ...]] = []  # of the final latents
        self.peak = 0.0

    def add(self, final: Tensor, effects: np.ndarray) -> None:
        """One picture's ``v^T J e``, ``[P, L, S, B, K]``."""
        squares = np.square(effects).mean(0) / final.numel()
        total = np.nansum(squares, (0, 1, 2))
        # Chaotic pictures err by orders of magnitude more than the others. With equal votes they
        # would be given up, with their squared errors they would decide alone: the square root
        # costs the mean over pictures little and is worth 1.5 dB of the pooled PSNR.
        self.votes += np.nan_to_num(squares / max(total.max(), 1e-300) ** 0.5)
        self.seen += np.isfinite(squares)
        self.together += np.square(np.nansum(effects, (1, 2, 3))).mean(0) / final.numel()
        self.apart += total
        self._compare_signs(np.sign(np.nan_to_num(effects)))
        self.levels.append(float(total.max()))
        self.shapes.append(tuple(final.shape))
        self.peak = max(self.peak, float(final.max() - final.min()))

    def _compare_signs(self, signs: np.ndarray) -> None:
        """How often cells of one layer move the result the same way; chaotic pictures count as the
        others do."""
        steps = signs.shape[2]
        for lag in range(steps):
            a, b = signs[:, :, : steps - lag], signs[:, :, lag:]
            self.agree[..., lag] += np.einsum("plsbk,plsck->kbc", a, b)
            self.compared[..., lag] += np.einsum("plsbk,plsck->kbc", np.abs(a), np.abs(b))

    def effect(self) -> np.ndarray:
        """What each cell adds to the final squared error, NaN where none was seen."""
        effect = self.votes / np.where(self.seen, self.seen, np.nan)
        return effect * (np.mean(self.levels) / max(np.nansum(effect, (0, 1, 2)).max(), 1e-300))

    def correlation(self) -> np.ndarray:
        """``[K, B, B, S]``; of two normal variables it is the sine of pi / 2 times what the signs
        agree more often than not (Sheppard, 1899)."""
        return np.sin(np.pi / 2 * self.agree / np.maximum(self.compared, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """All digits, so that going on is the same as never having stopped."""
        return {name: getattr(self, name).tolist() for name in self._ARRAYS} | {
            "levels": list(self.levels),
            "shapes": [list(shape) for shape in self.shapes],
            "peak": self.peak,
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Go on from :meth:`to_dict`."""
        try:
            for name in self._ARRAYS:
                getattr(self, name)[...] = np.array(data[name], dtype=np.float64)
            self.levels = [float(x) for x in data["levels"]]
            self.shapes = [tuple(map(int, shape)) for shape in data["shapes"]]
            self.peak = float(data["peak"])
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(
                f"the unfinished end-to-end stage of the score table can't be read: {error!r}"
            ) from None


def cell_means(kept: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Final squared error of every cell and spec ``[L, S, B, K]`` as it was measured, not smoothed.

    Args:
        kept: what ``keep`` of :func:`measure_gradient` was given last.
        shape: layers, steps, branches, specs.

    Raises:
        TableError: ``kept`` is broken.
    """
    tally = _Tally(shape)
    tally.load(kept)
    return tally.effect()


def cell_effects(table: ScoreTable, error: np.ndarray) -> np.ndarray:
    """Final squared error of every cell and spec ``[L, S, B, K]`` of a gradient stage.

    Cells that it never saw weigh as much as the mean of their spec does per local error.

    Args:
        table: with a gradient stage.
        error: local squared errors, ``[L, S, B, K]``, complete.
    """
    assert table.sensitivity is not None
    stored = np.array(table.sensitivity["effect"], dtype=np.float64)
    found = np.full(table.shape + stored.shape[-1:], np.nan)
    for i, layer in enumerate(table.sensitivity["layers"]):
        for b, branch in enumerate(table.sensitivity["branches"]):
            if layer in table.layers and branch in table.branches:
                at = table.layers.index(layer), slice(None), table.branches.index(branch)
                found[at] = stored[i, :, b]
    with np.errstate(invalid="ignore"):
        known = np.isfinite(found) & np.isfinite(error)
        rate = np.where(known, found, 0).sum((0, 1, 2)) / np.where(known, error, 0).sum((0, 1, 2))
    found = np.where(np.isnan(found), error * rate, found)
    return found * np.array(table.sensitivity["factor"])


def smooth(effect: np.ndarray) -> np.ndarray:
    """Effects ``[L, S, B, K]`` without what few pictures and probes leave to chance.

    As of local errors, the logarithms are a Gaussian process over layers, steps and branches
    (:mod:`.process`), which tells noise from what layers, steps and branches have in common.  NaN
    and 0 stay as they are, and so does the sum of every spec.
    """
    with np.errstate(invalid="ignore"):
        known = np.all(effect > 0, -1)
    if not known.any():
        return effect
    some = effect[known]
    logs = np.log(np.maximum(some, _FLOOR * some.max(0)))
    values = np.zeros(effect.shape)
    values[known] = logs
    found = np.exp(fit_together(values, known, directions_of(logs)).mean[known])
    out = effect.copy()
    out[known] = found * (some.sum(0) / found.sum(0))
    return out


def _plain(array: np.ndarray) -> Any:
    if array.ndim:
        return [_plain(part) for part in array]
    return None if np.isnan(array) else float(f"{array:.4g}")
