"""Quantizers by name and size, for whoever trains one from a command or a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage_diffusion.vq.quantizers.base import Quantizer
from sage_diffusion.vq.quantizers.combined import Groups, Residual
from sage_diffusion.vq.quantizers.ibq import IBQ
from sage_diffusion.vq.quantizers.scalar import BSQ, FSQ, LFQ
from sage_diffusion.vq.quantizers.simvq import SimVQ
from sage_diffusion.vq.quantizers.vector import VectorQuantizer

#: Of :func:`recipe`, the best of ``benchmarks/vq_quantizers.py`` at 12 bits first.
RECIPES = ("vector", "cosine", "simvq", "ibq", "fsq", "bsq", "lfq")


def recipe(
    kind: str,
    codes: int = 4096,
    dim: int = 16,
    *,
    levels: Sequence[int] | None = None,
    groups: int = 1,
    depth: int = 1,
) -> Quantizer:
    """A fresh quantizer.

    Args:
        kind: "vector" (moving averages, k-means start, revival), "cosine" (the same by angle), or a
            method by its name.
        codes: of each group and level; of "bsq", "lfq", and of "fsq" without levels, a power of 2.
        dim: of the latents, a multiple of the groups.
        levels: of "fsq", in place of codes.
        groups: channels are split into so many.
        depth: residual levels.

    Raises:
        ValueError: there is no such kind, or the numbers don't fit.
    """
    if kind not in RECIPES:
        raise ValueError(f"quantizer must be one of {', '.join(RECIPES)}, got {kind!r}")
    if levels is not None and kind != "fsq":
        raise ValueError(f"levels are of fsq, got quantizer {kind!r}")
    if min(groups, depth) < 1 or dim % groups:
        raise ValueError(
            f"groups and depth must be 1 or more, dim a multiple of groups, got {groups}, {depth}, "
            f"{dim}"
        )

    def one() -> Quantizer:
        if groups == 1:
            return _single(kind, codes, dim, levels)
        return Groups([_single(kind, codes, dim // groups, levels) for _ in range(groups)])

    return one() if depth == 1 else Residual([one() for _ in range(depth)])


def _single(kind: str, codes: int, dim: int, levels: Sequence[int] | None) -> Quantizer:
    if kind == "fsq":
        return FSQ(_levels(codes) if levels is None else levels, dim)
    if kind in ("bsq", "lfq"):
        return (BSQ if kind == "bsq" else LFQ)(dim, _bits(kind, codes))
    metric: dict[str, Any] = {"metric": "cosine"} if kind == "cosine" else {}
    table: dict[str, type[Any]] = {"simvq": SimVQ, "ibq": IBQ}
    return table.get(kind, VectorQuantizer)(dim, codes, **metric)


def _bits(kind: str, codes: int) -> int:
    bits = codes.bit_length() - 1
    if codes < 2 or 2**bits != codes:
        raise ValueError(f"codes must be a power of two for {kind}, got {codes}")
    return bits


def _levels(codes: int) -> list[int]:
    """Eight levels a dim, sixteen where bits are left; fewer than five do badly (2309.15505)."""
    bits = _bits("fsq without levels", codes)
    dims = max(bits // 3, 1)
    return [2 ** (bits // dims + (i < bits % dims)) for i in range(dims)]
