"""Families of tokenizer checkpoints, told by their keys."""

from __future__ import annotations

import importlib

from sage_diffusion.vq.families.base import Checkpoint, Family
from sage_diffusion.vq.tokenizer import Tokenizer

__all__ = ["MODULES", "Checkpoint", "Family", "families"]

#: Modules with ``FAMILIES``, in the order in which they are asked.  Those whose network another
#: library has are integrations.  The one line that a new module adds.
MODULES = (
    "sage_diffusion.vq.families.compact",
    "sage_diffusion.integrations.diffusers.vq",
    "sage_diffusion.integrations.diffusers.vq_paella",
    "sage_diffusion.integrations.transformers.vq",
    "sage_diffusion.integrations.transformers.vq_emu3",
    "sage_diffusion.vq.families.magvit",
    "sage_diffusion.vq.families.titok",
)


def families() -> tuple[Family, ...]:
    """Every family; importing them loads no network."""
    return tuple(family for name in MODULES for family in _families(name))


def _families(module: str) -> tuple[Family, ...]:
    try:
        return importlib.import_module(module).FAMILIES
    except ImportError as error:
        reason = f"{error.name or 'a library'} is not installed"
        return (Family(module.rpartition(".")[2], lambda _: reason, _not_loaded),)


def _not_loaded(checkpoint: Checkpoint) -> Tokenizer:
    raise AssertionError("a family that refuses everything loads nothing")
