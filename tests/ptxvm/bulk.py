"""``mbarrier`` objects and the copies of tiles (``cp.async.bulk.tensor``) that signal them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .formats import split_operands
from .lanes import Lanes, PTXError, Unsupported

#: Bits of an address that are flipped by those three above, by bytes of a swizzled row.
_SWIZZLE = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}


class TensorMap(NamedTuple):
    """A host's descriptor of a matrix of bytes, as the driver gets it.

    Attributes:
        data: ``[rows, bytes]``.
        box: rows and bytes of a copy.
        swizzle: bytes of a swizzled row, 0 for none.
    """

    data: np.ndarray
    box: tuple[int, int]
    swizzle: int


class Copy(NamedTuple):
    """A tile under way: bytes of shared memory, and what they will hold."""

    where: np.ndarray
    data: np.ndarray


@dataclass
class Barrier:
    """An ``mbarrier``: phases end when all have arrived and all bytes have landed."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    copies: list[Copy] = field(default_factory=list)


class BulkOps(Lanes):
    """One CTA's barriers and copies; a copy lands when a barrier is waited for, at the latest."""

    barriers: dict[int, Barrier]
    maps: dict[int, TensorMap]
    flying: np.ndarray  # bytes of shared memory that a copy may be writing

    def _one(self, operand: str) -> int:
        """An address that all active threads agree upon."""
        values = np.unique(self.address(operand)[self.mask])
        if values.size != 1:
            raise Unsupported(f"{operand} differs between threads")
        return int(values[0])

    def _barrier(self, operand: str) -> Barrier:
        at = self._one(operand)
        if at not in self.barriers:
            raise PTXError(f"no mbarrier was initialized at {at}")
        return self.barriers[at]

    def op_elect(self, i):
        leader, chosen = i.args[0].split("|")
        lane = np.arange(self.T) & 31
        self._set(leader, np.zeros(self.T, np.uint32))
        self._set(chosen, lane == 0)

    def op_mbarrier(self, i):
        what = i.op[1]
        active = int(self.mask.sum())
        if what in ("init", "inval", "arrive") and not active:
            return
        if what == "init":
            count = int(i.args[1], 0)
            self.barriers[self._one(i.args[0])] = Barrier(count, count)
        elif what == "inval":
            del self.barriers[self._one(i.args[0])]
        elif what == "arrive":
            barrier = self._barrier(i.args[1])
            if "expect_tx" in i.op:
                barrier.bytes += active * int(self.raw(i.args[2], 32)[self.mask][0])
            barrier.pending -= active
            if barrier.pending < 0:
                raise PTXError(f"{-barrier.pending} more than {barrier.count} arrive")
            self._complete(barrier)
        elif what in ("try_wait", "test_wait"):
            barrier = self._barrier(i.args[1])
            parity = int(self.raw(i.args[2], 32)[self.mask][0]) & 1
            if barrier.phase & 1 == parity:
                self._land(barrier)
            if barrier.phase & 1 == parity:
                raise PTXError(
                    f"deadlock: {barrier.pending} arrivals and {barrier.bytes} bytes are missing"
                )
            self._set(i.args[0], np.ones(self.T, bool))
        else:
            raise Unsupported(f"mbarrier.{what}")

    def _land(self, barrier: Barrier) -> None:
        for where, data in barrier.copies:
            self.smem[where] = data
            self.flying[where] = False
            barrier.bytes -= data.size
        barrier.copies = []
        self._complete(barrier)

    def _complete(self, barrier: Barrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase, barrier.pending = barrier.phase + 1, barrier.count

    def copy_tile(self, i):
        """``cp.async.bulk.tensor.2d.shared.global.mbarrier [dst], [map, {x, y}], [mbar]``"""
        if "2d" not in i.op or not any(o.startswith("mbarrier") for o in i.op):
            raise Unsupported("bulk copy")
        if not self.mask.any():
            return
        if self.mask.sum() != 1:
            raise PTXError(f"{int(self.mask.sum())} threads start the same copy")
        thread = int(np.nonzero(self.mask)[0][0])
        source, at = split_operands(i.args[1].strip("[] "))
        tile = self.maps[int(self.raw(source, 64)[thread])]
        x, y = (
            int(self.raw(a, 32)[thread].astype(np.int32)) for a in split_operands(at.strip("{} "))
        )
        rows, width = tile.box
        data = np.zeros((rows, width), np.uint8)
        inside = tile.data[max(y, 0) : max(y + rows, 0), max(x, 0) : max(x + width, 0)]
        data[max(-y, 0) :, max(-x, 0) :][: inside.shape[0], : inside.shape[1]] = inside
        start = self._one(i.args[0])
        if start % 128:
            raise PTXError(f"a tile is copied to {start}, which is no multiple of 128")
        where = start + np.arange(rows)[:, None] * width + np.arange(width)
        where = where ^ (where >> 3 & _SWIZZLE[tile.swizzle])
        if where.max() >= self.shared_bytes:
            raise PTXError(
                f"shared write out of bounds at {int(where.max())} of {self.shared_bytes}"
            )
        if self.check_races:
            self._check_read(where.reshape(1, -1), np.array([thread]))
            if self.flying[where].any():
                raise PTXError("race: two copies to the same shared memory")
            written = self.writer[where]
            if ((written >= 0) & (written // 32 != thread // 32)).any():
                raise PTXError("race: a copy overwrites what was written since a barrier")
            self.flying[where] = True
            self.unfenced[where] = False  # of this proxy itself
        self._barrier(i.args[2]).copies.append(Copy(where, data))

    def check_landed(self, where, what: str) -> None:
        """Nobody may touch what a copy may be writing."""
        if self.check_races and self.flying[where].any():
            raise PTXError(f"race: {what} shared memory before its copy was waited for")

    def check_left(self) -> None:
        """At the end of a CTA nothing may be under way."""
        if any(barrier.copies for barrier in self.barriers.values()):
            raise PTXError("a copy is still under way at the end")
