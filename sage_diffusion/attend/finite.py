"""Looking at numbers of every call without waiting for the device at every call."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DeferredValues:
    """Scalars that stay on their device until a later step asks for them.

    On a GPU the values of a step are copied to pinned memory without blocking and read once the
    copy has finished; :meth:`poll` never waits, so a value may come one step late.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[str, int]] = []
        self._values: list[Tensor] = []
        # In flight: what was put, the values on the host, and the event behind the copy.
        self._pending: list[tuple[list[tuple[str, int]], Tensor, torch.cuda.Event | None]] = []

    def put(self, name: str, step: int, value: Tensor) -> None:
        """Remember a 0-dim tensor; queues no copy yet and waits for nothing."""
        self._keys.append((name, step))
        self._values.append(value)

    def poll(self) -> list[tuple[str, int, float]]:
        """``(name, step, value)`` of everything that is known by now, each once."""
        self._send()
        found: list[tuple[str, int, float]] = []
        waiting = []
        for entry in self._pending:
            keys, values, event = entry
            if event is not None and not event.query():
                waiting.append(entry)
                continue
            numbers = values.tolist()
            found += [(*key, float(x)) for key, x in zip(keys, numbers, strict=True)]
        self._pending = waiting
        return found

    def wait(self) -> None:
        """Wait for every copy in flight (at the end of a run)."""
        self._send()
        for _, _, event in self._pending:
            if event is not None:
                event.synchronize()

    def _send(self) -> None:
        """Copy the values gathered so far to the host, one copy per device and dtype."""
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, value in enumerate(self._values):
            alike.setdefault((value.device, value.dtype), []).append(i)
        for indices in alike.values():
            keys = [self._keys[i] for i in indices]
            values = torch.stack([self._values[i] for i in indices])
            self._pending.append((keys, *copy_to_host(values)))
        self._keys, self._values = [], []


def reads_at_once(x: Tensor) -> bool:
    """Does reading a value of ``x`` wait for no queue of a device?"""
    return x.device.type == "cpu"


def copy_to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Values on the host, and the event behind their copy where one is under way."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return host, event


def capturing(x: Tensor) -> bool:
    """Is work on ``x``'s device being captured in a CUDA graph, which replays without Python?"""
    if not x.is_cuda:
        return False
    with torch.cuda.device_of(x):
        return torch.cuda.is_current_stream_capturing()


class FiniteWatch:
    """The extremes of every watched output of a step, gathered on the device, read a step later."""

    def __init__(self) -> None:
        self._extremes = DeferredValues()

    def look(self, name: str, step: int, out: Tensor) -> bool | None:
        """Remember whether ``out`` is finite; on a GPU one pass over it, and no wait.

        Returns:
            On the CPU whether it is, elsewhere None: the answer comes with a later step, or never
            where a CUDA graph is captured.
        """
        if capturing(out):
            return None
        extremes = torch.aminmax(out.detach())  # NaN propagates through both
        for value in extremes:
            self._extremes.put(name, step, value)
        if not reads_at_once(out):
            return None
        return all(math.isfinite(value) for value in extremes)

    def poll(self) -> list[tuple[str, int]]:
        """``(name, step)`` of the non-finite outputs that are known by now."""
        wrong = [(name, at) for name, at, x in self._extremes.poll() if not math.isfinite(x)]
        return list(dict.fromkeys(wrong))

    def wait(self) -> None:
        """Wait for every copy in flight (at the end of a run)."""
        self._extremes.wait()
