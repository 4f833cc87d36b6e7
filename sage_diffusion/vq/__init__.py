"""Pictures as tokens: quantizers, nearest-code search, tokenizers and what they are good for.

    from sage_diffusion.vq import SimVQ, load_tokenizer, nearest_code, search

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_HOMES = {
    **dict.fromkeys(
        ("BSQ", "FSQ", "IBQ", "LFQ", "Groups", "Quantizer", "Residual", "SimVQ", "VQOutput"),
        "sage_diffusion.vq.quantizers",
    ),
    "VectorQuantizer": "sage_diffusion.vq.quantizers",
    "load_fill": "sage_diffusion.vq.fill",
    "load_tokenizer": "sage_diffusion.vq.checkpoints",
    "nearest_code": "sage_diffusion.vq.codes",
    "search": "sage_diffusion.vq.hosts",
}

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "Groups",
    "Quantizer",
    "Residual",
    "SimVQ",
    "VQOutput",
    "VectorQuantizer",
    "load_fill",
    "load_tokenizer",
    "nearest_code",
    "search",
]

if TYPE_CHECKING:
    from sage_diffusion.vq.checkpoints import load_tokenizer
    from sage_diffusion.vq.codes import nearest_code
    from sage_diffusion.vq.fill import load_fill
    from sage_diffusion.vq.hosts import search
    from sage_diffusion.vq.quantizers import (
        BSQ,
        FSQ,
        IBQ,
        LFQ,
        Groups,
        Quantizer,
        Residual,
        SimVQ,
        VectorQuantizer,
        VQOutput,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
