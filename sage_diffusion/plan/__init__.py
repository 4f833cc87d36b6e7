"""Which spec each layer runs when: rules, their JSON, what they fit, edits, and shipped plans."""

from sage_diffusion.plan.plan import PrecisionPlan
from sage_diffusion.plan.rules import (
    BRANCHES,
    VERSION,
    PlanError,
    Rule,
    progress,
    step_progress,
)

__all__ = [
    "BRANCHES",
    "VERSION",
    "PlanError",
    "PrecisionPlan",
    "Rule",
    "progress",
    "step_progress",
]
