"""Where sampling stands, read off the calls that a pipeline makes to its scheduler.

The scheduler is the one source that every pipeline has, that needs no device synchronisation and
that lies outside of compiled code.  Its schedule is copied to the CPU once per ``set_timesteps``.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers.followed import follow, listener_of, unfollow
from sage_diffusion.integrations.diffusers.guidance import Guidance
from sage_diffusion.integrations.diffusers.weak import WeakLink
from sage_diffusion.plan.noise import NoiseScale


class HostMethod:
    """An instance attribute that stands before one method of a host object.

    Args:
        host: a pipeline, a model or a guider.
        name: of the method.
        handler: called as ``handler(original, *args, **kwargs)``.
        anchor: the object with which the handler is copied: a host that is copied alone must drive
            nothing, and must not drag the rest along.
    """

    def __init__(self, host: Any, name: str, handler: Callable[..., Any] | None, anchor: Any):
        self._host = WeakLink(host)
        self.name = name
        self.handler = handler
        self._anchor = WeakLink(anchor)
        self.before = vars(host).get(name)
        if isinstance(self.before, HostMethod):
            self.before = self.before.before  # takes another patch's place

    @property
    def host(self) -> Any:
        """The object that this is an attribute of."""
        return self._host()

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
        together = self.handler is not None and id(self._anchor()) in memo
        new._host = copy.deepcopy(self._host, memo)
        new.name = self.name
        new.before = copy.deepcopy(self.before, memo)
        new._anchor = copy.deepcopy(self._anchor, memo) if together else new._host
        new.handler = copy.deepcopy(self.handler, memo) if together else None
        return new


def ends_with(bar: Any, session: AttentionSession) -> Any:
    """A progress bar whose end is the session's: loops may end before the schedule does.

    Bars are closed at the end of a ``with`` block, of an iteration, and when they are deleted.
    """
    own = getattr(type(bar), "close", None)
    if own is not None and hasattr(bar, "__dict__"):
        bar.close = _Closing(weakref.ref(bar), own, session)
    return bar


class _Closing:
    """Stands before a bar's ``close``."""

    def __init__(self, bar: weakref.ref[Any], own: Callable[..., Any], session: AttentionSession):
        self.bar = bar
        self.own = own
        self.session = session
        self.run = session.run
        self.handled = sys.exc_info()[1]  # a pipeline may be called where an error is handled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Deleted long afterwards, the bar must not end the next run.
        if self.run is not None and self.session.run is self.run:
            self.run = None
            if sys.exc_info()[1] in (None, self.handled):
                self.session.finish()
            else:  # the loop failed: its error is the one that counts
                self.session.break_off()
        bar = self.bar()
        return None if bar is None else self.own(bar, *args, **kwargs)


class Track:
    """One scheduler, and where it stands.

    Attributes:
        scheduler: weakly; copies in a pipeline's call die with it.
        copied: it is a copy that the pipeline made in mid-call.
        values: of its steps: sigmas, or timesteps where it does not say what they mean.
        noise: what they mean.
        index: of the step that comes next.
    """

    def __init__(self, scheduler: Any, copied: bool = False):
        self.scheduler = weakref.ref(scheduler)
        self.copied = copied
        self.values: tuple[float, ...] = ()
        self.noise = NoiseScale()
        self.index = 0
        self._timesteps: Any = None  # the tensor that `values` was read for
        self.read()

    def read(self) -> None:
        """Copy the schedule to the CPU, once for each that the scheduler makes."""
        scheduler = self.scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is self._timesteps:
            return
        self._timesteps, self.index, self.values = timesteps, 0, ()
        if timesteps is None or not len(timesteps):
            return
        times = [float(t) for t in torch.as_tensor(timesteps).tolist()]
        self.values, self.noise = _levels(scheduler, times)

    def forget(self) -> None:
        """Read the schedule again even if it is the same tensor: a new run begins."""
        self._timesteps = None
        self.read()

    def step_index(self) -> int | None:
        """The scheduler's own count, None if it keeps none."""
        index = getattr(self.scheduler(), "step_index", None)
        return index if isinstance(index, int) else None

    def begin_index(self) -> int | None:
        """Where the pipeline told the scheduler to begin."""
        index = getattr(self.scheduler(), "begin_index", None)
        return index if isinstance(index, int) else None

    def locate(self, timestep: Any) -> int | None:
        """Index of a timestep in the schedule, without reading it from a device."""
        timesteps = getattr(self.scheduler(), "timesteps", None)
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


def _levels(scheduler: Any, times: Sequence[float]) -> tuple[tuple[float, ...], NoiseScale]:
    """A schedule's noise, step by step, and what its numbers mean.

    Timesteps mean something to one model only, so they become sigmas wherever that is possible.
    """
    known = getattr(getattr(scheduler, "config", None), "get", lambda *_: None)
    count = known("num_train_timesteps") or 1000
    alphas = getattr(scheduler, "alphas_cumprod", None)
    listed = tuple(alphas.tolist()) if isinstance(alphas, Tensor) and alphas.ndim == 1 else None
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < len(times):
        if not listed:
            return tuple(times), NoiseScale("timesteps")
        noise = NoiseScale("sigmas", listed)
        return tuple(noise.sigma(t) for t in times), noise
    values = tuple(float(x) for x in torch.as_tensor(sigmas).tolist()[: len(times)])
    # A flow's timesteps are its sigmas in another unit.
    flow = all(abs(t / count - s) < 0.01 for t, s in zip(times, values, strict=True))
    if flow or known("use_flow_sigmas"):
        return values, NoiseScale("flow-sigmas", timesteps=count)
    return values, NoiseScale("sigmas", listed)


