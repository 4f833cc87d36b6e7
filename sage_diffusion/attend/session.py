"""``AttentionSession``: a plan, where sampling stands, and what every layer did.

The only mutable object of the core; a host makes one per patched model (or pipeline) and tells it
where sampling stands.  Calibration, accuracy reports and tests watch it as observers, so no second
attention path exists for measuring.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend import backends, execution, ops
from sage_diffusion.attend.calls import (
    AttentionCall,
    AttentionEvent,
    Call,
    Native,
    Observer,
    part_of,
    torch_native,
)
from sage_diffusion.attend.finite import FiniteWatch, capturing
from sage_diffusion.attend.guard import Guard, GuardState
from sage_diffusion.attend.summary import LayerSummary, SessionSummary
from sage_diffusion.attend.validation import check_call, check_ropes
from sage_diffusion.attend.where import Where
from sage_diffusion.kernels.rope import Rope
from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.plan import BRANCHES, PrecisionPlan

log = logging.getLogger("sage_diffusion")


class AttentionRefused(RuntimeError):
    """A strict session met a call that its plan quantizes and nobody can run."""


class NonFiniteOutput(RuntimeError):
    """A strict session found NaN or infinity in a layer's output."""


class Layer:
    """One attention module of a patched model; calls go through it.

    Args:
        session: decides and runs.
        name: what plans and summaries call the layer.
        native: the host's own attention.
        listed: False enters the layer into the session's table on its first call only: for calls
            that a module may make or not.
    """

    def __init__(
        self,
        session: AttentionSession,
        name: str,
        native: Native | None = None,
        listed: bool = True,
    ):
        self.session = session
        self.name = name
        self.native: Native = native or torch_native
        self.ran: Counter[tuple[str, str]] = Counter()  # (spec, backend) -> calls
        self.declined: Counter[str] = Counter()  # reason -> calls
        self.index = session._adopt(self) if listed else -1
        self.handle = ops.register(self)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        rope_q: Rope | None = None,
        rope_k: Rope | None = None,
    ) -> Tensor:
        """Attention as the session decides; inside ``torch.compile`` one opaque operator.

        Captured in a CUDA graph by hand, see :meth:`AttentionSession.serve`.
        """
        call = Call(q, k, v, mask, is_causal, scale, rope_q, rope_k)
        if torch.compiler.is_compiling():
            return ops.by_layer(call, self.handle)
        return self.attend(call)

    def attend(self, call: Call, native: Native | None = None) -> Tensor:
        """The call as the session decides, see :meth:`AttentionSession.serve`."""
        return self.session.serve(self, call, native or self.native)

    def bypass(self, tokens: int, reason: str) -> None:
        """Count a call that never reaches :meth:`attend` because the host must run it itself.

        Declined where the plan quantizes a call with this many keys, else run as planned.
        """
        if self.session.quantizes(self.name, tokens):
            self.decline(reason)
        else:
            self.keep()

    def keep(self, reason: str | None = None) -> None:
        """Count a call that the host runs itself without being at fault, strict or not.

        Args:
            reason: why the model wants it so although the plan quantizes it; None where it is
                planned.
        """
        self.session._enlist(self)
        if reason is None:
            self.ran["fp16", "native"] += 1
        else:
            self.declined[reason] += 1

    def decline(self, reason: str) -> None:
        """Count a call that the host must run itself; raises in a strict session."""
        self.session._enlist(self)
        if self.session.strict:
            raise AttentionRefused(f"{self.name}: {reason}")
        if reason not in self.session._logged:
            self.session._logged.add(reason)
            log.warning("%s runs its own attention: %s", self.name, reason)
        self.declined[reason] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        session = copy.deepcopy(self.session, memo)
        if id(self) not in memo:  # copying the session copies the layers that it lists
            memo[id(self)] = Layer(session, self.name, self.native, self.index >= 0)
        return memo[id(self)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Layer, (self.session, self.name, self.native, self.index >= 0)


class AttentionSession:
    """Decides and runs every attention call of one patched model.

    Args:
        plan: a plan, a spec, a spec's name or a path of a plan.
        backend: as in :func:`sage_diffusion.attention`.
        strict: raise where a call that the plan quantizes can't be served, or where an output is
            not finite, instead of running the host's own attention and counting.
        observers: see :class:`Observer`.
        guard: drift checks and stepping up, see :class:`sage_diffusion.attend.guard.Guard`.
    """

    def __init__(
        self,
        plan: PrecisionPlan | AttentionSpec | str,
        *,
        backend: str = "auto",
        strict: bool = False,
        observers: Sequence[Observer] = (),
        guard: Guard | None = None,
    ):
        if backend not in backends.BACKEND_NAMES:
            names = ", ".join(backends.BACKEND_NAMES)
            raise ValueError(f"backend must be one of {names}, got {backend!r}")
        self._plan = PrecisionPlan.of(plan)
        self.backend = backend
        self.strict = strict
        self.observers: list[Observer] = list(observers)
        self.layers: dict[str, Layer] = {}
        self.where = Where()
        self.watch = FiniteWatch()
        self.guard = GuardState(guard or Guard())
        self.compilations = execution.Failures()
        self.non_finite: dict[str, list[int]] = {}
        self._logged: set[str] = set()
        self._specs: dict[tuple[str, int, str | None], AttentionSpec] = {}

    # ------------------------------------------------------------------ plan and layers
    @property
    def plan(self) -> PrecisionPlan:
        """What decides; assign to change it between two calls."""
        return self._plan

    @plan.setter
    def plan(self, plan: PrecisionPlan | AttentionSpec | str) -> None:
        self._plan = PrecisionPlan.of(plan)
        self._specs.clear()
        self.guard.reset()

    def layer(self, name: str, native: Native | None = None) -> Layer:
        """The layer of that name, made on first use."""
        found = self.layers.get(name)
        if found is None:
            return Layer(self, name, native)
        if native is not None:
            found.native = native
        return found

    def _adopt(self, layer: Layer) -> int:
        self.layers[layer.name] = layer
        return len(self.layers) - 1

    def _enlist(self, layer: Layer) -> None:
        if layer.index < 0:
            layer.index = self._adopt(layer)

    # ------------------------------------------------------------------ where sampling stands
    def start(self, steps: int, schedule: Sequence[float] = ()) -> None:
        """A new sampling run begins; counters go on.

        Args:
            steps: of the run.
            schedule: sigma of every step, where the host knows them beforehand.

        Raises:
            ValueError: no steps, or a schedule of another length.
        """
        self.where = self.where.started(steps, schedule)
        self.guard.begin_run()
        self.begin_step(0)

    def begin_step(self, step: int, sigma: float | None = None) -> None:
        """Sampling is at ``step``; ``sigma`` lets a plan with a schedule of its own be looked up.

        Raises:
            NonFiniteOutput: an earlier step had non-finite outputs and the session is strict.
        """
        self.where = self.where.at_step(step, sigma, self._plan)
        self._report_non_finite()
        self._specs.clear()

    def set_branch(self, branch: str | None, chunks: Sequence[str] = ()) -> None:
        """The calls that follow belong to "cond", "uncond", or both (None).

        Args:
            branch: of whole calls.
            chunks: where both share a batch, the branches of its equal parts in their order; each
                part then runs and is observed as its own branch.
        """
        self.where = replace(self.where, branch=branch, chunks=tuple(chunks))

    @contextlib.contextmanager
    def at(self, progress: float, *, step: int = -1, branch: str | None = None) -> Iterator[None]:
        """Calls inside the block happen at this progress."""
        before = self.where
        self.where = replace(before, progress=progress, step=step, branch=branch)
        self._specs.clear()
        try:
            yield
        finally:
            self.where = before
            self._specs.clear()

    def finish(self) -> None:
        """Sampling ended: look at the last step's outputs, waiting for the device."""
        self.watch.wait()
        self.guard.wait()
        self._report_non_finite()
        self.where = self.where.finished()
        self._specs.clear()

    def _report_non_finite(self) -> None:
        fresh = []
        for name, step in self.watch.poll():
            steps = self.non_finite.setdefault(name, [])
            if not steps:
                fresh.append(name)
                # Another rung may fail the same way: straight to the host's own attention.
                reason = f"non-finite output at step {step}"
                self.guard.raise_layer(name, self.where.step, reason, rungs=3)
            steps.append(step)
        for done in self.guard.poll(self.where.step):
            log.warning("%s", done)
        if fresh:
            message = f"non-finite attention output in {', '.join(fresh[:4])}"
            if self.strict:
                raise NonFiniteOutput(message)
            log.warning("%s", message)

    # ------------------------------------------------------------------ the call
    def spec_for(self, layer: str, tokens: int, branch: str | None = None) -> AttentionSpec:
        """What the plan says now of a layer whose call has this many keys; ``branch`` if no call
        is of one branch as a whole."""
        key = (layer, tokens, branch or self.where.branch)
        spec = self._specs.get(key)
        if spec is None:
            spec = self._plan.resolve(layer, self.where.progress, branch=key[2], tokens=tokens)
            spec = self.guard.spec(layer, spec)
            self._specs[key] = spec
        return spec

    def quantizes(self, layer: str, tokens: int, *, whole: bool = False) -> bool:
        """Does the plan quantize a call with this many keys, or a part of its batch?

        With ``whole`` every part must be.
        """
        parts = [self.spec_for(layer, tokens, b).quantized for b in self.where.parts or (None,)]
        return all(parts) if whole else any(parts)

    def _steady(self, layer: str, tokens: int) -> bool:
        """Does the plan give a layer one spec at all steps and in all branches?"""
        rules = self._plan.rules
        edges = {0.0, *(rule.start for rule in rules), *(rule.end for rule in rules)}
        specs = {
            self._plan.resolve(layer, at, branch=branch, tokens=tokens)
            for at in edges
            for branch in (None, *BRANCHES)
        }
        return len(specs) == 1

    def attend(
        self,
        layer: Layer | str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        native: Native | None = None,
        rope_q: Rope | None = None,
        rope_k: Rope | None = None,
    ) -> Tensor:
        """:meth:`serve` for who has no call at hand, the arguments as in :class:`.Call`."""
        found = self.layer(layer) if isinstance(layer, str) else layer
        return found.attend(Call(q, k, v, mask, is_causal, scale, rope_q, rope_k), native)

    def serve(self, layer: Layer, call: Call, native: Native) -> Tensor:
        """One call of a layer, ``[B, H, L, D]``; runs the host's own attention where it must.

        Args:
            layer: of this session.
            call: observers and the host's own attention get its q and k rotated.
            native: the host's own attention, the layer's or one for this call where the host's
                takes more than a layer can know.

        While a CUDA graph is captured, whose replays run no Python, a plan that gives the layer
        one spec at all steps is captured with it (not watched and not guarded); any other call is
        declined, so that replays repeat the host's own attention and not one step's precision.

        Raises:
            ValueError, TypeError: the tables of a rotation do not fit.
            AttentionRefused: strict, and the plan's spec can't be served.
            KernelCompilationError: the session's backend is named and its kernel doesn't compile.
        """
        if layer.index < 0:
            self._enlist(layer)
        check_ropes(call)
        if capturing(call.q) and not self._steady(layer.name, call.k.shape[2]):
            layer.decline("a CUDA graph is captured, which would repeat this step's precision")
            out = native(*call.plain())
            self._show(layer, self.where.branch, FP16, call, out)
            return out
        parts = self.where.parts
        if parts and not call.q.shape[0] % len(parts):
            return self._attend_parts(layer, call, native)
        spec = self.spec_for(layer.name, call.k.shape[2])
        out, ran = self._serve(layer, spec, call, native)
        self._show(layer, self.where.branch, ran, call, out)
        return out

    def _attend_parts(self, layer: Layer, call: Call, native: Native) -> Tensor:
        """A batch that holds both branches: together where they agree, else each in its spec."""
        branches = self.where.parts
        count = len(branches)
        specs = [self.spec_for(layer.name, call.k.shape[2], branch) for branch in branches]
        if len(set(specs)) == 1:
            out, ran = self._serve(layer, specs[0], call, native)
            if not self.observers:
                return out
            served = [(part_of(out, i, count), ran) for i in range(count)]
            if out.requires_grad:  # a gradient must reach what the observers see
                out = torch.cat([found for found, _ in served])
        else:
            # The host's own attention knows its batch as a whole only.
            whole = functools.cache(lambda: native(*call.plain()))

            def part_of_whole(i: int) -> Native:
                return lambda *_: part_of(whole(), i, count)

            served = [
                self._serve(layer, spec, call.part(i, count), part_of_whole(i))
                for i, spec in enumerate(specs)
            ]
            out = torch.cat([found for found, _ in served])
        for i, (branch, (found, ran)) in enumerate(zip(branches, served, strict=True)):
            self._show(layer, branch, ran, call.part(i, count), found)
        return out

    def _serve(
        self, layer: Layer, spec: AttentionSpec, call: Call, native: Native
    ) -> tuple[Tensor, AttentionSpec]:
        """The output, and what ran: fp16 also where the plan's spec was declined."""
        if spec.quantized:
            out = self._quantized(layer, spec, call)
            if out is not None:
                return out, spec
        else:
            layer.ran["fp16", "native"] += 1
        return native(*call.plain()), FP16

    def _show(
        self, layer: Layer, branch: str | None, spec: AttentionSpec, call: Call, out: Tensor
    ) -> None:
        if self.observers:
            event = AttentionEvent(
                layer.name, self.where.step, self.where.progress, branch, spec, *call.plain(), out
            )
            with torch.no_grad():
                for observer in self.observers:
                    observer.observe(event)

    def _quantized(self, layer: Layer, spec: AttentionSpec, call: Call) -> Tensor | None:
        """The output, or None after the call was declined with a reason."""
        if call.wants_grad:
            layer.decline("gradients are asked for, quantized attention is forward only")
            return None
        try:
            check_call(call)
            asked = AttentionCall.of(call, spec)
        except (ValueError, TypeError) as error:
            layer.decline(str(error))
            return None
        try:
            chosen, out, _ = execution.run(call, asked, self.backend, self.compilations)
        except backends.BackendUnavailable as error:
            layer.decline(str(error))
            return None
        finite = self.watch.look(layer.name, self.where.step, out)
        if not self.strict:
            if finite is False:
                layer.decline("the quantized output was not finite, run again natively")
                return None
            if finite is None and not chosen.finite:
                # Waiting for the answer would cost more than another pass over the output.
                out = torch.nan_to_num(out, nan=0.0, posinf=0.0, neginf=0.0)
        layer.ran[str(spec), chosen.name] += 1
        if self.guard.due(layer.name, layer.index, self.where.step):
            self.guard.check(layer.name, self.where.step, call.rotated(), out)
        return out

    # ------------------------------------------------------------------ what happened
    def summary(self) -> SessionSummary:
        """Which layer ran what, and what fell back and why."""
        return SessionSummary(
            tuple(
                LayerSummary(
                    layer.name,
                    dict(layer.ran),
                    dict(layer.declined),
                    tuple(self.non_finite.get(layer.name, ())),
                    tuple(self.guard.reasons.get(layer.name, ())),
                    self.guard.drift.get(layer.name),
                )
                for layer in self.layers.values()
            ),
            dict(self.compilations.counts),
        )

    def reset_counts(self) -> None:
        """Forget what was counted and reported so far."""
        for layer in self.layers.values():
            layer.ran.clear()
            layer.declined.clear()
        self.non_finite.clear()
        self.compilations.counts.clear()
        self.guard.reset()
        self._logged.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionSession:
        # A copied model gets a session of its own: same plan, no observers, fresh counters.
        new = AttentionSession(
            self._plan, backend=self.backend, strict=self.strict, guard=self.guard.guard
        )
        memo[id(self)] = new
        for name, layer in self.layers.items():
            memo[id(layer)] = Layer(new, name, layer.native)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_session, (self._plan, self.backend, self.strict, self.guard.guard)


def _restore_session(
    plan: PrecisionPlan, backend: str, strict: bool, guard: Guard
) -> AttentionSession:
    return AttentionSession(plan, backend=backend, strict=strict, guard=guard)
