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
    cdiv,
    columns_length,
    padded_dim,
    padded_length,
)
from sage_diffusion.kernels.quantize.limits import sample_block
from sage_diffusion.kernels.spec import AttentionSpec

#: Bytes of a value of Q, K and V, of a statistic and of a scale, and of a sum of V's codes.
HALF, FLOAT, SUM = 2, 4, 2

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


def code_bytes(values: int, precision: Precision) -> int:
    """Bytes of so many codes, and of the micro scales of FP4."""
    micro = values // FP4_GROUP if precision is Precision.FP4 else 0
    return values * precision.bits // 8 + micro


def stats(length: int, head_dim: int, kinds: int) -> Traffic:
    """One launch of the statistics: ``kinds`` is 1 for sums plus 2 for both extremes."""
    return Traffic(length * head_dim * HALF, kinds * cdiv(length, STATS_CHUNK) * head_dim * FLOAT)


def joined(length: int, head_dim: int, kinds: int) -> Traffic:
    """Torch's joining of several parts: a sum of means, one pass for both extremes of minima and
    maxima."""
    vector, parts = head_dim * FLOAT, cdiv(length, STATS_CHUNK)
    total = Traffic()
    if parts > 1 and kinds % 2:
        total += Traffic(parts * vector, vector)
    if parts > 1 and kinds >= 2:
        total += Traffic(2 * parts * vector, 4 * vector)
    return total


def sample(spec: AttentionSpec, length: int, head_dim: int) -> Traffic:
    """One launch that finds means and what balances channels, of a token in sixteen."""
    tokens = cdiv(length, sample_block(length))
    return Traffic(
        (2 + (spec.smooth_v or spec.sample_v)) * tokens * head_dim * HALF,
        (2 + spec.smooth_k + spec.smooth_v + spec.sample_v) * head_dim * FLOAT,
    )


def rows(
    length: int,
    head_dim: int,
    precision: Precision,
    mean: str,
    clip: bool,
    factor: bool = False,
    span: int = 0,
    columns: bool = False,
) -> Traffic:
    """Rows of Q or K; ``mean`` is "none", "given" or "own" (of every 128 rows).

    ``span``: rows of a program, if other than those that it takes at a time.  ``columns``: it also
    writes K's scales in column order.
    """
    size = Q_BLOCK if mean == "own" else CLIPPED_ROWS if clip else ROWS
    listed = columns_length(length) if columns else 0
    programs = cdiv(max(length, listed), span or size)
    means = programs * head_dim * FLOAT
    codes = code_bytes(length * padded_dim(head_dim), precision)
    return Traffic(
        length * head_dim * HALF + means * ((mean == "given") + factor),
        codes + length * FLOAT + means * (mean == "own") + 2 * listed * FLOAT,
    )


def value(
    spec: AttentionSpec, length: int, head_dim: int, sums: bool = False, permuted: bool = False
) -> Traffic:
    """``quantize_value``, its statistics apart."""
    padded = padded_length(length)
    tiles, vector = padded // TILE_N, head_dim * FLOAT
    # The scale or extremes, and the mean.
    vectors = (0 if spec.tile_v else 1 if spec.sample_v else 2) + spec.smooth_v
    written = code_bytes(padded * head_dim, spec.pv) + tiles * head_dim * SUM * sums
    if spec.tile_v:
        written += tiles * (padded_dim(head_dim) * HALF if permuted else vector)
    elif not spec.sample_v:
        written += vector
    elif spec.pv_accumulator == "fp16":
        written += (tiles + 2) * 2 * FLOAT
    return Traffic(length * head_dim * HALF + tiles * vectors * vector, written)


def launches(
    spec: AttentionSpec, length: int, head_dim: int, sums: bool = False, columns: bool = False
) -> Traffic:
    """Bytes of one head that the launches of a call's quantizers move.

    Args:
        spec, length, head_dim: of the call.
        sums: of V's codes, which the plain kernel needs for an unsigned P.
        columns: K's and V's scales as lanes read them, where Q, K and V share a launch.
    """
    of_q, of_k = "own" if spec.smooth_q else "none", "given" if spec.smooth_k else "none"
    total = rows(length, head_dim, spec.qk, of_q, spec.clip, factor=spec.balance)
    total += rows(
        length,
        head_dim,
        spec.qk,
        of_k,
        spec.clip,
        factor=spec.balance,
        span=TILE_N if together(spec) and spec.clip else 0,
        columns=columns and together(spec),
    )
    if spec.balance:
        total += sample(spec, length, head_dim)
    elif spec.smooth_k:
        total += stats(length, head_dim, 1)
    if _value_kinds(spec):
        total += stats(length, head_dim, _value_kinds(spec))
    if spec.pv is not Precision.FP16:
        total += value(spec, length, head_dim, sums, columns)
    return total


def together(spec: AttentionSpec) -> bool:
    """Whether Q, K and V are quantized in one launch."""
    return spec.balance and spec.granularity == "token"


