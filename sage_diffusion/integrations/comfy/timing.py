"""Seconds of attention and of a step, with a plan and without it, from one run.

Every attention call and model call lies between two marks: events of the device, read once when the
run has ended, so that no call waits for the device.  What the model's own attention would have
taken is measured too: calls that a plan leaves alone are it, and where none of a kind was left
alone, a few calls are made both ways.  A *kind* is what decides how long a call takes - its shapes,
its dtype, whether it is masked - so that layers which are alike need not be measured one by one.
The first call of a kind and spec is left out where there are more: it may compile a kernel.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sage_diffusion.integrations.comfy.call import HostCall

#: Calls of a kind that are made both ways: one warms up, the mean of the others counts.
BOTH_WAYS = 3
#: Calls that are timed in a run; the rest are taken to be like them.
MOST_SPANS = 1 << 14

Span = tuple[Any, Any]
#: In place of a spec: the model's own attention, and a batch whose parts run different specs.
NATIVE, PARTS = "native", "parts"


class Clock(Protocol):
    """Marks points in a device's work.

    Attributes:
        compares: does it mean anything that a quantized call is faster here than another?
    """

    compares: bool

    def mark(self) -> Any:
        """Now, in the order of the device's work."""

    def wait(self) -> None:
        """Until every mark is reached."""

    def seconds(self, span: Span) -> float:
        """Between two marks."""

    def peak(self) -> int | None:
        """Most bytes of the device's memory since :meth:`begin`, None if unknown."""

    def begin(self) -> None:
        """A run begins."""


class HostClock:
    """The CPU, whose work is done when a call returns; its quantized calls are twins."""

    compares = False

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        return None

    def seconds(self, span: Span) -> float:
        return span[1] - span[0]

    def peak(self) -> int | None:
        return None

    def begin(self) -> None:
        return None


