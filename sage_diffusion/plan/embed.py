"""A plan as text inside of something else - a workflow, a picture's metadata - with its hash.

    {"file": "mine/a", "sha256": "0f6b8e21c9d4a7b3", "plan": {"version": 6, ..}}

The hash tells plans of one name apart, and whether somebody edited the text; it protects nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from sage_diffusion.json_files import JSONError, parse_json, shown
from sage_diffusion.plan.plan import PrecisionPlan
from sage_diffusion.plan.rules import PlanError

#: Longer texts are refused: a calibrated plan of 60 layers and 50 steps takes some 20 kB.
LARGEST = 256 << 10


@dataclass(frozen=True)
class EmbeddedPlan:
    """A plan that came inside of something else.

    Attributes:
        file: name of the file that it was embedded from.
        plan: the plan.
        written: hash that was written beside it.
        edited: is it another plan than the one whose hash stands beside it?
    """

    file: str
    plan: PrecisionPlan
    written: str
    edited: bool


def content_hash(plan: PrecisionPlan) -> str:
    """16 hex digits of everything that a plan says."""
    return _hash(plan.to_dict())


def _hash(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def embed_plan(plan: PrecisionPlan, file: str) -> str:
    """The text that :func:`read_embedded` reads.

    Raises:
        PlanError: the plan is too large for it.
    """
    data = {"file": file, "sha256": content_hash(plan), "plan": plan.to_dict()}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    _check_size(text)
    return text


def read_embedded(text: str) -> EmbeddedPlan:
    """A plan from the text that :func:`embed_plan` wrote, or that somebody changed since.

    Raises:
        PlanError: it is too long, no JSON, or holds no valid plan.
    """
    _check_size(text)
    try:
        data: Any = parse_json(text)
    except JSONError as error:
        raise PlanError(f"embedded plan: {error}") from None
    if not isinstance(data, dict) or set(data) != {"file", "sha256", "plan"}:
        raise PlanError("embedded plan: must be an object of file, sha256 and plan")
    for key in ("file", "sha256"):
        if not isinstance(data[key], str):
            raise PlanError(f"embedded plan: {key} must be text, got {shown(data[key])}")
    try:
        plan = PrecisionPlan.from_json(json.dumps(data["plan"]))
    except PlanError as error:
        raise PlanError(f"embedded plan {shown(data['file'])}: {error}") from None
    # A plan of an earlier version is read as another one: its hash is that of what was written.
    hashes = content_hash(plan), _hash(data["plan"])
    return EmbeddedPlan(data["file"], plan, data["sha256"], data["sha256"] not in hashes)


def _check_size(text: str) -> None:
    size = len(text.encode())
    if size > LARGEST:
        raise PlanError(
            f"embedded plan: must have at most {LARGEST >> 10} kB, got {size >> 10} kB; "
            "load it from a file instead"
        )
