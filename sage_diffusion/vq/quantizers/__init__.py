"""Quantizers with one face: ``forward -> VQOutput``, ``encode``, ``decode``, ``bits``."""

from __future__ import annotations

from typing import Any

from sage_diffusion.vq.quantizers.base import Quantizer, VQOutput
from sage_diffusion.vq.quantizers.combined import Groups, Residual
from sage_diffusion.vq.quantizers.ibq import IBQ
from sage_diffusion.vq.quantizers.scalar import BSQ, FSQ, LFQ
from sage_diffusion.vq.quantizers.simvq import SimVQ
from sage_diffusion.vq.quantizers.vector import VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "QUANTIZERS",
    "Groups",
    "Quantizer",
    "Residual",
    "SimVQ",
    "VQOutput",
    "VectorQuantizer",
    "build",
]

#: By the name that files use.  The one line that a new quantizer adds.
QUANTIZERS: dict[str, type[Quantizer]] = {
    kind.kind: kind for kind in (VectorQuantizer, SimVQ, IBQ, FSQ, BSQ, LFQ, Groups, Residual)
}


def build(settings: dict[str, Any]) -> Quantizer:
    """A quantizer from its ``settings``.

    Raises:
        ValueError: an unknown kind, or settings that it does not take.
    """
    rest = dict(settings)
    kind = rest.pop("kind", None)
    if kind not in QUANTIZERS:
        raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {kind!r}")
    if "parts" in rest:
        rest.pop("dim", None)
        rest["parts"] = [build(part) for part in rest["parts"]]
    try:
        return QUANTIZERS[kind](**rest)
    except TypeError as error:
        raise ValueError(f"{kind} does not take these settings: {error}") from None
