"""Verify the kernels from within ComfyUI, in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from sage_diffusion.attend import verdicts
from sage_diffusion.machine import card_name


def last_verdict(device: str) -> str:
    """What is known of the kernels on a card."""
    card = card_name(torch.device(device))
    if card is None:
        return "No GPU here: there is no kernel to verify."
    return "\n".join([card, *verdicts.describe(card)])


def verify_now(
    device: str,
    tell: Callable[[str], None] = lambda text: None,
    check: Callable[[], object] = lambda: None,
) -> str:
    """Run every kernel of the card against its twin, and store the verdicts.

    Args:
        device: "cuda:0".
        tell: told what is going on.
        check: called between two kernels; may raise to end it.

    Raises:
        PlaceError: there is no card that can be used.
    """
    from sage_diffusion.verify import kernels, procedure, record, run, text

    place = procedure.ready_card(device)
    chosen, refused = kernels.find(place)
    if not chosen:
        return "\n".join([place.name, *(f"{name}: {why}" for name, why in refused.items())])
    tell(f"compiling {len(chosen)} kernels")
    procedure.compile_ahead(place, chosen, min(os.cpu_count() or 1, 16))
    found: list[run.Verdict] = []
    for number, some in enumerate(procedure.verdicts(place, chosen), 1):
        check()
        found += some
        tell(f"{number} of {len(chosen)}: {some[0].kernel} {some[0].status}")
    found = run.combine(found, chosen)
    try:
        note = f"stored in {record.remember(place, found, chosen)}"
    except (verdicts.VerdictError, OSError) as error:
        note = f"the verdicts were not stored: {error}"
    return "\n".join([*text.verdict_lines(f"{place.name}, {place.arch}", found), "", note])
