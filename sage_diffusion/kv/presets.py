"""Methods by name."""

from __future__ import annotations

from sage_diffusion.kv.method import Method
from sage_diffusion.kv.methods.calibrated import Calibrated
from sage_diffusion.kv.methods.gear import Gear
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.lossless import Lossless
from sage_diffusion.kv.methods.matryoshka import Matryoshka
from sage_diffusion.kv.methods.prefixkv import PrefixKV
from sage_diffusion.kv.methods.video import Video
from sage_diffusion.kv.methods.vidkv import VidKV
from sage_diffusion.kv.methods.xkv import XKV

#: The one line that a new preset adds.
PRESETS: dict[str, Method] = {
    "lossless": Lossless(),
    "k8v8": Kivi(8, 8),
    "k4v4": Kivi(4, 4),
    "k3v2": Kivi(3, 2),
    # K's wide channels carry the attention; steps of 8 bits pay for the third bit of theirs.
    "k2v2": Kivi((3, 2), 2, form="fp8"),
    "vidkv": VidKV(),
    "gear": Gear(),
    "video": Video(),
    "calibrated-3.9": Calibrated(3.4, 4),
    "calibrated-2.9": Calibrated(2.5, 3),
    "calibrated-2.25": Calibrated(1.25, 3),
    "calibrated-1.8": Calibrated(0.95, "ternary", heavy=0.04),
    "xkv": XKV(),
    "matryoshka": Matryoshka(0.75),
    "prefixkv": PrefixKV(0.5),
}


def method(preset: str | Method) -> Method:
    """A preset by name; a method as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(preset, Method):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]
