"""Which signs the Hadamard rotation of Q and K has at each step of a plan's sequence.

A layer's Q and K hardly change from step to step.  Rotated alike they round alike, and the errors
of neighbouring steps add up; under other signs they are nearly independent.
"""

from __future__ import annotations

#: Seeds are counted below this: int32, never negative.
SEEDS = 2**31


def step_seed(sequence: int, step: int) -> int:
    """Seed of the signs at a step of a sequence, ``0 <= seed < SEEDS``; 0 outside sampling.

    A hash (the finalizer of MurmurHash3), so that no two sequences are each other shifted.
    """
    if step < 0:
        return 0
    h = (sequence * 0x9E3779B1 + step + 1) & 0xFFFFFFFF
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return (h ^ (h >> 16)) % SEEDS
