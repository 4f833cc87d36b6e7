"""Whose plan or score table it is: what a model looks like, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def fingerprint(
    layers: Sequence[str], *, model: str | None = None, head_dims: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """What a model looks like to a plan: class, layer names and head dims.

    Args:
        layers: names of the layers, in any order.
        model: class name of the model, where the host knows it.
        head_dims: layer -> head dim, as far as known.
    """
    found: dict[str, Any] = {}
    if layers:  # a host may name its layers at their first call only
        found["layers"] = sorted(layers)
    if model is not None:
        found["model"] = model
    if head_dims:
        found["head_dims"] = {name: int(head_dims[name]) for name in sorted(head_dims)}
    return found


def mismatch(expected: Mapping[str, Any] | None, found: Mapping[str, Any]) -> str | None:
    """Why a plan with fingerprint ``expected`` doesn't belong to the model ``found``, or None.

    Only what both sides know is compared.
    """
    if not expected:
        return None
    if expected.get("model") and found.get("model") and expected["model"] != found["model"]:
        return f"it was made for {expected['model']}, this is {found['model']}"
    if expected.get("layers") is not None and found.get("layers") is not None:
        wanted, here = set(expected["layers"]), set(found["layers"])
        new = sorted(here - wanted)
        # A module's second attention may be named at its first call only, after its module.
        missing = sorted(name for name in wanted - here if not name.startswith(tuple(here)))
        if missing or new:
            parts = []
            if missing:
                parts.append(f"{len(missing)} of its layers are not here ({missing[0]} ..)")
            if new:
                parts.append(f"{len(new)} layers here are unknown to it ({new[0]} ..)")
            return "; ".join(parts)
    dims, here_dims = expected.get("head_dims") or {}, found.get("head_dims") or {}
    for name in sorted(set(dims) & set(here_dims)):
        if dims[name] != here_dims[name]:
            return f"{name} has head dim {here_dims[name]}, the plan expects {dims[name]}"
    return None
