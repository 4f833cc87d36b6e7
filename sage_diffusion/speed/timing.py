"""How long a call takes: timers that a driver is handed, so that it needs no GPU to be tested."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class Timing(NamedTuple):
    """What a timer found: milliseconds of every run, and bytes allocated at the worst moment."""

    milliseconds: tuple[float, ...]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        """Milliseconds of a typical run."""
        return statistics.median(self.milliseconds)


class Timer(Protocol):
    """Times a call on some device; the driver knows no device."""

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Run the call as often as it takes."""


class CudaTimer:
    """Times by the GPU's own events, with warm-up and cold caches.

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

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Times, and the memory that the call needs beyond what was allocated before."""
        for _ in range(self.warmup):
            call()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        times: list[float] = []
        while len(times) < self.repeats and (len(times) < 3 or sum(times) < 1000 * self.seconds):
            # Q, K and V of the last run would still be in the L2 cache.
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(self.device)
            times.append(start.elapsed_time(end))
        return Timing(tuple(times), peak)


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