class DeviceClock:
    """Events on a GPU's current stream."""

    compares = True

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, span: Span) -> float:
        return span[0].elapsed_time(span[1]) / 1000

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Timing:
    """What a run took on one device.

    Attributes:
        attention: seconds in all attention calls of the run.
        attention_before: the same with the model's own attention, None if unknown.
        step: mean seconds of a step's model calls, None without a sampler's steps.
        step_before: the same with the model's own attention, None if unknown.
        peak: most bytes of the device's memory, None if unknown.
        both_ways: calls that were made both ways for it.
        steps: of a sampler, in which the model was called.
        fast: False where quantized calls are imitations, which tell nothing of speed.
    """

    attention: float
    attention_before: float | None
    step: float | None
    step_before: float | None
    peak: int | None
    both_ways: int
    steps: int = 0
    fast: bool = True

    def brief(self) -> str:
        """One line."""
        if not self.fast:
            return "on a CPU the twin is for accuracy, not for speed"
        parts = [_change("attention", self.attention_before, self.attention)]
        if self.step is not None:
            parts.append(_change("step", self.step_before, self.step))
        if self.peak is not None:
            parts.append(f"peak {self.peak / 2**30:.1f} GB")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; seconds and bytes."""
        return {
            "attention": self.attention,
            "attention_before": self.attention_before,
            "step": self.step,
            "step_before": self.step_before,
            "peak_bytes": self.peak,
            "calls_made_both_ways": self.both_ways,
            "tells_of_speed": self.fast,
        }


def _change(what: str, before: float | None, after: float) -> str:
    return f"{what} {after:.3g} s" if before is None else f"{what} {before:.3g} -> {after:.3g} s"


def kind_of(call: HostCall) -> Hashable:
    """What decides how long a call takes."""
    return call.q.shape, call.k.shape, call.q.dtype, call.mask is not None


class Stopwatch:
    """One device's marks, and what they say when a run has ended.

    Args:
        clock: of the device.
        compare: make a few calls both ways where nothing else tells what the model's own attention
            takes.
    """

    def __init__(self, clock: Clock, compare: bool):
        self.clock = clock
        self.compare = compare and clock.compares
        self._known: dict[Hashable, float] = {}  # seconds of a native call, from earlier runs
        self._clear()

    def _clear(self) -> None:
        self._spans: defaultdict[tuple[Hashable, str], list[Span]] = defaultdict(list)
        self._counts: Counter[tuple[Hashable, str]] = Counter()
        self._baseline: defaultdict[Hashable, list[Span]] = defaultdict(list)
        self._steps: defaultdict[int, list[Span]] = defaultdict(list)
        self._disturbed: set[int] = set()
        self._step = -1
        self._left = MOST_SPANS
        self._fell_back = self._spoiled = False

    def begin_run(self) -> None:
        """Forget the last run's marks; what native calls take stays known."""
        self._clear()
        self.clock.begin()

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """A model call of a step."""
        self._step = step
        start = self.clock.mark()
        yield
        self._steps[step].append((start, self.clock.mark()))

    def fall_back(self) -> None:
        """The host's own attention serves the call that is timed now."""
        self._fell_back = True

    def spoil(self) -> None:
        """The call that is timed now does more than it would: its seconds do not count."""
        self._spoiled = True
        self._disturbed.add(self._step)

    def native(self, kind: Hashable, run: Callable[[], Any]) -> Any:
        """A call that is the model's own anyway."""
        return self._timed((kind, NATIVE), run)

    def ours(
        self, kind: Hashable, spec: str, run: Callable[[], Tensor], host: Callable[[], Any] | None
    ) -> Tensor:
        """A call that a plan decides.

        Args:
            kind: of the call.
            spec: that the plan gives it; a call whose parts differ has a name of its own.
            run: makes it.
            host: makes it with the model's own attention; None where that may have effects.
        """
        self._fell_back = False
        key = (kind, spec)
        out = self._timed(key, run)
        if self._fell_back and spec != PARTS:
            self._counts[key] -= 1
            native = (kind, NATIVE)
            self._counts[native] += 1
            if self._spans[key] and not self._spoiled:
                self._spans[native].append(self._spans[key].pop())
        elif host is not None and self._wants(kind):
            start = self.clock.mark()
            host()
            self._baseline[kind].append((start, self.clock.mark()))
            self._disturbed.add(self._step)
        return out

    def _timed(self, key: tuple[Hashable, str], run: Callable[[], Any]) -> Any:
        self._counts[key] += 1
        if self._left <= 0:
            return run()
        self._left -= 1
        self._spoiled = False
        start = self.clock.mark()
        out = run()
        if not self._spoiled:
            self._spans[key].append((start, self.clock.mark()))
        return out

    def _wants(self, kind: Hashable) -> bool:
        if not self.compare or kind in self._known:
            return False
        return len(self._baseline[kind]) + len(self._spans.get((kind, NATIVE), ())) < BOTH_WAYS

    # ------------------------------------------------------------------ after the run
    def read(self) -> Timing | None:
        """What the run took, None if it made no attention call; waits for the device."""
        if not self._counts:
            return None
        self.clock.wait()
        for kind, _ in self._counts:
            spans = [*self._spans.get((kind, NATIVE), ()), *self._baseline.get(kind, ())]
            if len(spans) > 1 or (spans and kind not in self._known):
                self._known[kind] = self._mean(spans)
        after = sum(
            count * self._mean(self._spans[key]) for key, count in self._counts.items() if count
        )
        before = None
        if self.clock.compares and all(kind in self._known for kind, _ in self._counts):
            before = sum(n * self._known[kind] for (kind, _), n in self._counts.items())
        step, step_before = self._step_seconds(), None
        if step is not None and before is not None:
            step_before = step + (before - after) / len(self._steps)
        both = sum(map(len, self._baseline.values()))
        peak = self.clock.peak()
        steps = len(self._steps) if step is not None else 0
        return Timing(after, before, step, step_before, peak, both, steps, self.clock.compares)

    def _step_seconds(self) -> float | None:
        """Mean of the steps in which nothing was compiled and nothing made both ways, if any."""
        seconds = {step: sum(map(self.clock.seconds, spans)) for step, spans in self._steps.items()}
        calm = [s for step, s in seconds.items() if step > 0 and step not in self._disturbed]
        values = calm or list(seconds.values())
        return statistics.fmean(values) if values and -1 not in seconds else None

    def _mean(self, spans: Sequence[Span]) -> float:
        """Without the first where there are more."""
        return statistics.fmean(map(self.clock.seconds, spans[1:] or spans)) if spans else 0.0
