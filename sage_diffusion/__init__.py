"""Quantized attention whose precision adapts per layer and timestep, with proof of what it costs.

    from sage_diffusion import enable
    enable(pipe).set_attn_processor("int8/fp8")     # any diffusers pipeline

Importing this package imports neither Triton nor diffusers nor ComfyUI.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout `kernels/` and `nodes/` stand beside this folder.  They are imported under this
# package's name only: as top-level modules they would shadow other projects' of the same name.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels" / "__init__.py").is_file():
    __path__.append(str(_root))

# Names are imported on first use: `import sage_diffusion` costs next to nothing.
_HOMES = {
    "AttentionSpec": "sage_diffusion.kernels.spec",
    "LADDER": "sage_diffusion.kernels.spec",
    "Rope": "sage_diffusion.kernels.rope",
    "Precision": "sage_diffusion.kernels.formats",
    "PrecisionPlan": "sage_diffusion.plan",
    "PlanError": "sage_diffusion.plan",
    "Rule": "sage_diffusion.plan",
    "AttentionSession": "sage_diffusion.attend.session",
    "BackendUnavailable": "sage_diffusion.attend.backends",
    "Guard": "sage_diffusion.attend.guard",
    "attention": "sage_diffusion.attend.dispatch",
    "AccuracyReport": "sage_diffusion.accuracy.report",
    "ScoreTable": "sage_diffusion.adapt.table",
    "calibrate": "sage_diffusion.adapt.calibrate",
    "make_plan": "sage_diffusion.adapt.planner",
    "SageAttnProcessor": "sage_diffusion.integrations.diffusers",
    "enable": "sage_diffusion.integrations.diffusers",
}

__all__ = [
    "LADDER",
    "AccuracyReport",
    "AttentionSession",
    "AttentionSpec",
    "BackendUnavailable",
    "Guard",
    "PlanError",
    "Precision",
    "PrecisionPlan",
    "Rope",
    "Rule",
    "SageAttnProcessor",
    "ScoreTable",
    "attention",
    "calibrate",
    "enable",
    "make_plan",
]

if TYPE_CHECKING:
    from sage_diffusion.accuracy.report import AccuracyReport
    from sage_diffusion.adapt.calibrate import calibrate
    from sage_diffusion.adapt.planner import make_plan
    from sage_diffusion.adapt.table import ScoreTable
    from sage_diffusion.attend.backends import BackendUnavailable
    from sage_diffusion.attend.dispatch import attention
    from sage_diffusion.attend.guard import Guard
    from sage_diffusion.attend.session import AttentionSession
    from sage_diffusion.integrations.diffusers import SageAttnProcessor, enable
    from sage_diffusion.kernels.formats import Precision
    from sage_diffusion.kernels.rope import Rope
    from sage_diffusion.kernels.spec import LADDER, AttentionSpec
    from sage_diffusion.plan import PlanError, PrecisionPlan, Rule


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
