"""Bounds on CPU time that hold on slow and busy machines, too."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(loops: float) -> Iterator[None]:
    """The block may take the CPU as long as so many loops of 20,000 rounds do on this machine.

    One took 1 ms where the bounds of the tests were set; it is timed right after the block.  What
    other tests left in the process is out of the garbage collector's sight meanwhile: with millions
    of objects its rounds take seconds, which are not the block's.
    """
    gc.freeze()
    try:
        start = time.process_time()
        yield
        took = time.process_time() - start
    finally:
        gc.unfreeze()
    one = min(_loop(), _loop())
    assert took < loops * one, f"{took:.3g} s of CPU time, a loop takes {one:.3g} s"


def _loop() -> float:
    start, sums = time.process_time(), dict.fromkeys(range(256), 0)
    for i in range(20_000):
        sums[i & 255] += i
    return time.process_time() - start
