"""What attention errors of single pictures do to their final latents, by backward passes.

``v^T J e`` of every call, see :mod:`.gradient`: v a probe, J the Jacobian from the call's output to
the final latents, e the error of a spec in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_diffusion.adapt.sampling import ModelCall, NoGradient, Tracer
from sage_diffusion.adapt.table import BOTH, ScoreTable
from sage_diffusion.attend.calls import AttentionEvent
from sage_diffusion.attend.rows import RowCall
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.kernels.spec import AttentionSpec

#: Scores of attention that are held at once where errors are made, 256 MiB in float32.
_MAX_SCORES = 1 << 26


class _Calls:
    """Observer that keeps every call, its output a node of the graph."""

    def __init__(self) -> None:
        self.cells: list[tuple[str, int, str]] = []
        self.events: list[AttentionEvent] = []

    @property
    def outs(self) -> list[Tensor]:
        """The calls' outputs."""
        return [event.out for event in self.events]

    def observe(self, event: AttentionEvent) -> None:
        """See :class:`sage_diffusion.attend.calls.Observer`."""
        if event.step < 0:
            return
        if not event.out.requires_grad:
            raise NoGradient(
                f"the attention output of {event.layer} must carry a gradient, it has none: the "
                "host samples without autograd, or the model is compiled"
            )
        seed = event.sign_seed
        if seed is not None:
            event = replace(event, sign_seed=seed.clone())  # the next step writes into it
        self.cells.append((event.layer, event.step, event.branch or BOTH))
        self.events.append(event)


def signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Of a probe: -1 or 1 at random."""
    return torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1


class Rating:
    """``v^T J e`` of some pictures, by probe and cell and spec.

    Args:
        session: that the host samples with.
        table: whose cells are rated.
        specs: whose errors.
        probes: backward passes per picture.
        generator: of the probes.

    Attributes:
        found: ``[pictures, P, L, S, B, K]``, NaN where no call was seen.
        final: latents ``[B, ...]``.
    """

    final: Tensor
    found: np.ndarray

    def __init__(
        self,
        session: AttentionSession,
        table: ScoreTable,
        specs: Sequence[AttentionSpec],
        probes: int,
        generator: torch.Generator,
    ):
        self.session, self.table, self.specs = session, table, specs
        self.probes, self.generator = probes, generator

    def trace(self, sampler: Tracer, pictures: Sequence[tuple[Any, int]]) -> None:
        """By the graph of the whole run.

        Pictures of one batch don't meet in the network, so that one backward pass serves them all.
        """
        with self._watched() as calls:
            final = sampler.trace(pictures)
        grads = [
            torch.autograd.grad(
                final,
                calls.outs,
                probe.to(final),
                retain_graph=p + 1 < self.probes,
                allow_unused=True,  # the last layers of a model may not reach the latents
            )
            for p, probe in enumerate(self._probes(final, len(pictures)))
        ]
        self._add(calls, grads)

    def replay(self, final: Tensor, model_calls: Sequence[ModelCall]) -> None:
        """By the graphs of one model call after the other, the last one first."""
        #: Of each probe: tensors of the run's graph, and what the probe makes of them.
        pulls = [[(final, probe.to(final))] for probe in self._probes(final, 1)]
        for call in reversed(model_calls):
            x = call.input.detach().requires_grad_()
            with self._watched() as calls:
                out = call.again(x)
            grads = []
            for p, pull in enumerate(pulls):
                toward, *found = torch.autograd.grad(
                    out,
                    [x, *calls.outs],
                    _pulled(pull, call.output),
                    retain_graph=p + 1 < self.probes,
                    allow_unused=True,
                )
                grads.append(found)
                if toward is not None and call.input.requires_grad:
                    pull.append((call.input, toward))
            self._add(calls, grads)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[_Calls]:
        calls = _Calls()
        self.session.observers.append(calls)
        try:
            yield calls
        finally:
            self.session.observers.remove(calls)

    def _probes(self, final: Tensor, pictures: int) -> list[Tensor]:
        """Random signs for final latents, by probe; every picture draws its own."""
        self.final = final.detach()
        self.found = np.full((pictures, self.probes, *self.table.shape, len(self.specs)), np.nan)
        shape = (len(final) // pictures, *final.shape[1:])
        drawn = [
            [signs(shape, self.generator) for _ in range(self.probes)] for _ in range(pictures)
        ]
        return [torch.cat([picture[p] for picture in drawn]) for p in range(self.probes)]

    @torch.no_grad()
    def _add(self, calls: _Calls, grads: Sequence[Sequence[Tensor | None]]) -> None:
        """What these calls do; calls of one cell add up."""
        for i, (cell, event) in enumerate(zip(calls.cells, calls.events, strict=True)):
            layer, step, branch = cell
            if layer not in self.table.layers or branch not in self.table.branches:
                continue
            at = self.table.layers.index(layer), step, self.table.branches.index(branch)
            here = self.found[(slice(None), slice(None), *at)]
            here[...] = np.nan_to_num(here) + self._products(event, [each[i] for each in grads])

    def _products(self, event: AttentionEvent, grads: Sequence[Tensor | None]) -> np.ndarray:
        """``[pictures, P, K]`` of one call."""
        products = np.zeros((*self.found.shape[:2], len(self.specs)))
        batch, heads, length, _ = event.out.shape
        size = max(1, _MAX_SCORES // (batch * heads * event.k.shape[2]))
        for index in torch.arange(length, device=event.out.device).split(size):
            call = RowCall.seen(event, index)  # specs share the codes that they have in common
            out = event.out.detach()[:, :, index]
            found = [call.run(spec).to(out.dtype) - out for spec in self.specs]
            errors = torch.stack(found)  # [K, B, H, rows, D]
            for p, grad in enumerate(grads):
                if grad is not None:
                    # Where both branches are one batch, each has all pictures.
                    each = (errors * grad[:, :, index]).unflatten(1, (-1, len(products)))
                    products[:, p] += each.flatten(3).sum((1, 3)).T.double().cpu().numpy()
        return products


def _pulled(pull: Sequence[tuple[Tensor, Tensor]], output: Tensor) -> Tensor:
    """A probe at the output of a model call, through what of the run follows it."""
    given = [(tensor, grad) for tensor, grad in pull if tensor.requires_grad]
    (found,) = torch.autograd.grad(
        [tensor for tensor, _ in given],
        [output],
        [grad for _, grad in given],
        retain_graph=True,
        allow_unused=True,
    )
    return torch.zeros_like(output) if found is None else found
