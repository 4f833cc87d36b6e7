"""Folders of plans: those that come with the package, ``plan/shipped``, and the user's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sage_diffusion.plan.plan import PrecisionPlan
from sage_diffusion.plan.rules import PlanError

#: Plans whose layers have diffusers' names.
FOLDER = Path(__file__).resolve().parent / "shipped"

#: Plans whose layers have ComfyUI's names.
OWN_PLANS = FOLDER / "comfy"


def shipped() -> list[str]:
    """Names of the plans."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


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


def plan_files(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> file of every plan in ``folders``, the first folder that has a name counts."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(name, path)
    return found


def save_plan(plan: PrecisionPlan, folder: str | Path, name: str, overwrite: bool) -> Path:
    """Write a plan into a folder.

    Raises:
        PlanError: a name that leaves the folder, or a file that may not be replaced: it exists, or
            it is no plan that this version can read.
    """
    parts = name.strip().removesuffix(".json").split("/")
    if any(not re.fullmatch(r"[\w][\w .+()-]*", part) for part in parts):
        raise PlanError(
            f"name must be made of letters, digits, spaces and _ . + ( ) -, got {name!r}"
        )
    path = Path(folder, *parts[:-1], f"{parts[-1]}.json")
    if path.exists():
        if not overwrite:
            raise PlanError(f"{path} exists: switch overwrite on or choose another name")
        try:
            PrecisionPlan.load(path)
        except PlanError as error:
            raise PlanError(f"not overwritten, it is no plan that can be read: {error}") from None
    plan.save(path)
    return path
