"""Which plans come with the package, ``sage_diffusion/plan/shipped/*.json``."""

from __future__ import annotations

import functools
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "shipped"


@functools.cache
def shipped() -> tuple[str, ...]:
    """Names of the plans."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
