"""What an error in a layer at a step does to the final latents.

Errors of different cells are nearly independent, so their squares add up::

    final squared error = sum over cells of  sensitivity(cell) * local squared error(cell, spec)

Groups of layers (at all steps), groups of steps (in all layers) and each half of guidance are run
in a low spec one at a time, everything else in FP16, and a fit that is drawn toward the local error
(:mod:`.ridge`) meets those runs.  Mixed runs take no part in it and tell how good it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sage_diffusion.adapt import ridge
from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.gradient import cell_effects
from sage_diffusion.adapt.sampling import Sampler, planned
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import BRANCHES, PrecisionPlan, Rule
from sage_diffusion.plan.globs import cover, step_range

#: How many groups the layers and the steps are split into.
LAYER_GROUPS, STEP_GROUPS = 6, 5

#: Mixed runs, each with a random half of the groups in the low spec.
_CHECKS = 2


def measure_sensitivity(
    sampler: Sampler,
    table: ScoreTable,
    pairs: Sequence[tuple[Any, int]],
    *,
    layer_groups: int = LAYER_GROUPS,
    step_groups: int = STEP_GROUPS,
    progress: Callable[[str, int, int], None] | None = None,
    unfinished: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run groups of cells in the least accurate spec and fit what they do to the result.

    Args:
        sampler: host with the session.
        table: calibrated; its errors scale the effects.
        pairs: (prompt, seed) to average over.
        layer_groups, step_groups: how many groups the layers and the steps are split into.
        progress: called as ``progress("sensitivity", done, total)``.
        unfinished: what ``keep`` was given last when the stage was broken off; it goes on there.
        keep: called with plain data after each run.

    Returns:
        Plain data for ``ScoreTable.sensitivity``: ``spec``; ``layers`` and ``branches`` (names per
        group); ``steps`` (``[first, stop)`` per group); ``weight [LG][SG][BG]`` (final squared
        error per local one); ``layer_effect [LG]``, ``step_effect [SG]`` and ``branch_effect``
        (squared error of the final latents); ``factor [K]`` (measured over predicted error of each
        spec used everywhere: what kind of error a spec makes, and by how much chaotic samples raise
        the mean); ``peak`` (largest minus smallest reference latent); ``checks`` (predicted and
        measured error of the mixed runs); ``fit`` (how the fit and the local error alone did on
        runs that they had not seen, dB; ``ridge`` null where the local error is kept);
        ``pictures`` that were averaged over.

    Raises:
        TableError: ``unfinished`` is broken.
    """
    error = complete(table).error
    groups = Groups.of(table, error, layer_groups, step_groups)
    plans = groups.plans(table)
    job: dict[str, Any] = {"method": "groups", "plans": [plan.to_dict() for plan in plans]}
    job["pairs"] = [[str(prompt), seed] for prompt, seed in pairs]
    runs: list[list[float]] = []  # errors of the samples of each run, pair by pair
    peak = 0.0
    if unfinished is not None and all(unfinished.get(key) == value for key, value in job.items()):
        runs, peak = _loaded(unfinished)
    total = len(pairs) * len(plans)
    if progress is not None:
        progress("sensitivity", len(runs), total)
    for number, (prompt, seed) in enumerate(pairs):
        if len(runs) >= (number + 1) * len(plans):
            continue
        with planned(sampler.session, table.unquantized):
            reference = sampler.sample(prompt, seed).float()
        peak = max(peak, float(reference.max() - reference.min()))
        for plan in plans[len(runs) - number * len(plans) :]:
            with planned(sampler.session, plan):
                out = sampler.sample(prompt, seed).float()
            runs.append((out - reference).square().flatten(1).mean(1).tolist())
            if keep is not None:
                keep(job | {"runs": runs, "peak": peak})
            if progress is not None:
                progress("sensitivity", len(runs), total)
    errors = [list(itertools.chain(*runs[i :: len(plans)])) for i in range(len(plans))]
    return groups.fit(table, error, np.array(errors)) | {"peak": peak}


