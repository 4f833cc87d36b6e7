"""Bytes that one attention call's quantizers move, launch by launch, and how long that takes.

Counted by program: every address that a program reads or writes counts once.  (The program that
smooths 128 rows of Q meets them twice, the second time in its cache: 32 KiB at head dim 128.)
Means and extremes count for every program that reads them.  The tests execute the compiled kernels
and find the same numbers of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sage_diffusion.kernels.formats import (
    FP4_GROUP,
    Q_BLOCK,
    TILE_N,
    Precision,
    padded_dim,
    padded_length,
)
from sage_diffusion.kernels.spec import AttentionSpec

#: Bytes of a value of Q, K and V, of a statistic and of a scale.
HALF, FLOAT = 2, 4

#: Tokens of a program, as in ``kernels/quantize``.
ROWS, CLIPPED_ROWS, STATS_CHUNK = 32, 16, 128


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch or of several."""

    read: int = 0
    written: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written)

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.read + self.written


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def code_bytes(values: int, precision: Precision) -> int:
    """Bytes of so many codes, and of the micro scales of FP4."""
    micro = values // FP4_GROUP if precision is Precision.FP4 else 0
    return values * precision.bits // 8 + micro


def stats(length: int, head_dim: int, kinds: int) -> Traffic:
    """One launch of the statistics: ``kinds`` is 1 for sums plus 2 for both extremes."""
    return Traffic(
        length * head_dim * HALF, kinds * _blocks(length, STATS_CHUNK) * head_dim * FLOAT
    )


def joined(length: int, head_dim: int, kinds: int) -> Traffic:
    """Torch's joining of several parts: a sum of means, one pass for both extremes of minima and
    maxima."""
    vector, parts = head_dim * FLOAT, _blocks(length, STATS_CHUNK)
    total = Traffic()
    if parts > 1 and kinds % 2:
        total += Traffic(parts * vector, vector)
    if parts > 1 and kinds >= 2:
        total += Traffic(2 * parts * vector, 4 * vector)
    return total


def rows(
    length: int, head_dim: int, precision: Precision, mean: str, clip: bool, block: int = 1
) -> Traffic:
    """``quantize_rows``; ``mean`` is "none", "given" or "own" (``quantize_smoothed_rows``)."""
    size = Q_BLOCK if mean == "own" else block if block > 1 else CLIPPED_ROWS if clip else ROWS
    programs = _blocks(length, size)
    means = programs * head_dim * FLOAT
    codes = code_bytes(length * padded_dim(head_dim), precision)
    scales = (length if block == 1 else programs) * FLOAT
    return Traffic(
        length * head_dim * HALF + means * (mean == "given"),
        codes + scales + means * (mean == "own"),
    )


def value(length: int, head_dim: int, precision: Precision, smoothed: bool) -> Traffic:
    """``quantize_value``, its statistics apart."""
    padded = padded_length(length)
    vectors = 3 if smoothed else 2  # the extremes, and the mean
    return Traffic(
        length * head_dim * HALF + padded // TILE_N * vectors * head_dim * FLOAT,
        code_bytes(padded * head_dim, precision) + head_dim * FLOAT,
    )


def launches(spec: AttentionSpec, length: int, head_dim: int) -> Traffic:
    """Bytes of one head that the launches of a call's quantizers move."""
    total = rows(length, head_dim, spec.qk, "own" if spec.smooth_q else "none", spec.clip)
    if spec.smooth_k:
        total += stats(length, head_dim, 1)
    total += rows(length, head_dim, spec.qk, "given" if spec.smooth_k else "none", spec.clip)
    if spec.pv is not Precision.FP16:
        total += stats(length, head_dim, 2 + spec.smooth_v) + value(
            length, head_dim, spec.pv, spec.smooth_v
        )
    return total


def moved(spec: AttentionSpec, length: int, head_dim: int) -> Traffic:
    """The same and what Torch does between the launches."""
    total = launches(spec, length, head_dim)
    if spec.smooth_k:
        total += joined(length, head_dim, 1)
    if spec.pv is not Precision.FP16:
        total += joined(length, head_dim, 2 + spec.smooth_v)
    return total


