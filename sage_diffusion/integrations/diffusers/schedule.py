"""Where sampling stands, read off the calls that a pipeline makes to its scheduler.

The scheduler is the one source that every pipeline has, that needs no device synchronisation and
that lies outside of compiled code.  Its schedule is copied to the CPU once per ``set_timesteps``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.plan import BRANCHES

#: In the source of a pipeline that guides with one batch, the negative prompt first.
_DOUBLED = (r"\[\s*latents\s*\]\s*\*\s*2", r"\[\s*negative_prompt_embeds,\s*prompt_embeds\b")


class HostMethod:
    """An instance attribute that stands before one method of a host object.

    Args:
        host: a scheduler, a pipeline or a model.
        name: of the method.
        handler: called as ``handler(original, *args, **kwargs)``.
        anchor: the object with which the handler is copied.  A pipeline deep-copies its scheduler
            in mid-call (for audio, say): such a copy must drive nothing, and must not drag the
            model along.
    """

    def __init__(self, host: Any, name: str, handler: Callable[..., Any] | None, anchor: Any):
        self.host = host
        self.name = name
        self.handler = handler
        self.anchor = anchor
        self.before = vars(host).get(name)
        if isinstance(self.before, HostMethod):
            self.before = self.before.before  # takes another patch's place

    @property
    def original(self) -> Callable[..., Any]:
        """The host's own method."""
        if self.before is not None:
            return self.before
        return getattr(type(self.host), self.name).__get__(self.host)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # Pipelines look for optional arguments in the method's signature.
        return self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.handler is None:
            return self.original(*args, **kwargs)
        return self.handler(self.original, *args, **kwargs)

    def install(self) -> HostMethod:
        """Stand before the method."""
        vars(self.host)[self.name] = self
        return self

    def remove(self) -> None:
        """Step aside; a later wrapper of somebody else's keeps working."""
        self.handler = None
        if vars(self.host).get(self.name) is self:
            if self.before is None:
                del vars(self.host)[self.name]
            else:
                vars(self.host)[self.name] = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> HostMethod:
        new = HostMethod.__new__(HostMethod)
        memo[id(self)] = new
        together = self.handler is not None and id(self.anchor) in memo
        new.host = copy.deepcopy(self.host, memo)
        new.name = self.name
        new.before = copy.deepcopy(self.before, memo)
        new.anchor = copy.deepcopy(self.anchor, memo) if together else None
        new.handler = copy.deepcopy(self.handler, memo) if together else None
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "handler": None, "anchor": None}


