"""Where one device stands in a ComfyUI sampling run: step, branch, layer.  Imports no ComfyUI."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.layers import HiddenCall, LayerCursor, ModulePatch
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


def branch_of(cond_or_uncond: Sequence[int] | None) -> str | None:
    """ "cond" or "uncond" where a model call holds chunks of one kind only, else None."""
    kinds = set(chunks_of(cond_or_uncond))
    return kinds.pop() if len(kinds) == 1 else None


def chunks_of(cond_or_uncond: Sequence[int] | None) -> tuple[str, ...]:
    """The branches of a batch's equal parts, none where ComfyUI names other kinds."""
    kinds = tuple(cond_or_uncond or ())
    return tuple(BRANCHES[kind] for kind in kinds) if set(kinds) <= {0, 1} else ()


class DeviceState:
    """One device's session and its place in the model; multi-GPU runs one thread per device."""

    def __init__(self, session: AttentionSession):
        self.session = session
        self.cursor = LayerCursor()
        self.forwards = 0
        self.in_previous = False
        self._patch: ModulePatch | None = None
        self._patched: nn.Module | None = None
        self._sigmas: Tensor | None = None
        self._schedule: Tensor | None = None
        self._values: list[float] = []

    def begin_run(self, session: AttentionSession) -> None:
        """Count from zero in a fresh session."""
        self.session = session
        self.forwards = 0
        self._sigmas = self._schedule = None
        self._values = []
        if self._patch is not None and not self._patch.fits(self._patched):
            self._patch = None

    def begin_forward(self, options: Mapping[str, Any]) -> None:
        """Read where sampling stands; waits for the device once per step."""
        self.forwards += 1
        self.cursor.reset()
        schedule, sigmas = options.get("sample_sigmas"), options.get("sigmas")
        if schedule is not None and schedule is not self._schedule:
            values = [float(x) for x in schedule.tolist()]
            if values != self._values and len(values) > 1:
                self._values = values
                self.session.start(len(values) - 1, values[:-1])
            self._schedule = schedule
        # Both chunks of a guided step share the tensor, so a step is one wait.
        if self._values and sigmas is not None and sigmas is not self._sigmas:
            sigma = float(sigmas.reshape(-1)[0])
            self.session.begin_step(step_of(sigma, self._values), sigma)
            self._sigmas = sigmas
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

    def patched(
        self, model: nn.Module, call: HiddenCall
    ) -> contextlib.AbstractContextManager[None]:
        """Modules of ``model`` are patched inside the block."""
        if self._patch is None or self._patched is not model:
            self._patch, self._patched = ModulePatch(model, self.cursor, call), model
        return self._patch.applied()

    @property
    def closed(self) -> tuple[str, ...]:
        """Modules that no override reaches."""
        return () if self._patch is None else self._patch.reach.closed
