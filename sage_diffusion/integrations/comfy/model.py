"""ComfyUI: every attention call of a patched MODEL goes through an ``AttentionSession``.

    model = patch(model, "int8/fp8")       # a clone; the MODEL that came in is untouched

ComfyUI asks ``transformer_options["optimized_attention_override"]`` about most attention calls.
This module puts a plain closure there (a callable object would be deep-copied with the options),
keeps whatever override stood there before and hands it every call it declines, and learns where
sampling stands from two wrappers: ``OUTER_SAMPLE`` is a run, ``APPLY_MODEL`` a model call.

A MODEL owns its closures, they own the :class:`ModelAttention`, and that owns neither a module nor
a tensor: nothing leads back, so that a MODEL which is dropped is freed at once.  Another node may
have wrapped the closure of a MODEL that was patched again, or unpatched, later: the options name
the override that counts, and any other one passes its calls on.

The sigma is read from the device once per step, never per attention call.  Calls in float32 are
quantized from float32; the session's backends take it as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend.calls import Call, Observer
from sage_diffusion.attend.finite import capturing
from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.layer import AttentionRefused, Layer
from sage_diffusion.attend.runs import Nothing, nothing_quantized, quantizes
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.call import HostCall, UnknownCall, native_of, parse_call
from sage_diffusion.integrations.comfy.device import DeviceState, Halves, percents_of
from sage_diffusion.integrations.comfy.headline import (
    MISSING,
    OFF,
    Headline,
    broken_off,
    elsewhere,
    ready,
    sampling,
)
from sage_diffusion.integrations.comfy.overrides import beside
from sage_diffusion.integrations.comfy.report import RunReport, merged
from sage_diffusion.integrations.comfy.timing import PARTS, Stopwatch, Timing, clock_of, kind_of
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan

log = logging.getLogger("sage_diffusion")

#: Key of this pack's wrappers, callbacks and attachment on a ``ModelPatcher``.
KEY = "sage_diffusion"
KEY_OFF = "sage_diffusion.off"
OVERRIDE = "optimized_attention_override"
FULL_PRECISION = "the model asks for full precision in this call"

#: ``override(func, *args, **kwargs)`` as ComfyUI calls it.
Override = Callable[..., Any]
Reporter = Callable[[RunReport | Headline], None]


class ModelAttention:
    """What one patched MODEL (and its clones) shares: settings, devices, and the last run's report.

    Args:
        plan: a plan, a spec, a spec's name, a path of a plan, or a session: the caller's own,
            which keeps counting and observing from run to run, instead of a fresh one per run.
        backend: as in :func:`sage_diffusion.attention`; of a session its own counts, as for strict.
        strict: raise where a call that the plan quantizes can't be, or where the plan does not fit.
        guard: drift checks; a layer that strays from exact attention is stepped up.  Of a session
            its own counts.
        keep_cross: leave calls alone whose keys are other tokens than the queries.
        observers: see :class:`sage_diffusion.attend.calls.Observer`.
        reporters: called with a :class:`RunReport` when a sampling run has ended, and with a
            :class:`Headline` when one begins or is broken off, or another node samples with these
            settings.
        title: what the report calls the plan.
        compare_speed: on a GPU, make a few calls of each kind both ways in the first steps of the
            first run, to tell how much faster the plan is; see :mod:`.timing`.
    """

    def __init__(
        self,
        plan: PrecisionPlan | AttentionSpec | AttentionSession | str,
        *,
        backend: str = "auto",
        strict: bool = False,
        guard: Guard | None = None,
        keep_cross: bool = False,
        observers: Sequence[Observer] = (),
        reporters: Sequence[Reporter] = (),
        title: str | None = None,
        compare_speed: bool = False,
    ):
        self.session = plan if isinstance(plan, AttentionSession) else None
        self.plan = plan.plan if isinstance(plan, AttentionSession) else PrecisionPlan.of(plan)
        self.backend = backend
        self.strict = strict if self.session is None else self.session.strict
        self.guard = guard
        self.keep_cross = keep_cross
        self.compare_speed = compare_speed
        self.observers = list(observers)
        self.reporters = list(reporters)
        self.title = title or self.plan.name or str(self.plan.default)
        self.model_name = ""
        self.percents: tuple[float, ...] = (1.0, 0.0)
        self.first: Override | None = None  # what stood there when the MODEL was patched
        self.previous: Override | None = None  # what a call that we decline goes to
        self.last: RunReport | None = None
        self.status = ready(self.title)
        self.devices: dict[torch.device, DeviceState] = {}
        self.halves = Halves()
        self._lock = threading.Lock()
        self._warnings: list[str] = []
        self._nothing: Nothing | None = None
        self._timing: Timing | None = None
        self._checked = False
        self._run: Callable[..., Any] = ModelAttention._attend
        self._state(torch.device("cpu"))  # an unknown backend is an error here, not while sampling

    # ------------------------------------------------------------------ the call
    @property
    def override(self) -> Override:
        """A closure for ComfyUI's options.  It owns this object, which does not own it."""

        def override(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            options = kwargs.get("transformer_options") or {}
            # Not by the name of this function: that would be a cycle.
            if KEY not in options or attention_of(options[KEY]) is self:
                return self._run(self, func, args, kwargs)
            if self.first is not None:
                return self.first(func, *args, **kwargs)
            return func(*args, **kwargs)

        override.sage_attention = self  # type: ignore[attr-defined]
        # Cores that ask reserve memory for whole score matrices otherwise.
        override.memory_efficient = True  # type: ignore[attr-defined]
        return override

    def _state(self, device: torch.device) -> DeviceState:
        state = self.devices.get(device)
        if state is None:
            with self._lock:
                watch = Stopwatch(clock_of(device), self.compare_speed)
                state = self.devices.setdefault(device, DeviceState(self._session(), watch))
        return state

    def _session(self) -> AttentionSession:
        if self.session is not None:
            return self.session
        return AttentionSession(
            self.plan,
            backend=self.backend,
            strict=self.strict,
            observers=self.observers,
            guard=self.guard,
        )

    def _attend(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
    ) -> Any:
        first = args[0] if args else kwargs.get("q")
        state = self._state(first.device if isinstance(first, Tensor) else torch.device("cpu"))
        if state.in_previous:
            # An override below ours has put itself on top as well and handed the call back.
            return func(*args, **kwargs)

        own = func

        def host() -> Any:
            state.watch.fall_back()
            if self.previous is None or name is not None:
                return own(*args, **kwargs)
            state.in_previous = True
            try:
                return self.previous(func, *args, **kwargs)
            finally:
                state.in_previous = False

        options = kwargs.get("transformer_options") or {}
        session = state.session
        if not state.inside:
            state.cursor.reset()  # a node calls the network itself: nobody tells us where it begins
        try:
            call = parse_call(args, kwargs)
        except UnknownCall as error:
            session.layer(name or state.cursor.name(options)).decline(str(error))
            return host()
        cross = call.cross(state.context)
        tokens = call.q.shape[2], call.k.shape[2]
        layer = session.layer(name or state.cursor.name(options, cross, tokens))
        own = state.preferred.get(layer.name, func)
        quantized = session.quantizes(layer.name, call.k.shape[2])
        if quantized and call.full_precision:
            layer.keep(FULL_PRECISION)
            return host()
        if quantized and self.keep_cross and cross:
            quantized = False
        elif quantized or session.observers:
            ours = Call(call.q, call.k, call.v, call.mask, scale=call.scale)
            return call.to_host(self._timed(state, layer, call, ours, host))
        layer.tokens = max(layer.tokens, call.k.shape[2])
        layer.keep()
        return host() if capturing(call.q) else state.watch.native(kind_of(call), host)

    def _timed(
        self,
        state: DeviceState,
        layer: Layer,
        call: HostCall,
        ours: Call,
        host: Callable[[], Any],
    ) -> Tensor:
        """A call as the session decides, between two marks."""

        def run() -> Tensor:
            return layer.attend(ours, native_of(call, host))

        if capturing(call.q):
            return run()
        session, tokens = state.session, call.k.shape[2]
        specs = {session.spec_for(layer.name, tokens, b) for b in session.where.parts or (None,)}
        spec = str(specs.pop()) if len(specs) == 1 else PARTS
        # Another node's override may count its calls, or keep something of them.
        again = host if self.previous is None and not session.observers else None
        return state.watch.ours(kind_of(call), spec, run, again)

    def _hidden(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self._run(self, func, args, kwargs, name)

    # ------------------------------------------------------------------ a run, a model call
    def begin_run(self) -> None:
        """A sampling run begins: forget the last one."""
        self.previous = self.first
        self.last = None
        self._nothing = self._timing = None
        self._warnings.clear()
        self._checked = False
        self.tell(sampling(self.title))
        for state in self.devices.values():
            state.begin_run(self._session())
        if "torch._dynamo" in sys.modules:
            # A compiled model breaks its graph here: counting and choosing are Python.  Importing
            # the compiler only for this would cost seconds where nothing is compiled.
            self._run = _outside_the_compiler()

    def end_run(self) -> RunReport:
        """A sampling run ended: look at the last step, tell the reporters.

        Raises:
            NonFiniteOutput, AttentionRefused: strict, and what a report would warn of.
        """
        try:
            logs = [state.session.finish(judge=False) for state in self.devices.values()]
            runs = [run for run in logs if run is not None]
            self._nothing = nothing_quantized(self.plan, runs) if runs else None
            self._timing = self._read_times()
            self.last = self.report()
            self.status = self.last.headline
        except BaseException as error:
            self.tell(broken_off(error))
            raise
        finally:
            self._let_go()
        self._report(self.last)
        log.info("%s", self.last)
        if self._nothing is not None and self.strict:
            raise AttentionRefused(str(self._nothing))
        return self.last

    def _read_times(self) -> Timing | None:
        """Of the device that had most of the run's model calls."""
        if not self.devices:
            return None
        return max(self.devices.values(), key=lambda state: state.forwards).watch.read()

    def spoil_times(self) -> None:
        """The call that is made now does more than attention: its seconds do not count."""
        for state in self.devices.values():
            state.watch.spoil()

    def tell(self, headline: Headline) -> None:
        """Something other than the end of a run happened."""
        self.status = headline
        self._report(headline)

    def _report(self, news: RunReport | Headline) -> None:
        for reporter in self.reporters:
            reporter(news)

    def sampled_by(self, node: str) -> None:
        """Another node is to sample with these settings, in a session of its own."""
        self.last = None
        self.tell(elsewhere(node))

    def break_off(self, error: BaseException) -> None:
        """A sampling run was broken off: nothing of it is kept, nothing booked on the next."""
        self.tell(broken_off(error))
        for state in self.devices.values():
            state.session.break_off()
        self._let_go()

    def _let_go(self) -> None:
        self.previous = self.first
        self.halves.forget()
        for state in self.devices.values():
            state.let_go()

    def report(self) -> RunReport:
        """What happened since the run began."""
        unreached: dict[str, tuple[str, ...]] = {}
        for state in self.devices.values():
            for why, names in state.unreached.items():
                unreached[why] = tuple(sorted({*unreached.get(why, ()), *names}))
        alarms, notes = beside(self.previous, [len(s.preferred) for s in self.devices.values()])
        return RunReport(
            merged([state.session.summary() for state in self.devices.values()]),
            self.title,
            self.model_name,
            sum(state.forwards for state in self.devices.values()),
            (*self._warnings, *alarms),
            unreached,
            self._nothing,
            self._timing,
            notes,
        )

    @contextlib.contextmanager
    def forward(
        self,
        model: Any,
        device: torch.device,
        options: Mapping[str, Any],
        context: int | None = None,
    ) -> Iterator[None]:
        """One model call: modules are patched, the session knows the step, inside the block.

        Args:
            model: ComfyUI's.
            device: of the call.
            options: its ``transformer_options``.
            context: tokens of its prompt, None if unknown.
        """
        state = self._state(device)
        state.context = context
        told = self.halves.corrected(options)
        with state.forward(model, told, self.percents, self._hidden):
            yield
        if not self._checked:
            self._checked = True
            self._check_plan(list(state.session.layers))
        if self.strict and state.unreached and quantizes(self.plan):
            why, names = next(iter(state.unreached.items()))
            raise AttentionRefused(f"{min(names)} can't be reached: {why}")

    def _check_plan(self, layers: list[str]) -> None:
        """After the first model call every layer has been met: does the plan fit?"""
        if layers:
            from sage_diffusion.plan.edit import misfits

            self._warnings += misfits(self.plan, layers, self.model_name, self.strict)

    def install_on_top(self, options: dict[str, Any]) -> None:
        """Put our override into ``transformer_options``, above whatever came after us."""
        current = options.get(OVERRIDE)
        if attention_of(current) is not self:
            self.previous = current
            options[OVERRIDE] = self.override


def attention_of(override: Any) -> ModelAttention | None:
    """Whose override this is, None if not ours."""
    return getattr(override, "sage_attention", None)


@functools.cache
def _outside_the_compiler() -> Callable[..., Any]:
    return torch.compiler.disable(ModelAttention._attend)


def patch(
    model: Any, plan: PrecisionPlan | AttentionSpec | AttentionSession | str, **settings: Any
) -> Any:
    """A clone of a ComfyUI MODEL whose attention runs as the plan says.

    A MODEL that was patched before gets the new plan instead of the old one.

    Args:
        model: a ``ModelPatcher``.
        plan: a plan, a spec, a spec's name, a path of a plan, or a session.
        settings: of :class:`ModelAttention`.
    """
    return attach(without(model), ModelAttention(plan, **settings))


def attach(clone: Any, attention: ModelAttention) -> Any:
    """Install ``attention`` on a clone that is the caller's own; returns the clone."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    options = clone.model_options.setdefault("transformer_options", {})
    attention.first = attention.previous = options.get(OVERRIDE)
    config = getattr(clone.model, "model_config", clone.model)  # tells SD15 from SDXL
    attention.model_name = type(config).__name__
    attention.percents = percents_of(clone.get_model_object("model_sampling"))
    options[OVERRIDE] = options[KEY] = attention.override

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("transformer_options", args[5] if len(args) > 5 else None) or {}
        context = kwargs.get("c_crossattn", args[3] if len(args) > 3 else None)
        tokens = context.shape[1] if isinstance(context, Tensor) and context.ndim == 3 else None
        with attention.forward(executor.class_obj, args[0].device, given, tokens):
            return executor(*args, **kwargs)

    def calc_cond_batch(executor: Any, model: Any, conds: Any, *args: Any) -> Any:
        with attention.halves.asked(conds):
            return executor(model, conds, *args)

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        attention.begin_run()
        try:
            out = executor(*args, **kwargs)
        except BaseException as error:
            attention.break_off(error)
            raise
        attention.end_run()
        return out

    def prepare_state(patcher: Any, timestep: Any, model_options: dict[str, Any], *_: Any) -> None:
        attention.install_on_top(model_options.setdefault("transformer_options", {}))

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    clone.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, prepare_state)
    clone.set_attachments(KEY, attention)
    return clone


def attached(model: Any) -> ModelAttention | None:
    """What :func:`patch` put on a MODEL, None if nothing."""
    found = model.get_attachment(KEY)
    return found if isinstance(found, ModelAttention) else None


def marked_off(model: Any) -> Any:
    """A clone of a MODEL that says that its node was switched off, and is the same otherwise."""
    clone = model.clone()
    clone.set_attachments(KEY_OFF, True)
    return clone


def status(model: Any) -> Headline:
    """What Sage Attention has to say of a MODEL now."""
    attention = attached(model)
    if attention is not None:
        return attention.status
    return OFF if model.get_attachment(KEY_OFF) else MISSING


def without(model: Any) -> Any:
    """A clone of a MODEL without what :func:`patch` put on it; other nodes' patches stay."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    clone = model.clone()
    attention = attached(clone)
    if attention is None:
        return clone
    options = clone.model_options.get("transformer_options", {})
    if attention_of(options.get(OVERRIDE)) is attention:
        del options[OVERRIDE], options[KEY]
        if attention.first is not None:
            options[OVERRIDE] = attention.first
    else:
        options[KEY] = None  # another node has wrapped ours: it passes its calls on from now
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.OUTER_SAMPLE):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_callbacks_with_key(CallbacksMP.ON_PREPARE_STATE, KEY)
    clone.remove_attachments(KEY)
    return clone
