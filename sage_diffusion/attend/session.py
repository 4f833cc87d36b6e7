"""``AttentionSession``: a plan, where sampling stands, and what every layer did.

The only mutable object of the core; a host makes one per patched model (or pipeline) and tells it
where sampling stands.  Calibration, accuracy reports and tests watch it as observers, so no second
attention path exists for measuring.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend import backends, execution
from sage_diffusion.attend.calls import (
    AttentionCall,
    AttentionEvent,
    Call,
    Native,
    Observer,
    part_of,
)
from sage_diffusion.attend.finite import capturing
from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.health import Verdicts
from sage_diffusion.attend.layer import AttentionRefused, Layer
from sage_diffusion.attend.runs import RunLog, nothing_quantized
from sage_diffusion.attend.signs import SignSeed
from sage_diffusion.attend.summary import LayerSummary, SessionSummary
from sage_diffusion.attend.validation import check_call, check_rotations, not_forward
from sage_diffusion.attend.where import Where
from sage_diffusion.kernels.rope import Rope
from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.plan import PrecisionPlan
from sage_diffusion.plan.names import LayerName
from sage_diffusion.plan.noise import NoiseScale
from sage_diffusion.plan.signs import step_seed

log = logging.getLogger("sage_diffusion")

CAME_IN = "NaN or infinity came in: the model's own attention ran"


def _component(layer: str) -> str:
    return layer.component if isinstance(layer, LayerName) else ""


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
        if backend not in backends.names():
            names = ", ".join(backends.names())
            raise ValueError(f"backend must be one of {names}, got {backend!r}")
        self._plan = PrecisionPlan.of(plan)
        self.backend = backend
        self.strict = strict
        self.observers: list[Observer] = list(observers)
        self.layers: dict[str, Layer] = {}
        self.where = Where()
        self.before_call: Callable[[], None] | None = None
        self.verdicts = Verdicts(guard or Guard())
        self.watch, self.guard = self.verdicts.outputs, self.verdicts.guard
        self.compilations = execution.Failures()
        self.run: RunLog | None = None
        #: Components that were called in a run.  Others that are called apart from any (a decoder
        #: that is a diffusion model itself) do not denoise: they run as they are.
        self.sampled: set[str] = set()
        self.warnings: Counter[str] = Counter()
        self.logged: set[str] = set()
        self._specs: dict[tuple[str, int, str | None], AttentionSpec] = {}
        self._signs = SignSeed()
        self._placed = False  # inside of a block that says where its calls happen
        self.noise = NoiseScale()
        self._place: Callable[[float], float] | None = None

    def __repr__(self) -> str:
        plan = self._plan
        rules = f", {len(plan.rules)} rules" if plan.rules else ""
        named = f"{plan.name!r}, " if plan.name else ""
        at = self.where
        where = f"step {at.step} of {at.steps}" if at.step >= 0 else "not sampling"
        layers = f"{len(self.layers)} layers"
        return f"<AttentionSession {named}{plan.default}{rules}: {layers}, {where}>"

    # ------------------------------------------------------------------ plan and layers
    @property
    def plan(self) -> PrecisionPlan:
        """What decides; assign to change it between two calls."""
        return self._plan

    @plan.setter
    def plan(self, plan: PrecisionPlan | AttentionSpec | str) -> None:
        self._plan = PrecisionPlan.of(plan)
        self._moved()
        self._find_place()
        self.guard.reset()

    def layer(self, name: str, native: Native | None = None) -> Layer:
        """The layer of that name, made on first use."""
        found = self.layers.get(name)
        if found is None:
            return Layer(self, name, native)
        if native is not None:
            found.native = native
        return found

    def adopt(self, layer: Layer) -> int:
        """List a layer; its number in the order of the table."""
        self.layers[layer.name] = layer
        return len(self.layers) - 1

    # ------------------------------------------------------------------ where sampling stands
    def start(
        self, steps: int, schedule: Sequence[float] = (), noise: NoiseScale | None = None
    ) -> None:
        """A new sampling run begins; counters go on.

        Args:
            steps: of the run.
            schedule: sigma of every step, where the host knows them beforehand.
            noise: what the schedule's numbers mean, where the host knows it.

        Raises:
            ValueError: no steps, or a schedule of another length.
        """
        started = self.where.started(steps, schedule)
        if self.run is not None:  # nobody ended it
            self.warn(self.run.stuck())
        self.verdicts.begin_run()
        self.where = started
        self.noise = noise or NoiseScale.guess(schedule)
        self._find_place()
        self.run = RunLog(steps, self.layers)
        self.begin_step(0)

    def begin_step(self, step: int, sigma: float | None = None) -> None:
        """Sampling is at ``step``; ``sigma`` lets a plan with a schedule of its own be looked up.

        Raises:
            NonFiniteOutput: an earlier step had non-finite numbers and the session is strict.
        """
        progress = None if sigma is None or self._place is None else self._place(sigma)
        self.where = self.where.at_step(step, sigma, progress)
        if self.run is not None:
            self.run.visit(step, sigma, self.where.progress)
        self._read_verdicts()
        self._moved()

    def _moved(self) -> None:
        """The place in sampling, or the plan, is another one."""
        self._specs.clear()
        self._signs.tell(step_seed(self._plan.sign_seed or 0, self.where.step))

    def _find_place(self) -> None:
        """Where the host's numbers stand in the plan's schedule, if it has one."""
        schedule, unit = self._plan.schedule, self._plan.schedule_unit
        self._place = None if schedule is None else self.noise.places(schedule, unit)
        if schedule is not None and self._place is None:
            self.warn(
                f"the plan's schedule, {schedule[0]:g} to {schedule[-1]:g} in "
                f"{unit or 'a unit that it does not name'}, can't be compared with this sampler's "
                f"{self.noise.unit or 'sigmas'}: its steps are counted instead; remap the plan to "
                "this sampler, or take the schedule out of it"
            )

    def settle(self) -> None:
        """Call ``before_call`` now, if it waits: a host's word on the calls that come next.

        It is called once, at the next call; what a host may still change until then (guidance)
        needs no other place to be read.
        """
        if self.before_call is not None:
            tell, self.before_call = self.before_call, None
            tell()

    def set_branch(self, branch: str | None, chunks: Sequence[str] = (), pictures: int = 0) -> None:
        """The calls that follow belong to "cond", "uncond", or both (None).

        Args:
            branch: of whole calls.
            chunks: where both share a batch, the branches of its equal parts in their order; each
                part then runs and is observed as its own branch.
            pictures: in each part, 0 if unknown.  A batch that does not hold them all in every part
                is of no branch (a call for one part only).
        """
        self.where = replace(self.where, branch=branch, chunks=tuple(chunks), pictures=pictures)
        if self.run is not None:
            self.run.branches.update((branch,) if branch else self.where.chunks)

    @contextlib.contextmanager
    def at(self, progress: float, *, step: int = -1, branch: str | None = None) -> Iterator[None]:
        """Calls inside the block happen at this progress."""
        before = self.where
        self.where = replace(before, progress=progress, step=step, branch=branch)
        placed, self._placed = self._placed, True
        self._moved()
        try:
            yield
        finally:
            self.where = before
            self._placed = placed
            self._moved()

    def finish(self, judge: bool = True) -> RunLog | None:
        """Sampling ended: look at the last step's outputs, waiting for the device.

        Args:
            judge: warn where the run quantized nothing although the plan does; False where other
                sessions share the run.

        Returns:
            What the run did, None if none had been started.

        Raises:
            NonFiniteOutput: the last step had non-finite numbers and the session is strict.
            AttentionRefused: nothing was quantized and the session is strict.
        """
        self.verdicts.wait()
        run = self.run
        try:
            self._read_verdicts()
            if run is not None:
                run.close()
                self.warn(run.stuck())
                self.sampled.update(_component(name) for name in run.called)
                nothing = nothing_quantized(self._plan, [run]) if judge else None
                if nothing is not None and self.strict:
                    raise AttentionRefused(str(nothing))
                self.warn(None if nothing is None else str(nothing))
        finally:
            self._stand_still()
        return run

    def break_off(self) -> None:
        """Sampling was broken off: its verdicts count no more, and nothing of it is kept."""
        self.verdicts.begin_run()
        self._stand_still()

    def _stand_still(self) -> None:
        self.where = self.where.finished()
        self.run = self.before_call = None
        self._moved()

    def warn(self, message: str | None) -> None:
        """Put a warning into the summary, and log it the first time; None is none."""
        if message is None:
            return
        if not self.warnings[message]:
            log.warning("%s", message)
        self.warnings[message] += 1

    def _read_verdicts(self) -> None:
        if self.verdicts.read(self.where.step, self.strict):
            self._specs.clear()

    # ------------------------------------------------------------------ the call
    def spec_for(self, layer: str, tokens: int, branch: str | None = None) -> AttentionSpec:
        """What the plan says now of a layer whose call has this many keys; ``branch`` if no call
        is of one branch as a whole."""
        key = (layer, tokens, branch or self.where.branch)
        spec = self._specs.get(key)
        if spec is None:
            spec = self._plan.resolve(layer, self.where.progress, branch=key[2], tokens=tokens)
            outside = self.where.step < 0
            if outside and not (self._placed or self.sampled) and self._plan.timed:
                self.warn(
                    "the plan has rules with start or end, and nobody says where sampling stands: "
                    "all calls count as its beginning. Patch the pipeline (enable), or tell the "
                    "session (start and begin_step, or at)"
                )
            apart = outside and self.sampled and _component(layer) not in self.sampled
            native = apart or self.verdicts.runs_natively(layer)
            spec = FP16 if native else self.guard.spec(layer, spec)
            self._specs[key] = spec
        return spec

    def quantizes(self, layer: str, tokens: int, *, whole: bool = False) -> bool:
        """Does the plan quantize a call with this many keys, or a part of its batch?

        With ``whole`` every part must be.
        """
        if self.before_call is not None:
            self.settle()
        parts = [self.spec_for(layer, tokens, b).quantized for b in self.where.parts or (None,)]
        return all(parts) if whole else any(parts)

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
        one spec at all steps is captured with it (not watched and not guarded) once a call warmed
        up; any other call is declined, so that replays repeat the host's own attention and not one
        step's precision.  Replays rotate with the signs of the step that :meth:`begin_step` told.

        Raises:
            ValueError, TypeError: the tables of a rotation do not fit.
            AttentionRefused: strict, and the plan's spec can't be served.
            KernelCompilationError: the session's backend is named and its kernel doesn't compile.
        """
        layer.enlist()
        if self.before_call is not None:
            self.settle()
        layer.tokens = max(layer.tokens, call.k.shape[2])
        check_rotations(call)
        if capturing(call.q) and (reason := self._signs.captured(self._plan, layer.name, call)):
            layer.decline(reason)
            out = native(*call.plain())
            self._show(layer, self.where.branch, FP16, call, out)
            return out
        if self._plan.sign_seed is not None:
            call = call._replace(sign_seed=self._signs.on(call.q.device))
        parts = self.where.parts
        if parts and not call.q.shape[0] % (len(parts) * max(self.where.pictures, 1)):
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
            layer.served_in_parts([ran for _, ran in served])
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
            at, seed = self.where, call.sign_seed
            event = AttentionEvent(
                layer.name, at.step, at.progress, branch, spec, *call.plain(), out, seed
            )
            with torch.no_grad():
                for observer in self.observers:
                    observer.observe(event)

    def _quantized(self, layer: Layer, spec: AttentionSpec, call: Call) -> Tensor | None:
        """The output, or None after the call was declined with a reason."""
        reason = not_forward(call)
        if reason is not None:
            layer.decline(reason)
            return None
        try:
            check_call(call)
            asked = AttentionCall.of(call, spec)
        except (ValueError, TypeError) as error:
            layer.decline(str(error))
            return None
        step = self.where.step
        came_in = self.verdicts.not_finite(layer.name, layer.index, step, *call[:3])
        if came_in and not self.strict:
            layer.declined[CAME_IN] += 1  # the next step's verdict tells of it
            return None
        try:
            chosen, out, _ = execution.run(call, asked, self.backend, self.compilations)
        except backends.BackendUnavailable as error:
            layer.decline(error.brief)
            return None
        finite = self.watch.look(layer.name, step, out)
        if self.verdicts.full():
            self._read_verdicts()
        if not self.strict:
            if finite is False:
                layer.decline("the quantized output was not finite, run again natively")
                return None
            if finite is None and not chosen.finite:
                # Waiting for the answer would cost more than another pass over the output.
                out = torch.nan_to_num(out, nan=0.0, posinf=0.0, neginf=0.0)
        layer.ran[str(spec), chosen.name] += 1
        if self.guard.due(layer.name, layer.index, step):
            self.guard.check(layer.name, step, call.rotated(), out)
        return out

    # ------------------------------------------------------------------ what happened
    def summary(self) -> SessionSummary:
        """Which layer ran what, and what fell back and why."""
        if self.run is not None:
            self.warn(self.run.stuck())
        return SessionSummary(
            tuple(
                LayerSummary.of(layer, self.verdicts, self.guard) for layer in self.layers.values()
            ),
            dict(self.compilations.counts),
            tuple(self.warnings),
        )

    def reset_counts(self) -> None:
        """Forget what was counted and reported so far."""
        for layer in self.layers.values():
            layer.forget()
        self.verdicts.reset()
        self.warnings.clear()
        if self.run is not None:
            self.run = RunLog(self.run.steps, self.layers)
        self.compilations.counts.clear()
        self.logged.clear()

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