def statistics(spec: AttentionSpec, length: int, head_dim: int) -> dict[str, int]:
    """Bytes of the passes for K's mean and for V's extremes, which :func:`moved` includes."""
    kinds = {"k": int(spec.smooth_k), "v": 0}
    if spec.pv is not Precision.FP16:
        kinds["v"] = 2 + spec.smooth_v
    return {
        name: (stats(length, head_dim, n) + joined(length, head_dim, n)).bytes if n else 0
        for name, n in kinds.items()
    }


def least(spec: AttentionSpec, length: int, head_dim: int) -> Traffic:
    """Every quantized input read once, its codes and scales written once."""
    codes = code_bytes(length * padded_dim(head_dim), spec.qk) + length * FLOAT
    total = Traffic(2 * length * head_dim * HALF, 2 * codes)
    if spec.pv is not Precision.FP16:  # else V is not touched
        total += Traffic(
            length * head_dim * HALF,
            code_bytes(padded_length(length) * head_dim, spec.pv) + head_dim * FLOAT,
        )
    return total


def beside(spec: AttentionSpec, length: int, head_dim: int) -> Traffic:
    """Delta-S of smoothed Q and K's scales in column order, which only the Gluon kernel has."""
    if not spec.smooth_q:
        return Traffic()
    columns = padded_length(length) + 2 * TILE_N
    blocks, chunk = _blocks(length, Q_BLOCK), 16
    chunks, tiles = _blocks(blocks, chunk), columns // TILE_N
    means = tiles * blocks * head_dim * FLOAT + chunks * tiles * head_dim * FLOAT
    bias = Traffic(chunks * length * head_dim * HALF + means, blocks * columns * FLOAT)
    return bias + Traffic(length * FLOAT, columns * FLOAT)


#: What an H200 measured (``benchmarks/results/h200-2026-11-26.json``, "apart", ``quantize_ms`` at
#: 4,096 to 32,768 tokens) is met within 3 % by the bytes at this share of the memory's bandwidth
#: and as many microseconds for each launch.
BANDWIDTH_SHARE, LAUNCH_MICROSECONDS = 0.75, 4.4


def starts(spec: AttentionSpec, length: int) -> int:
    """Launches of the quantizers, Triton's and Torch's (``tests/kernels/test_launches.py``)."""
    joins = int(length > STATS_CHUNK)
    count = 2  # the rows of Q, the rows of K
    if spec.smooth_k:
        count += 1 + joins
    if spec.pv is not Precision.FP16:
        count += 2 + joins * (1 + spec.smooth_v)
    return count


def quantize_milliseconds(
    gbs: float, spec: AttentionSpec, length: int, head_dim: int, heads: int
) -> float:
    """Predicted time of a call's quantizers.

    Args:
        gbs: the card's bandwidth, GB/s.
        spec: what is quantized.
        length, head_dim: of Q, K and V.
        heads: of all entries of the batch.
    """
    return _milliseconds(gbs, moved(spec, length, head_dim).bytes * heads, starts(spec, length))


def call_milliseconds(
    gbs: float,
    spec: AttentionSpec,
    length: int,
    head_dim: int,
    heads: int,
    *,
    loop: float,
    in_columns: bool,
) -> float:
    """Predicted time of a whole call; a bound as far as its main loop is one.

    Args:
        gbs, spec, length, head_dim, heads: as of :func:`quantize_milliseconds`.
        loop: milliseconds of the main loop.
        in_columns: the kernel wants K's scales in column order (Gluon, Hopper).
    """
    # Delta-S reads K, and means of Q that the L2 cache holds, again and again: K counts once.
    other = 0
    if spec.smooth_q:
        other = length * head_dim * HALF + _blocks(length, Q_BLOCK) * padded_length(length) * FLOAT
    if in_columns:
        other += 2 * length * FLOAT
    launches = 1 + in_columns + spec.smooth_q  # the attention kernel, K's scales, delta-S
    quantizers = quantize_milliseconds(gbs, spec, length, head_dim, heads)
    return loop + quantizers + _milliseconds(gbs, other * heads, launches)


def _milliseconds(gbs: float, moved: int, launches: int) -> float:
    return moved / (gbs * BANDWIDTH_SHARE * 1e6) + launches * LAUNCH_MICROSECONDS / 1e3
