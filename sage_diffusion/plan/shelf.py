"""The plans that come with the package, ``sage_diffusion/plan/shipped/*.json``."""

from __future__ import annotations

from sage_diffusion.plan.catalog import FOLDER, shipped
from sage_diffusion.plan.plan import PrecisionPlan
from sage_diffusion.plan.rules import PlanError


def shipped_plan(name: str) -> PrecisionPlan:
    """A plan by its name; those with ``calibration`` null are rules of thumb, not calibrated.

    Raises:
        PlanError: there is no such plan.
    """
    if name not in shipped():
        raise PlanError(f"plan must be one of {', '.join(shipped())}, got {name!r}")
    return PrecisionPlan.load(FOLDER / f"{name}.json")


def bundled_plan() -> PrecisionPlan:
    """The calibrated plan of the bundled model.

    Raises:
        PlanError: this installation lacks it.
    """
    if "bundled" not in shipped():
        raise PlanError(
            f"this installation has no plan of the bundled model; make one with: sage-diffusion "
            f"calibrate bundled --out {FOLDER / 'bundled.json'}"
        )
    return shipped_plan("bundled")
