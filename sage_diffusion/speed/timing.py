"""How long a call takes: timers that a driver is handed, so that it needs no GPU to be tested."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class Timing(NamedTuple):
    """What a timer found.

    Attributes:
        milliseconds: of every run, on the device.
        peak_bytes: allocated at the worst moment, None where unknown.
        host_milliseconds: what the host needs to start a run, None where unknown.
        gaps: the device waited for the host within runs, and that is in their times.
    """

    milliseconds: tuple[float, ...]
    peak_bytes: int | None
    host_milliseconds: float | None = None
    gaps: bool = False

    @property
    def median(self) -> float:
        """Milliseconds of a typical run."""
        return statistics.median(self.milliseconds)


class Timer(Protocol):
    """Times a call on some device; the driver knows no device."""

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Run the call as often as it takes."""


#: The device sleeps no longer than this before a run, in milliseconds.
LONGEST_SLEEP = 50.0

#: Cycles of the sleep that tells how long a cycle is.
_PROBE = 1 << 22


class CudaTimer:
    """Times by the GPU's own events, with warm-up and cold caches.

    A short call takes its host longer than the GPU, whose time would be that of the gaps between
    launches.  So the GPU sleeps before each run until everything that belongs to it is queued.  A
    run that was not queued in time is repeated behind a longer sleep, and counted with its gaps
    only where the longest does not help: a call that waits for the GPU itself.

    Args:
        device: of the tensors.
        repeats: runs that are timed.
        warmup: runs before.
        seconds: stop after that long, though not before the third run.
    """

    def __init__(
        self, device: torch.device, repeats: int = 20, warmup: int = 3, seconds: float = 3.0
    ):
        self.device, self.repeats, self.warmup, self.seconds = device, repeats, warmup, seconds
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * cache, 2**26), dtype=torch.uint8, device=device)
        with torch.cuda.device(device):
            torch.cuda._sleep(1)  # loads the kernel
            self._cycles = _PROBE / self._run(lambda: torch.cuda._sleep(_PROBE)).milliseconds

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Times, and the memory that the call needs beyond what was allocated before."""
        with torch.cuda.device(self.device):  # streams and events are the current device's
            for _ in range(self.warmup):
                call()
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            sleep = min(LONGEST_SLEEP, 0.1 + 2 * self._run(call).host)
            peak = torch.cuda.max_memory_allocated(self.device) - before
            runs: list[_Run] = []
            spent = 0.0
            while len(runs) < self.repeats and (len(runs) < 3 or spent < 1000 * self.seconds):
                # Q, K and V of the last run would still be in the L2 cache.
                self._flush.zero_()
                run = self._run(call, sleep)
                spent += run.milliseconds
                if run.gaps and sleep < LONGEST_SLEEP:
                    sleep = min(LONGEST_SLEEP, 2 * sleep)
                else:
                    runs.append(run)
        return Timing(
            tuple(run.milliseconds for run in runs),
            peak,
            statistics.median(run.host for run in runs),
            any(run.gaps for run in runs),
        )

    def _run(self, call: Callable[[], object], sleep: float = 0.0) -> _Run:
        """One run, queued while the device sleeps so many milliseconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if sleep:
            torch.cuda._sleep(int(sleep * self._cycles))
        start.record()
        began = time.perf_counter()
        call()
        host = 1000 * (time.perf_counter() - began)
        end.record()
        gaps = start.query()  # the device is through with its sleep
        torch.cuda.synchronize(self.device)
        return _Run(start.elapsed_time(end), host, gaps)


class _Run(NamedTuple):
    """Milliseconds on the device and on the host, and whether the one waited for the other."""

    milliseconds: float
    host: float
    gaps: bool


class Card(NamedTuple):
    """A GPU that is here, and its timer."""

    name: str
    device: torch.device
    timer: Timer


def find_card() -> Card | None:
    """The current CUDA or ROCm device, None without one."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return Card(torch.cuda.get_device_name(device), device, CudaTimer(device))