class ScheduleDriver:
    """Steers a session by a pipeline's schedulers; a :class:`.followed.Listener`.

    A pipeline may have several, one after the other, and may step copies instead (one per frame):
    sampling then stands where those of them stand on average that have stepped, as long as no
    scheduler of the pipeline's own has in this run.

    Args:
        session: told of every step.
        guidance: looks at the pipeline whenever sampling begins or moves.
        anchor: the patched pipeline: what is copied along with it belongs to its copy.
        on_start: called whenever sampling begins, before the session is told.
    """

    def __init__(
        self,
        session: AttentionSession,
        guidance: Guidance,
        anchor: Any,
        on_start: Callable[[], None],
    ):
        self.session = session
        self.guidance = guidance
        self.on_start = on_start
        self.tracks: list[Track] = []
        self.current: Track | None = None  # whose schedule the session has
        self._anchor = weakref.ref(anchor)
        self._reported: int | None = None  # the index that the session knows
        self._led = False  # did one of the pipeline's own step in this run?
        self._hearing = False

    # ------------------------------------------------------------------ who is followed
    def follow(self, schedulers: Sequence[Any]) -> bool:
        """Follow these and copies that will be made of them; True if any of them is new."""
        new = False
        for track in self.tracks:
            scheduler = track.scheduler()
            if not track.copied and not any(scheduler is each for each in schedulers):
                unfollow(scheduler, self)
        self._forget_dead()
        for scheduler in schedulers:
            known = self.track_of(scheduler)
            if known is None and follow(scheduler, self):
                self.tracks.append(Track(scheduler))
                new = True
            elif known is not None and known.copied:  # the pipeline has made a copy its own
                known.copied, new = False, True
        return new

    def remove(self) -> None:
        """Give all schedulers back."""
        for track in self.tracks:
            scheduler = track.scheduler()
            if scheduler is not None:
                unfollow(scheduler, self)
        self.tracks.clear()

    def track_of(self, scheduler: Any) -> Track | None:
        """The track of a followed scheduler."""
        found = (track for track in self.tracks if track.scheduler() is scheduler)
        return next(found, None) if listener_of(scheduler) is self else None

    def _forget_dead(self) -> None:
        self.tracks = [
            track
            for track in self.tracks
            if track.scheduler() is not None and listener_of(track.scheduler()) is self
        ]

    def copied(self, scheduler: Any, memo: dict[int, Any]) -> None:
        """A pipeline copied its scheduler; the copy of a whole pipeline is another one's."""
        if id(self._anchor()) not in memo and follow(scheduler, self):
            self._forget_dead()
            self.tracks.append(Track(scheduler, copied=True))

    # ------------------------------------------------------------------ what is heard
    def hear(
        self, scheduler: Any, name: str, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """See :class:`.followed.Listener`."""
        if self._hearing:  # a method that calls another one, or a wrapper around ours
            return original(*args, **kwargs)
        self._hearing = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._hearing = False
        track = self.track_of(scheduler)
        if track is not None:
            getattr(self, f"_heard_{name}")(track, _timestep(args, kwargs))
        return result

    def start(self, track: Track) -> None:
        """Sampling begins with a scheduler's present schedule."""
        self.guidance.look()
        self.on_start()
        self.current, self._reported, self._led = track, None, False
        track.forget()
        self._forget_dead()
        for other in self.tracks:
            other.index = 0
        if track.values:
            self.session.start(len(track.values), track.values, track.noise)
            self._go_to(track, track.begin_index() or 0)

    def _heard_set_timesteps(self, track: Track, _: Any) -> None:
        if track.copied:
            track.forget()  # its original begins the run
        else:
            self.start(track)

    def _heard_set_begin_index(self, track: Track, _: Any) -> None:
        begin = track.begin_index()
        if begin is not None and self.session.where.step >= 0 and not track.copied:
            self._go_to(track, begin)

    def _heard_scale_model_input(self, track: Track, timestep: Any) -> None:
        # Image-to-image starts in mid-schedule, and some schedulers keep no index: the timestep
        # that is about to be sampled says where.
        if self.session.where.step < 0 or track.copied:
            return
        at = track.step_index()
        if at is None:
            at = track.locate(timestep)
        if at is not None:
            self._go_to(track, at)

    def _heard_step(self, track: Track, timestep: Any) -> None:
        if self.session.where.step < 0:
            return  # sampling was never announced, or is over
        after = track.step_index()
        if after is None:
            at = track.locate(timestep)
            after = (track.index if at is None else at) + 1
        track.index = after
        if not track.copied:
            self._led = True
        elif self._led:
            return
        else:
            moved = [each.index for each in self.tracks if each.copied and each.index]
            # Others may follow: the end of the loop tells when all are done.
            after = min(sum(moved) // len(moved), len(track.values) - 1)
        if after >= len(track.values):
            self.session.finish()
        else:
            self._go_to(track, after)

    def _go_to(self, track: Track, index: int) -> None:
        track.read()
        if not 0 <= index < len(track.values):
            return
        track.index = index if not track.copied else track.index
        if track is not self.current and not track.copied:  # several took turns
            self.current, self._reported = track, None
            self.session.start(len(track.values), track.values, track.noise)
        if self._reported != index:
            self._reported = index
            self.session.begin_step(index, track.values[index])
        self.guidance.ask_again()

    @property
    def schedule(self) -> tuple[float, ...]:
        """Strictly descending values of the last run's steps, in its scheduler's unit."""
        values = () if self.current is None else self.current.values
        return tuple(v for i, v in enumerate(values) if i == 0 or v < min(values[:i]))


def _timestep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The timestep of ``step(output, timestep, ..)`` or ``scale_model_input(sample, timestep)``."""
    return kwargs.get("timestep", args[1] if len(args) > 1 else None)