@dataclass(frozen=True)
class Groups:
    """Cells in groups of layers, steps and branches, and the runs that show what a group does.

    Attributes:
        low: index of the least accurate spec.
        layers: names, by group.
        steps: ``[first, stop)``, by group.
        branches: names, by group; one of all where a plan can't tell them apart.
        masks: which groups ``[LG, SG, BG]`` are in the low spec, run by run: each group of layers,
            of steps and of branches, then the mixed runs.
    """

    low: int
    layers: list[list[str]]
    steps: list[tuple[int, int]]
    branches: list[list[str]]
    masks: list[np.ndarray]

    @classmethod
    def of(
        cls,
        table: ScoreTable,
        error: np.ndarray,
        layer_groups: int = LAYER_GROUPS,
        step_groups: int = STEP_GROUPS,
    ) -> Groups:
        """So many groups of a table's cells, whose local squared errors are ``[L, S, B, K]``."""
        count = min(layer_groups, table.shape[0]), min(step_groups, table.steps)
        layers = [list(part) for part in np.array_split(table.layers, count[0])]
        edges = np.linspace(0, table.steps, count[1] + 1).round().astype(int)
        steps = [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        apart = set(table.branches) == set(BRANCHES)
        branches = [[name] for name in table.branches] if apart else [list(table.branches)]
        shape = len(layers), len(steps), len(branches)
        masks = [at == i for at in np.indices(shape)[: 2 + apart] for i in range(at.max() + 1)]
        rng = np.random.default_rng(0)
        for _ in range(_CHECKS):
            mask = np.zeros(math.prod(shape), dtype=bool)
            mask[rng.permutation(mask.size)[: mask.size // 2 or 1]] = True
            masks.append(mask.reshape(shape))
        low = int(np.argmax(np.nanmean(error, (0, 1, 2))))
        return cls(low, layers, steps, branches, masks)

    def plans(self, table: ScoreTable) -> list[PrecisionPlan]:
        """One per run: the masks', then every spec used everywhere."""
        return [self.plan(mask, table) for mask in self.masks] + [
            replace(table.unquantized, default=AttentionSpec.parse(name)) for name in table.specs
        ]

    def plan(self, mask: np.ndarray, table: ScoreTable) -> PrecisionPlan:
        """FP16 everywhere but in the groups of ``mask [LG, SG, BG]``."""
        spec = AttentionSpec.parse(table.specs[self.low])
        rules = []
        for i, j, k in np.argwhere(mask):
            first, stop = self.steps[j]
            start, end = step_range(first, stop, table.steps)
            branch = self.branches[k][0] if len(self.branches) > 1 else None
            globs = cover(self.layers[i], table.layers)
            rules += [Rule(spec, glob, start, end, branch) for glob in globs]
        return table.unquantized.with_rules(rules)

    def sums(self, table: ScoreTable, error: np.ndarray) -> np.ndarray:
        """Local squared errors summed over each group, ``[LG, SG, BG, K]``."""
        found = np.zeros((len(self.layers), len(self.steps), len(self.branches), error.shape[-1]))
        for i, j, k in np.ndindex(found.shape[:3]):
            found[i, j, k] = np.nansum(error[self.cells(table, i, j, k)], (0, 1, 2))
        return found

    def cells(self, table: ScoreTable, i: int, j: int, k: int) -> tuple[np.ndarray, ...]:
        """Index of a group's cells in arrays ``[L, S, B, ..]``."""
        return _cells(table, self.layers[i], self.steps[j], self.branches[k])

    def fit(self, table: ScoreTable, error: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
        """What the runs say of the groups, as :func:`measure_sensitivity` returns it.

        Args:
            table: calibrated.
            error: local squared errors, ``[L, S, B, K]``.
            errors: final squared errors of every sample, ``[runs, samples]``.
        """
        # A few chaotic samples err by orders of magnitude more than the others and would decide
        # alone in a mean of squares, yet they do decide the PSNR: what matters is judged by the
        # squared mean of the amplitudes, the level by the mean of the squares.
        votes = np.sqrt(errors).mean(1) ** 2
        measured, uniform = votes[: len(self.masks)], errors.mean(1)[len(self.masks) :]
        sums = self.sums(table, error)
        found = ridge.fit(sums[..., self.low], self.masks, measured, _CHECKS)
        predicted = np.einsum("ijbk,ijb->k", sums, found.rate)
        rows, columns = len(self.layers), len(self.layers) + len(self.steps)
        last = len(self.masks) - _CHECKS
        expected = [(mask * sums[..., self.low] * found.rate).sum() for mask in self.masks[last:]]
        return {
            "method": "groups",
            "spec": table.specs[self.low],
            "layers": self.layers,
            "steps": [list(s) for s in self.steps],
            "branches": self.branches,
            "weight": _rounded(found.rate),
            "layer_effect": _rounded(measured[:rows]),
            "step_effect": _rounded(measured[rows:columns]),
            "branch_effect": _rounded(measured[columns:last]),
            "factor": _rounded(uniform / np.maximum(predicted, 1e-300)),
            "checks": [
                {"predicted": float(p), "measured": float(m)}
                for p, m in zip(expected, measured[last:], strict=True)
            ],
            "fit": found.to_dict(),
            "pictures": errors.shape[1],
        }


def _loaded(unfinished: Mapping[str, Any]) -> tuple[list[list[float]], float]:
    try:
        runs = [[float(x) for x in run] for run in unfinished["runs"]]
        return runs, float(unfinished["peak"])
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(
            f"the unfinished end-to-end stage of the score table can't be read: {error!r}"
        ) from None


def cell_damage(table: ScoreTable, error: np.ndarray) -> np.ndarray:
    """Final squared error of every cell and spec, ``[L, S, B, K]``, by whichever stage was run.

    Args:
        table: calibrated.
        error: local squared errors ``[L, S, B, K]``, complete.
    """
    if table.sensitivity is not None and table.sensitivity.get("method") == "gradient":
        return cell_effects(table, error)
    return error * cell_weights(table)


def stage_of(table: ScoreTable) -> str:
    """What the weights of cells come from, in a few words."""
    found = table.sensitivity
    if found is None:
        return "the local error of attention"
    count = found.get("pictures")
    pictures = "" if count is None else f", {count} picture{'s' if count != 1 else ''}"
    if found.get("method") == "gradient":
        return f"the end-to-end stage (gradients{pictures})"
    instead = f"; no gradients: {found['instead']}" if "instead" in found else ""
    if "fit" in found and found["fit"]["ridge"] is None:
        return (
            "the local error of attention, which runs of groups did not improve on"
            f"{pictures}{instead}"
        )
    return f"the end-to-end stage (groups{pictures}{instead})"


def cell_weights(table: ScoreTable) -> np.ndarray:
    """Final squared error per unit of local squared error, ``[L, S, B, K]``.

    Without a sensitivity stage every cell weighs ``1 / cells``: what is predicted then is the mean
    local error.
    """
    if table.sensitivity is None:
        share = table.exists / max(int(table.exists.sum()), 1)
        return np.repeat(share[..., None], len(table.specs), -1)
    found, stage = np.full(table.shape, np.nan), table.sensitivity
    weight = np.array(stage["weight"], dtype=np.float64)
    groups = stage.get("branches") or [list(table.branches)]
    weight = weight.reshape(*weight.shape[:2], len(groups))  # stages of before knew no branches
    for i, j, k in np.ndindex(weight.shape):
        at = _cells(table, stage["layers"][i], stage["steps"][j], groups[k])
        found[at] = weight[i, j, k]
    # A layer that appeared after the stage was run: as sensitive as the mean.
    found = np.where(np.isnan(found), np.nanmean(found), found)
    return found[..., None] * np.array(table.sensitivity["factor"])


def _cells(
    table: ScoreTable, layers: Sequence[str], steps: Sequence[int], branches: Sequence[str]
) -> tuple[np.ndarray, ...]:
    rows = [table.layers.index(name) for name in layers]
    columns = [table.branches.index(name) for name in branches]
    return np.ix_(rows, range(*steps), columns)


def _rounded(array: np.ndarray) -> Any:
    return [_rounded(x) if np.ndim(x) else float(f"{x:.6g}") for x in array]
