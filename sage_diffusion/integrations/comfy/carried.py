"""Which plan a node means whose workflow carries the plan of the file that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sage_diffusion.plan import PlanError, PrecisionPlan
from sage_diffusion.plan.embed import content_hash, read_embedded


@dataclass(frozen=True)
class Chosen:
    """A plan, and where it comes from.

    Attributes:
        plan: runs.
        origin: in words, its hash among them.
    """

    plan: PrecisionPlan
    origin: str


def choose(file: str, embedded: str, path: Path | None) -> Chosen:
    """The workflow's own plan where it carries one for this file, else the file's.

    Args:
        file: name that the node shows.
        embedded: text of :mod:`sage_diffusion.plan.embed`; empty for none.
        path: of the file of that name here, None if there is none.

    Raises:
        PlanError: neither is there, or the one that counts is no plan.
    """
    carried = read_embedded(embedded) if embedded else None
    if carried is None or carried.file != file:
        if path is None:
            raise PlanError(f"no plan named {file!r} here, and the workflow carries none")
        plan = PrecisionPlan.load(path)
        return Chosen(plan, f"file {file}, hash {content_hash(plan)}")
    found = content_hash(carried.plan)
    origin = f"plan of this workflow, hash {found}"
    if carried.edited:
        origin += f", edited by hand (was {carried.written})"
    here = None if path is None else _hash_of(path)
    if here not in (None, found):
        origin += f"; the file {file} here is another ({here}): to take it, choose it anew"
    return Chosen(carried.plan, origin)


def signature(file: str, embedded: str, path: Path | None) -> str:
    """Changes whenever :func:`choose` would give another plan."""
    return f"{file} {embedded} {None if path is None else _hash_of(path)}"


def _hash_of(path: Path) -> str | None:
    """Of a plan's file; None where it can't be read."""
    try:
        return content_hash(PrecisionPlan.load(path))
    except PlanError:
        return None
