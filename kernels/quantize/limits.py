"""What a quantizer and its twin agree on before either computes: ranges, and shares to clip at."""

from __future__ import annotations

from torch import Tensor

from ..formats import MAX_VALUE, Precision, padded_dim
from ..spec import AttentionSpec

#: Shares of a row's largest value that clipping tries as the top of the 4-bit range.
CLIP_CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

#: Squared errors are summed as integers of this resolution: the sum then has no order, and kernel
#: and twin choose the same candidate.
CLIP_RESOLUTION = 2.0**14

#: Scaled values beyond this count as this: only rows that saturate (:data:`MAX_SCALE`) have any,
#: and the integer sum of 256 squared errors fits 32 bits.
CLIP_LIMIT = 16.0

#: By how much scales of least squared error shrink rows of 64, 128 and 256 normal values: a row's
#: product with its codes is this share below its square.  Such scales leave errors at right angles
#: to the codes and not to the row; rotated and balanced rows are as good as normal.
SHRINKAGE = {
    Precision.INT4: {64: 0.0100, 128: 0.0112, 256: 0.0119},
    Precision.FP4: {64: 0.0135, 128: 0.0136, 256: 0.0137},
}

#: E4M3's largest and smallest positive number, between which micro scales lie, and E2M1's largest.
FP8_MAX, FP8_TINY, FP4_MAX = 448.0, 2.0**-9, 6.0

#: Largest |V| code where P V accumulates in FP16: 448 * 2.25 * 64 keys < 65504
#: (SageAttention2++, 2505.21136 section 3.2; their code's split of the range, not the paper's).
FP8_FAST_VALUE_MAX = 2.25

#: Tokens of which one is sampled to balance channels and to find means, and the least sample of a
#: short sequence, which is made of one token of fewer.
SAMPLE_BLOCK, SMALLEST_SAMPLE = 16, 64

#: What V's scales leave room for beyond the largest value of a channel in the sample: E4M3 codes
#: and scales of FP4 are as exact eight binades lower.  A channel that is small in the sample counts
#: as this share of its head's largest one.
V_HEADROOM, V_SMALLEST_SHARE = 256.0, 1 / 16

#: Factors of 64 tokens of V, where there is no such room (:data:`FP8_FAST_VALUE_MAX`).  Sums stay
#: finite as they pass from the largest to the smallest.
SMALLEST_TILE, LARGEST_TILE = 2.0**-24, 2.0**36

#: A channel whose mean square is at most this is left as it is.
SMALLEST_POWER = 1e-30

#: Q's and K's channels are balanced by powers of two from 2^-8 to 2^8.
LARGEST_SHIFT = 8.0


def code_top(precision: Precision) -> float:
    """What the largest value of a row or channel becomes."""
    return FP4_MAX * FP8_MAX if precision is Precision.FP4 else precision.qmax


def value_options(spec: AttentionSpec) -> dict[str, bool]:
    """What a spec asks of the quantizers of V, twin and kernel, beside means and scales."""
    return {
        "fast": spec.pv_accumulator == "fp16",
        "clip": spec.clip and spec.pv is Precision.FP4,  # nothing to search in the others
    }


def score_gain(spec: AttentionSpec, head_dim: int) -> float:
    """What Q K^T of the codes is multiplied with, so that it is right in expectation.

    It goes into Q's scales, and costs nothing.

    Args:
        spec: 1 unless it is ``unbiased``.
        head_dim: as the model has it.
    """
    if not spec.unbiased:
        return 1.0
    return (1.0 - SHRINKAGE[spec.qk][padded_dim(head_dim)]) ** -2


def sampled_top(spec: AttentionSpec) -> float:
    """What the largest value of a channel of V in the sample becomes."""
    fast = spec.pv_accumulator == "fp16"
    return FP8_FAST_VALUE_MAX if fast else code_top(spec.pv) / V_HEADROOM


def sample_block(length: int) -> int:
    """Tokens of which one is sampled: 16, or 8, 4 or 2."""
    block = SAMPLE_BLOCK
    while block > 2 and length < SMALLEST_SAMPLE * block:
        block //= 2
    return block


def finite(x: Tensor) -> Tensor:
    """float32, clamped so that sums and products of it stay finite."""
    return x.float().clamp(-MAX_VALUE, MAX_VALUE)