def moved(spec: AttentionSpec, length: int, head_dim: int, sums: bool = False) -> Traffic:
    """The same and what Torch does between the launches."""
    total = launches(spec, length, head_dim, sums)
    if spec.smooth_k and not spec.balance:
        total += joined(length, head_dim, 1)
    return total + joined(length, head_dim, _value_kinds(spec))


def _value_kinds(spec: AttentionSpec) -> int:
    """Statistics of all of V: its extremes and its mean, where no sample gives them."""
    if spec.pv is Precision.FP16 or spec.sample_v:
        return 0
    return 2 * (not spec.tile_v) + (spec.smooth_v and not spec.balance)


def statistics(spec: AttentionSpec, length: int, head_dim: int) -> dict[str, int]:
    """Bytes of the pass for K's mean, or of the sample, and of that for V's extremes.

    :func:`moved` includes them.
    """
    kinds = {"k": int(spec.smooth_k and not spec.balance), "v": _value_kinds(spec)}
    found = {
        name: (stats(length, head_dim, n) + joined(length, head_dim, n)).bytes if n else 0
        for name, n in kinds.items()
    }
    if spec.balance:
        found["k"] = sample(spec, length, head_dim).bytes
    return found


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
    """Delta-S of smoothed Q and K's scales in column order, which not all kernels have."""
    if not spec.smooth_q:
        return Traffic()
    columns = columns_length(length)
    blocks, chunk = cdiv(length, Q_BLOCK), 16
    chunks, tiles = cdiv(blocks, chunk), columns // TILE_N
    means = tiles * blocks * head_dim * FLOAT + chunks * tiles * head_dim * FLOAT
    bias = Traffic(chunks * length * head_dim * HALF + means, blocks * columns * FLOAT)
    return bias + Traffic(0, 2 * columns * FLOAT)


#: What an H200 measured (``benchmarks/results/h200-2026-11-26.json``, "apart", ``quantize_ms`` at
#: 4,096 to 32,768 tokens) is met within 3 % by the bytes at this share of the memory's bandwidth
#: and as many microseconds for each launch.
BANDWIDTH_SHARE, LAUNCH_MICROSECONDS = 0.75, 4.4


def starts(spec: AttentionSpec, length: int) -> int:
    """Launches of the quantizers, Triton's and Torch's (``tests/kernels/test_launches.py``)."""
    joins = int(length > STATS_CHUNK)
    count = 1  # Q, K and V
    if not together(spec):
        count = 2 + (spec.pv is not Precision.FP16)
    if spec.balance:
        count += 1
    elif spec.smooth_k:
        count += 1 + joins
    if kinds := _value_kinds(spec):
        count += (not spec.balance) + joins * max(1, kinds - 1)
    return count


def quantize_milliseconds(
    gbs: float,
    spec: AttentionSpec,
    length: int,
    head_dim: int,
    heads: float,
    sums: bool = False,
) -> float:
    """Predicted time of a call's quantizers.

    Args:
        gbs: the card's bandwidth, GB/s.
        spec: what is quantized.
        length, head_dim: of Q, K and V.
        heads: of all entries of the batch.
        sums: as of :func:`launches`.
    """
    bytes_of_head = moved(spec, length, head_dim, sums).bytes
    return _milliseconds(gbs, bytes_of_head * heads, starts(spec, length))


def call_milliseconds(
    gbs: float,
    spec: AttentionSpec,
    length: int,
    head_dim: int,
    heads: float,
    *,
    loop: float,
    in_columns: bool | None = None,
) -> float:
    """Predicted time of a whole call; a bound as far as its main loop is one.

    Args:
        gbs, spec, length, head_dim, heads: as of :func:`quantize_milliseconds`.
        loop: milliseconds of the main loop.
        in_columns: the kernel wants K's scales in column order (Gluon, Hopper); None: as the kernel
            that a card has for the spec, where V is quantized.
    """
    if in_columns is None:
        in_columns = spec.pv is not Precision.FP16
    # Delta-S reads K, and means of Q that the L2 cache holds, again and again: K counts once.
    other = 0
    if spec.smooth_q:
        other = length * head_dim * HALF + cdiv(length, Q_BLOCK) * padded_length(length) * FLOAT
    if in_columns:
        other += 2 * length * FLOAT
    # The attention kernel, K's scales if they have a launch of their own, delta-S.
    launches = 1 + (in_columns and not together(spec)) + spec.smooth_q
    sums = spec.unsigned_p and not in_columns
    quantizers = quantize_milliseconds(gbs, spec, length, head_dim, heads, sums)
    return loop + quantizers + _milliseconds(gbs, other * heads, launches)


def _milliseconds(gbs: float, moved: float, launches: int) -> float:
    return moved / (gbs * BANDWIDTH_SHARE * 1e6) + launches * LAUNCH_MICROSECONDS / 1e3
