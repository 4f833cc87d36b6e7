"""Where one device stands in a ComfyUI sampling run: step, branch, layer.  Imports no ComfyUI."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.layers import (
    HiddenCall,
    LayerCursor,
    ModulePatch,
    blocks_of,
)
from sage_diffusion.integrations.comfy.overrides import preferred_of
from sage_diffusion.integrations.comfy.timing import Stopwatch
from sage_diffusion.plan import BRANCHES, progress


def step_of(sigma: float, schedule: Sequence[float]) -> int:
    """The step that evaluates the model at ``sigma``; ``schedule`` has one value more than steps.

    A sampler of second order also evaluates between two steps: that belongs to the earlier one.
    """
    steps = max(len(schedule) - 1, 1)
    sign = -1.0 if schedule[0] < schedule[-1] else 1.0  # un-sampling runs upwards
    tolerance = 1e-4 * abs(sigma)  # the model may see a sigma that went through a half type
    step = 0
    for i in range(steps):
        if sign * schedule[i] >= sign * sigma - tolerance:
            step = i
    return step


def percents_of(model_sampling: Any) -> tuple[float, ...]:
    """Sigmas at 0 %, 1 %, .. of the model's own noise levels, strictly descending."""
    values: list[float] = []
    for i in range(1, 101):  # 0 % is an arbitrary huge number in ComfyUI
        sigma = float(model_sampling.percent_to_sigma(i / 100))
        if not values or sigma < values[-1]:
            values.append(sigma)
    return tuple(values) if len(values) > 1 else (1.0, 0.0)


def branch_of(cond_or_uncond: Sequence[int] | None) -> str | None:
    """ "cond" or "uncond" where a model call holds chunks of one kind only, else None."""
    kinds = set(chunks_of(cond_or_uncond))
    return kinds.pop() if len(kinds) == 1 else None


def chunks_of(cond_or_uncond: Sequence[int] | None) -> tuple[str, ...]:
    """The branches of a batch's equal parts, none where ComfyUI names other kinds."""
    kinds = tuple(cond_or_uncond or ())
    return tuple(BRANCHES[kind] for kind in kinds) if set(kinds) <= {0, 1} else ()


class Halves:
    """Which half of guidance a conditioning belongs to that a node asks for alone.

    ComfyUI numbers the conditionings of one request: a single one is number 0, "cond", whichever it
    is.  Self-attention guidance asks for the negative one that way.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The run is over."""
        self._negative: Any = None
        self._alone = False

    @contextlib.contextmanager
    def asked(self, conditionings: Sequence[Any]) -> Iterator[None]:
        """A request for these conditionings."""
        before = self._alone
        if len(conditionings) == 2:
            self._negative = conditionings[1]
        one = conditionings[0] if len(conditionings) == 1 else None
        self._alone = one is not None and one is self._negative
        try:
            yield
        finally:
            self._alone = before

    def corrected(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """A model call's ``transformer_options``, with the halves of its batch as they are."""
        if not self._alone:
            return options
        return {**options, "cond_or_uncond": [1 for _ in options.get("cond_or_uncond") or ()]}


class DeviceState:
    """One device's session and its place in the model; multi-GPU runs one thread per device.

    Attributes:
        session: decides and runs.
        cursor: knows the layer that is being called.
        forwards: model calls of the run.
        in_previous: a call has gone to the override below ours.
        inside: a model call is under way.
        unreached: why attention was not reached -> modules in which it happened.
        watch: times calls.
        context: tokens of the prompt that the model is called with, None if unknown.
        preferred: layer -> function that the checkpoint names for it.
    """

    def __init__(self, session: AttentionSession, watch: Stopwatch):
        self.session = session
        self.watch = watch
        self.cursor = LayerCursor()
        self.forwards = 0
        self.in_previous = False
        self.inside = False
        self.context: int | None = None
        self.unreached: dict[str, set[str]] = {}
        self.preferred: dict[str, Callable[..., Any]] = {}
        self._patch: ModulePatch | None = None
        self._sigmas: Callable[[], Tensor | None] = _nothing
        self._schedule: Callable[[], Tensor | None] = _nothing
        self._values: list[float] = []

    def begin_run(self, session: AttentionSession) -> None:
        """Count from zero in a fresh session."""
        self.session = session
        self.watch.begin_run()
        self.forwards = 0
        self.unreached.clear()
        self.let_go()

    def let_go(self) -> None:
        """The run is over, whichever way: hold nothing of it but what it counted."""
        self._patch = None
        self._sigmas = self._schedule = _nothing
        self._values = []
        self.cursor.reset()

    def begin_forward(self, options: Mapping[str, Any]) -> None:
        """Read where sampling stands; waits for the device once per step."""
        self.forwards += 1
        self.cursor.reset()
        schedule, sigmas = options.get("sample_sigmas"), options.get("sigmas")
        if schedule is not None and schedule is not self._schedule():
            values = [float(x) for x in schedule.tolist()]
            if values != self._values and len(values) > 1:
                self._values = values
                self.session.start(len(values) - 1, values[:-1])
            self._schedule = weakref.ref(schedule)
        # Both chunks of a guided step share the tensor, so a step is one wait.
        if self._values and sigmas is not None and sigmas is not self._sigmas():
            sigma = float(sigmas.reshape(-1)[0])
            self.session.begin_step(step_of(sigma, self._values), sigma)
            self._sigmas = weakref.ref(sigmas)
        kinds = options.get("cond_or_uncond")
        self.session.set_branch(branch_of(kinds), chunks_of(kinds))

    def outside_sampler(
        self, options: Mapping[str, Any], percents: Sequence[float]
    ) -> contextlib.AbstractContextManager[None]:
        """A model call without a schedule happens where the model's own noise levels put it.

        Args:
            options: the call's ``transformer_options``.
            percents: the model's sigmas, descending.
        """
        sigmas = options.get("sigmas")
        if self._values or sigmas is None:
            return contextlib.nullcontext()
        at = progress(float(sigmas.reshape(-1)[0]), percents)
        return self.session.at(at, branch=branch_of(options.get("cond_or_uncond")))

    @contextlib.contextmanager
    def forward(
        self, model: Any, options: Mapping[str, Any], percents: Sequence[float], call: HiddenCall
    ) -> Iterator[None]:
        """One model call: the session knows where it stands, modules are patched.

        Args:
            model: ComfyUI's, with its network as ``diffusion_model``.
            options: the call's ``transformer_options``.
            percents: the model's sigmas, descending.
            call: serves attention that no override is asked about.
        """
        self.begin_forward(options)
        network = getattr(model, "diffusion_model", None)
        patched: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(network, nn.Module):
            if self._patch is None or not self._patch.fits(network):
                self._patch = ModulePatch(network, self.cursor, self.unreached)
                self.preferred = preferred_of(blocks_of(network))
            patched = self._patch.applied(call)
        self.inside = True
        try:
            with (
                patched,
                self.outside_sampler(options, percents),
                self.watch.forward(self.session.where.step),
            ):
                yield
        finally:
            self.inside = False


def _nothing() -> None:
    """Stands for a weak reference to what is gone."""
