"""Families of tokenizer checkpoints, told by their keys: one file each."""

from __future__ import annotations

import importlib

from sage_diffusion.vq.families.base import Checkpoint, Family

__all__ = ["FAMILIES", "Checkpoint", "Family", "families"]

#: Modules with a ``FAMILY``, in the order in which they are asked.  Those whose network another
#: library has are integrations.  The one line that a new family adds.
FAMILIES = ("sage_diffusion.vq.families.compact", "sage_diffusion.integrations.diffusers.vq")


def families() -> tuple[Family, ...]:
    """Every family; importing them imports no other library."""
    return tuple(importlib.import_module(name).FAMILY for name in FAMILIES)
