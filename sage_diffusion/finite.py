"""Finding NaN and infinity without waiting for the device at every call."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteWatch:
    """One flag per watched call of a step, gathered on the device and read a step later.

    On a GPU the flags of a step are copied to pinned memory without blocking and read once the
    copy has finished; :meth:`poll` never waits, so a report may come one step late.
    """

    def __init__(self) -> None:
        self._names: list[tuple[str, int]] = []
        self._flags: list[Tensor] = []
        # In flight: what was watched, the flags on the host, and the event behind the copy.
        self._pending: list[tuple[list[tuple[str, int]], Tensor, torch.cuda.Event | None]] = []

    def look(self, name: str, step: int, out: Tensor) -> None:
        """Remember whether ``out`` is finite; queues device work, waits for nothing."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # a captured graph replays without this Python code
        low, high = torch.aminmax(out.detach())  # NaN propagates through both
        self._names.append((name, step))
        # In float32: the difference of two half values may overflow where both are finite.
        self._flags.append((high.float() - low.float()).isfinite())

    def poll(self, step: int) -> list[tuple[str, int]]:
        """``(name, step)`` of the non-finite outputs that are known by now."""
        self._send()
        found, waiting = [], []
        for entry in self._pending:
            names, flags, event = entry
            if event is not None and not event.query():
                waiting.append(entry)
                continue
            found += [name for name, ok in zip(names, flags.tolist(), strict=True) if not ok]
        self._pending = waiting
        return found

    def wait(self) -> None:
        """Wait for every copy in flight (at the end of a run)."""
        self._send()
        for _, _, event in self._pending:
            if event is not None:
                event.synchronize()

    def _send(self) -> None:
        """Copy the flags gathered so far to the host, one copy per device."""
        by_device: dict[torch.device, list[int]] = {}
        for i, flag in enumerate(self._flags):
            by_device.setdefault(flag.device, []).append(i)
        for device, indices in by_device.items():
            names = [self._names[i] for i in indices]
            flags = torch.stack([self._flags[i] for i in indices])
            event = None
            if device.type == "cuda":
                host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
                host.copy_(flags, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
                flags = host
            self._pending.append((names, flags, event))
        self._names, self._flags = [], []