class ScheduleDriver:
    """Steers a session by a scheduler.

    Args:
        session: told of every step.
        scheduler: a diffusers scheduler.
        anchor: see :class:`HostMethod`.
        on_start: called whenever sampling begins, before the session is told.
    """

    def __init__(
        self,
        session: AttentionSession,
        scheduler: Any,
        anchor: Any,
        on_start: Callable[[], None],
    ):
        self.session = session
        self.scheduler = scheduler
        self.on_start = on_start
        self.index = 0
        self.values: tuple[float, ...] = ()
        self._reported: int | None = None  # the index that the session knows
        self._timesteps: Any = None  # the tensor that `values` was read for
        handlers = {
            "set_timesteps": self._set_timesteps,
            "set_begin_index": self._set_begin_index,
            "scale_model_input": self._scale_model_input,
            "step": self._step,
        }
        self.methods = [
            HostMethod(scheduler, name, handler, anchor).install()
            for name, handler in handlers.items()
            if callable(getattr(scheduler, name, None))
        ]

    def remove(self) -> None:
        """Give the scheduler its own methods back."""
        for method in self.methods:
            method.remove()

    @property
    def schedule(self) -> tuple[float, ...]:
        """Strictly descending sigmas (timesteps where the scheduler has no sigmas) of the steps."""
        values = self.values
        return tuple(v for i, v in enumerate(values) if i == 0 or v < min(values[:i]))

    def start(self) -> None:
        """Sampling begins with the scheduler's present schedule."""
        self.on_start()
        self._read()
        if self.values:
            self.session.start(len(self.values), self.values)
            begin = getattr(self.scheduler, "begin_index", None)
            self._go_to(begin if isinstance(begin, int) else 0)

    # ------------------------------------------------------------------ the scheduler's methods
    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.start()
        return result

    def _set_begin_index(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        begin = getattr(self.scheduler, "begin_index", None)
        if isinstance(begin, int):
            self._go_to(begin)
        return result

    def _scale_model_input(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Image-to-image starts in mid-schedule, and some schedulers keep no index: the timestep
        # that is about to be sampled says where.
        result = original(*args, **kwargs)
        at = self._step_index()
        if at is None:
            at = self._locate(_timestep(args, kwargs))
        if at is not None:
            self._go_to(at)
        return result

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self.session.where.step < 0:
            return result  # sampling was never announced, or is over
        after = self._step_index()
        if after is None:
            at = self._locate(_timestep(args, kwargs))
            after = (self.index if at is None else at) + 1
        if after >= len(self.values):
            self.session.finish()
        else:
            self._go_to(after)
        return result

    # ------------------------------------------------------------------ reading
    def _go_to(self, index: int) -> None:
        if self.scheduler.timesteps is not self._timesteps:
            self._read()
        if not 0 <= index < len(self.values):
            return
        self.index = index
        if self._reported != index:
            self._reported = index
            self.session.begin_step(index, self.values[index])

    def _read(self) -> None:
        timesteps = getattr(self.scheduler, "timesteps", None)
        self._timesteps = timesteps
        self.index = 0
        self._reported = None
        if timesteps is None or not len(timesteps):
            self.values = ()
            return
        sigmas = getattr(self.scheduler, "sigmas", None)
        known = sigmas is not None and len(sigmas) >= len(timesteps)
        values = torch.as_tensor(sigmas if known else timesteps).tolist()
        self.values = tuple(float(value) for value in values[: len(timesteps)])

    def _step_index(self) -> int | None:
        index = getattr(self.scheduler, "step_index", None)
        return index if isinstance(index, int) else None

    def _locate(self, timestep: Any) -> int | None:
        """Index of a timestep in the schedule, without reading it from a device."""
        timesteps = self.scheduler.timesteps
        if not isinstance(timesteps, Tensor):
            return None
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                return None
            # Pipelines iterate over the schedule: the element is a view of it.
            if timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
                return int(timestep.storage_offset() - timesteps.storage_offset())
            if timestep.device.type != "cpu":
                return None
            timestep = timestep.item()
        if timesteps.device.type != "cpu" or not isinstance(timestep, (int, float)):
            return None
        matches = (timesteps == timestep).nonzero().flatten().tolist()
        later = [i for i in matches if i >= self.index]
        return (later or matches or [None])[0]


def guidance_chunks(pipe: Any) -> tuple[str, ...]:
    """The branches of a batch's equal parts where a pipeline guides with one batch, else none.

    A pipeline may say so itself (``guidance_chunks``).  diffusers' own say it only in their source:
    those that double their latents put the negative prompt first.
    """
    said = getattr(pipe, "guidance_chunks", None)
    if said is not None:
        return tuple(said)
    if getattr(pipe, "do_classifier_free_guidance", False) is not True:
        return ()
    return BRANCHES[::-1] if _doubles_latents(type(pipe).__call__) else ()


@functools.lru_cache(maxsize=64)
def _doubles_latents(call: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(inspect.unwrap(call))
    except (OSError, TypeError):
        return False
    return all(re.search(pattern, source) for pattern in _DOUBLED)


class BranchHook:
    """Tells a session which branch of classifier-free guidance runs, where the host says so."""

    def __init__(self, session: AttentionSession):
        self.session = session

    @contextlib.contextmanager
    def cache_context(
        self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        """The model's ``cache_context``."""
        before = self.session.where.branch
        self.session.set_branch(name if name in BRANCHES else None, self.session.where.chunks)
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            self.session.set_branch(before, self.session.where.chunks)


def _timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The second argument of ``step`` and of ``scale_model_input``."""
    return kwargs.get("timestep", args[1] if len(args) > 1 else None)
