"""What an error in a layer at a step does to the final latents.

Errors of different cells are nearly independent, so their squares add up::

    final squared error = sum over cells of  sensitivity(cell) * local squared error(cell, spec)

Groups of layers (at all steps) and groups of steps (in all layers) are run in a low spec one at a
time, everything else in FP16; mixed runs check, and then take part in, the fit by non-negative
least squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.gradient import cell_effects
from sage_diffusion.adapt.sampling import Sampler, planned
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan, Rule
from sage_diffusion.plan.globs import cover, step_range

#: Mixed runs, each with a random half of the groups in the low spec.
_CHECKS = 2


def measure_sensitivity(
    sampler: Sampler,
    table: ScoreTable,
    pairs: Sequence[tuple[Any, int]],
    *,
    layer_groups: int = 6,
    step_groups: int = 5,
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
        Plain data for ``ScoreTable.sensitivity``: ``spec``; ``layers`` (names per group); ``steps``
        (``[first, stop)`` per group); ``weight [LG][SG]`` (final squared error per local one);
        ``layer_effect [LG]`` and ``step_effect [SG]`` (squared error of the final latents);
        ``factor [K]`` (measured over predicted error of each spec used everywhere: what kind of
        error a spec makes, and by how much chaotic samples raise the mean); ``peak`` (largest minus
        smallest reference latent); ``checks`` (predicted and measured error of the mixed runs).

    Raises:
        TableError: ``unfinished`` is broken.
    """
    error = complete(table).error
    groups = _Groups.of(table, error, layer_groups, step_groups)
    plans = groups.plans(table)
    job: dict[str, Any] = {"method": "groups", "plans": [plan.to_dict() for plan in plans]}
    job["pairs"] = [[str(prompt), seed] for prompt, seed in pairs]
    runs: list[list[float]] = []  # errors of the samples of each run, pair by pair
    peak = 0.0
    if unfinished is not None and all(unfinished.get(key) == value for key, value in job.items()):
        runs, peak = _loaded(unfinished)
    total = len(pairs) * len(plans)
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
class _Groups:
    """Cells in groups of layers and steps, and the runs that show what a group does.

    Attributes:
        low: index of the least accurate spec.
        layers: names, by group.
        steps: ``[first, stop)``, by group.
        masks: which groups ``[LG, SG]`` are in the low spec, run by run: each group of layers,
            each group of steps, then the mixed runs.
    """

    low: int
    layers: list[list[str]]
    steps: list[tuple[int, int]]
    masks: list[np.ndarray]

    @classmethod
    def of(
        cls, table: ScoreTable, error: np.ndarray, layer_groups: int, step_groups: int
    ) -> _Groups:
        """So many groups of a table's cells, whose local squared errors are ``[L, S, B, K]``."""
        count = min(layer_groups, table.shape[0]), min(step_groups, table.steps)
        layers = [list(part) for part in np.array_split(table.layers, count[0])]
        edges = np.linspace(0, table.steps, count[1] + 1).round().astype(int)
        masks = [np.broadcast_to(np.arange(count[0])[:, None] == i, count) for i in range(count[0])]
        masks += [np.broadcast_to(np.arange(count[1]) == i, count) for i in range(count[1])]
        rng = np.random.default_rng(0)
        for _ in range(_CHECKS):
            mask = np.zeros(count[0] * count[1], dtype=bool)
            mask[rng.permutation(mask.size)[: mask.size // 2 or 1]] = True
            masks.append(mask.reshape(count))
        low = int(np.argmax(np.nanmean(error, (0, 1, 2))))
        steps = [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        return cls(low, layers, steps, masks)

    def plans(self, table: ScoreTable) -> list[PrecisionPlan]:
        """One per run: the masks', then every spec used everywhere."""
        low = table.specs[self.low]
        plans = [group_plan(low, mask, self.layers, self.steps, table) for mask in self.masks]
        return plans + [
            replace(table.unquantized, default=AttentionSpec.parse(name)) for name in table.specs
        ]

    def fit(self, table: ScoreTable, error: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
        """What the runs say of the groups, as :func:`measure_sensitivity` returns it.

        Args:
            table: calibrated.
            error: local squared errors, ``[L, S, B, K]``.
            errors: final squared errors of every sample, ``[runs, samples]``.
        """
        rows, columns = len(self.layers), len(self.steps)
        single = rows + columns
        # A few chaotic samples err by orders of magnitude more than the others and would decide
        # alone in a mean of squares, yet they do decide the PSNR: what matters is judged by the
        # squared mean of the amplitudes, the level by the mean of the squares.
        votes = np.sqrt(errors).mean(1) ** 2
        measured, uniform = votes[: len(self.masks)], errors.mean(1)[len(self.masks) :]
        sums = np.array(
            [
                _group_sums(table, error[..., k], self.layers, self.steps)
                for k in range(len(table.specs))
            ]
        )
        design = np.stack([(mask * sums[self.low]).ravel() for mask in self.masks])
        # From equal weights: what the runs leave open stays as the local error says.
        even = np.full(design.shape[1], measured[:single].mean() / design[:single].sum(1).mean())
        blind = nonnegative_fit(design[:single], measured[:single], even)
        weight = nonnegative_fit(design, measured, even)
        predicted = (sums.reshape(len(table.specs), -1) * weight).sum(1)
        return {
            "spec": table.specs[self.low],
            "layers": self.layers,
            "steps": [list(s) for s in self.steps],
            "weight": _rounded(weight.reshape(rows, columns)),
            "layer_effect": [float(f"{x:.6g}") for x in measured[:rows]],
            "step_effect": [float(f"{x:.6g}") for x in measured[rows:single]],
            "factor": [float(f"{x:.6g}") for x in uniform / np.maximum(predicted, 1e-300)],
            "checks": [
                {"predicted": float(design[i] @ blind), "measured": float(measured[i])}
                for i in range(single, len(self.masks))
            ],
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


def cell_weights(table: ScoreTable) -> np.ndarray:
    """Final squared error per unit of local squared error, ``[L, S, B, K]``.

    Without a sensitivity stage every cell weighs ``1 / cells``: what is predicted then is the mean
    local error.
    """
    if table.sensitivity is None:
        share = table.exists / max(int(table.exists.sum()), 1)
        return np.repeat(share[..., None], len(table.specs), -1)
    found = np.full(table.shape, np.nan)
    for names, row in zip(table.sensitivity["layers"], table.sensitivity["weight"], strict=True):
        for (first, stop), value in zip(table.sensitivity["steps"], row, strict=True):
            for name in names:
                found[table.layers.index(name), first:stop] = value
    # A layer that appeared after the stage was run: as sensitive as the mean.
    found = np.where(np.isnan(found), np.nanmean(found), found)
    return found[..., None] * np.array(table.sensitivity["factor"])


def group_plan(
    spec: str,
    mask: np.ndarray,
    layers: Sequence[Sequence[str]],
    steps: Sequence[tuple[int, int]],
    table: ScoreTable,
) -> PrecisionPlan:
    """FP16 everywhere but in the groups of ``mask [LG, SG]``."""
    parsed = AttentionSpec.parse(spec)
    rules = []
    for names, row in zip(layers, mask, strict=True):
        for (first, stop), on in zip(steps, row, strict=True):
            if on:
                start, end = step_range(first, stop, table.steps)
                rules += [Rule(parsed, g, start, end) for g in cover(names, table.layers)]
    return table.unquantized.with_rules(rules)


def nonnegative_fit(design: np.ndarray, target: np.ndarray, start: np.ndarray) -> np.ndarray:
    """``x >= 0`` with ``design @ x`` close to ``target`` relative to its size.

    Multiplicative updates (Lee and Seung) from ``start``; everything must be non-negative.
    """
    scale = 1.0 / np.maximum(target, target.max() * 1e-3)
    a, b = design * scale[:, None], target * scale
    x = np.maximum(start, 1e-300)
    gram, right = a.T @ a, a.T @ b
    for _ in range(5000):
        x = x * right / np.maximum(gram @ x, 1e-300)
    return x


def _group_sums(
    table: ScoreTable,
    error: np.ndarray,
    layers: Sequence[Sequence[str]],
    steps: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Local squared errors summed over each group, ``[LG, SG]``."""
    rows = [[table.layers.index(name) for name in names] for names in layers]
    return np.array(
        [[np.nansum(error[index, first:stop]) for first, stop in steps] for index in rows]
    )


def _rounded(array: np.ndarray) -> list[list[float]]:
    return [[float(f"{x:.6g}") for x in row] for row in array]
