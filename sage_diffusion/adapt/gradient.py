"""What every cell's error does to the final latents, all cells at once, by backward passes.

An error ``e`` added to the output of one attention call moves the final latents by ``J e``, J being
the Jacobian through everything that follows: the rest of the network, guidance, later steps.  For a
probe v of random signs, ``v^T J`` is one backward pass through the whole sampling run, it is the
same for all cells, and the mean of ``(v^T J e)^2`` over probes is ``|J e|^2`` (Hutchinson, 1990).
So a few pictures and probes rate every (layer, step, branch, spec), where running the model with
one group of cells perturbed at a time (:mod:`.sensitivity`) rates groups only.

It is linear: it ranks cells, and predicts well only while errors are too small to flip a picture to
another mode.  The graph of a whole run must fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sage_diffusion.adapt.table import BOTH, ScoreTable
from sage_diffusion.calls import AttentionEvent
from sage_diffusion.kernels.attention import reference
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.validation import four_dims

#: Backward passes per run.
PROBES = 2

#: Neighbouring steps do alike; ratings are averaged over them with this standard deviation.
_STEP_WIDTH = 2.5


class NoGradient(ValueError):
    """A host whose attention outputs carry no gradient."""


@runtime_checkable
class Tracer(Protocol):
    """A :class:`~sage_diffusion.adapt.calibrate.Sampler` that can be differentiated."""

    def pictures(self, prompt: Any, seed: int) -> list[tuple[Any, int]]:
        """The (prompt, seed) of every picture of a run, so that one graph holds one picture."""

    def trace(self, prompt: Any, seed: int) -> Tensor:
        """As ``sample``, with the graph that leads to the final latents."""


class _Errors:
    """Observer that keeps every call's output, a node of the graph, and each spec's error in it."""

    def __init__(self, specs: Sequence[AttentionSpec]):
        self.specs = specs
        self.cells: list[tuple[str, int, str]] = []
        self.outs: list[Tensor] = []
        self.errors: list[list[Tensor]] = []

    def observe(self, event: AttentionEvent) -> None:
        """See :class:`sage_diffusion.calls.Observer`."""
        if event.step < 0:
            return
        if not event.out.requires_grad:
            raise NoGradient(
                f"the attention output of {event.layer} must carry a gradient, it has none: the "
                "host samples without autograd, or the model is compiled"
            )
        options: dict[str, Any] = {
            "mask": four_dims(event.mask),
            "is_causal": event.is_causal,
            "scale": event.scale,
        }
        self.cells.append((event.layer, event.step, event.branch or BOTH))
        self.outs.append(event.out)
        self.errors.append(
            [
                reference.attention(event.q, event.k, event.v, spec, **options)[0] - event.out
                for spec in self.specs
            ]
        )


def measure_gradient(
    sampler: Any,
    table: ScoreTable,
    pairs: Sequence[tuple[Any, int]],
    *,
    probes: int = PROBES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Rate every cell and spec of a table by its effect on the final latents.

    Args:
        sampler: a :class:`Tracer` with the session.
        table: calibrated; its layers, steps and branches are rated.
        pairs: (prompt, seed), one picture each.
        probes: backward passes per picture.
        seed: of the probes.
        progress: called as ``progress("sensitivity", done, total)``.

    Returns:
        Plain data for ``ScoreTable.sensitivity``: ``method`` "gradient"; ``layers``, ``branches``;
        ``effect [L][S][B][K]``, the mean squared error of the final latents that each cell adds,
        null where it was never called; ``factor [K]``, by how much the errors of one spec add up
        beyond independence when it is used everywhere; ``peak``, largest minus smallest latent.

    Raises:
        NoGradient: the host's sampling can't be differentiated.
    """
    from sage_diffusion.adapt.calibrate import planned

    specs = [AttentionSpec.parse(name) for name in table.specs]
    votes, levels = [], []
    together, apart = np.zeros(len(specs)), np.zeros(len(specs))
    peak = 0.0
    generator = torch.Generator().manual_seed(seed)
    for done, (prompt, number) in enumerate(pairs):
        watcher = _Errors(specs)
        sampler.session.observers.append(watcher)
        try:
            with planned(sampler.session, "fp16"):
                final = sampler.trace(prompt, number)
        finally:
            sampler.session.observers.remove(watcher)
        effects = _effects(final, watcher, table, probes, generator)  # [P, L, S, B, K]
        peak = max(peak, float((final.max() - final.min()).detach()))
        squares = np.square(effects).mean(0) / final.numel()
        total = np.nansum(squares, (0, 1, 2))
        together += np.square(np.nansum(effects, (1, 2, 3))).mean(0) / final.numel()
        apart += total
        # Chaotic pictures err by orders of magnitude more than the others. With equal votes they
        # would be given up, with their squared errors they would decide alone: the square root
        # costs the mean over pictures little and is worth 1.5 dB of the pooled PSNR.
        votes.append(squares / max(total.max(), 1e-300) ** 0.5)
        levels.append(total.max())
        if progress is not None:
            progress("sensitivity", done + 1, len(pairs))
    effect = _known_mean(np.array(votes))
    effect *= np.mean(levels) / max(np.nansum(effect, (0, 1, 2)).max(), 1e-300)
    return {
        "method": "gradient",
        "layers": list(table.layers),
        "branches": list(table.branches),
        "effect": _plain(smooth_steps(effect)),
        "factor": [float(f"{x:.6g}") for x in together / np.maximum(apart, 1e-300)],
        "peak": peak,
    }


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


def smooth_steps(effect: np.ndarray) -> np.ndarray:
    """Average ``[L, S, B, K]`` over neighbouring steps; NaN counts for nothing and stays."""
    at = np.arange(effect.shape[1])
    kernel = np.exp(-(((at[:, None] - at) / _STEP_WIDTH) ** 2) / 2)
    known = np.isfinite(effect)
    total = np.einsum("st,ltbk->lsbk", kernel, np.where(known, effect, 0))
    weight = np.einsum("st,ltbk->lsbk", kernel, known.astype(float))
    return np.where(known, total / np.maximum(weight, 1e-300), np.nan)


def _known_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is known."""
    counts = np.isfinite(values).sum(0)
    return np.where(counts, np.nansum(values, 0) / np.maximum(counts, 1), np.nan)


def _effects(
    final: Tensor, watcher: _Errors, table: ScoreTable, probes: int, generator: torch.Generator
) -> np.ndarray:
    """``v^T J e`` of every probe, cell and spec; NaN where no call was seen."""
    found = np.full((probes, *table.shape, len(watcher.specs)), np.nan)
    for p in range(probes):
        signs = torch.randint(0, 2, final.shape, generator=generator) * 2 - 1
        grads = torch.autograd.grad(
            final,
            watcher.outs,
            signs.to(final),
            retain_graph=p + 1 < probes,
            allow_unused=True,  # the last layers of a model may not reach the latents
        )
        for (layer, step, branch), grad, errors in zip(
            watcher.cells, grads, watcher.errors, strict=True
        ):
            if layer not in table.layers or branch not in table.branches:
                continue
            at = p, table.layers.index(layer), step, table.branches.index(branch)
            products = [0.0 if grad is None else float((grad * e).sum()) for e in errors]
            found[at] = np.nan_to_num(found[at]) + products  # calls of one cell add up
    return found


def _plain(array: np.ndarray) -> Any:
    if array.ndim:
        return [_plain(part) for part in array]
    return None if np.isnan(array) else float(f"{array:.4g}")
