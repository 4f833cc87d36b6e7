"""What a quantizer and its twin agree on before either computes: ranges, and shares to clip at."""

from __future__ import annotations

from torch import Tensor

from ..formats import MAX_VALUE

#: Shares of a row's largest value that clipping tries as the top of the 4-bit range.
CLIP_CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

#: Squared errors are summed as integers of this resolution: the sum then has no order, and kernel
#: and twin choose the same candidate.
CLIP_RESOLUTION = 2.0**14

#: Scaled values beyond this count as this: only rows that saturate (:data:`MAX_SCALE`) have any,
#: and the integer sum of 256 squared errors fits 32 bits.
CLIP_LIMIT = 16.0

#: E4M3's largest and smallest positive number, between which micro scales lie, and E2M1's largest.
FP8_MAX, FP8_TINY, FP4_MAX = 448.0, 2.0**-9, 6.0

#: Largest |V| code where P V accumulates in FP16: 448 * 2.25 * 64 keys < 65504
#: (SageAttention2++, 2505.21136 section 3.2; their code's split of the range, not the paper's).
FP8_FAST_VALUE_MAX = 2.25

#: Tokens of which one is sampled to balance channels and to find means, and the least sample of a
#: short sequence, which is made of one token of fewer.
SAMPLE_BLOCK, SMALLEST_SAMPLE = 16, 64

#: A channel whose mean square is at most this is left as it is.
SMALLEST_POWER = 1e-30

#: Q's and K's channels are balanced by powers of two from 2^-8 to 2^8.
LARGEST_SHIFT = 8.0


def sample_block(length: int) -> int:
    """Tokens of which one is sampled: 16, or 8, 4 or 2."""
    block = SAMPLE_BLOCK
    while block > 2 and length < SMALLEST_SAMPLE * block:
        block //= 2
    return block


def finite(x: Tensor) -> Tensor:
    """float32, clamped so that sums and products of it stay finite."""
    return x.float().clamp(-MAX_VALUE, MAX_VALUE)
