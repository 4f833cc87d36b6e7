"""Attention's past in fewer bits: a packed store, methods that fill it, and a cache for hosts.

    from sage_diffusion.kv import KVCache, PRESETS, compress

    cache = KVCache.for_model(model, preset="k3v2")
    model.generate(**inputs, past_key_values=cache)

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# The host of transformers stands above this folder, so only its name is known here.
_TRANSFORMERS = "sage_diffusion.integrations.transformers.cache"

_HOMES = {
    "PRESETS": "sage_diffusion.kv.presets",
    "Body": "sage_diffusion.kv.method",
    "Calibration": "sage_diffusion.kv.calibration",
    "KVCache": _TRANSFORMERS,
    "Layer": "sage_diffusion.kv.layer",
    "Method": "sage_diffusion.kv.method",
    "Place": "sage_diffusion.kv.method",
    "calibrate": "sage_diffusion.integrations.transformers.kv_calibration",
    "compress": _TRANSFORMERS,
}

__all__ = [
    "PRESETS",
    "Body",
    "Calibration",
    "KVCache",
    "Layer",
    "Method",
    "Place",
    "calibrate",
    "compress",
]

if TYPE_CHECKING:
    from sage_diffusion.kv.calibration import Calibration
    from sage_diffusion.kv.layer import Layer
    from sage_diffusion.kv.method import Body, Method, Place
    from sage_diffusion.kv.presets import PRESETS


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        home = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise ImportError(
            f"sage_diffusion.kv.{name} needs transformers: pip install 'sage-diffusion[kv]'"
        ) from error
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
