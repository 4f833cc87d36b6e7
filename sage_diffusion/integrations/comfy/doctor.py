"""What a machine can run, and why not the rest, in plain text."""

from __future__ import annotations

import torch

from sage_diffusion.adapt.presets import PRESETS, describe_preset, preset, this_card
from sage_diffusion.attend import verdicts
from sage_diffusion.attend.backends import answers, problems
from sage_diffusion.machine import card_name, device_arch, environment


def diagnosis(device: str, head_dim: int = 128, mask: str | None = None) -> str:
    """The text of Sage Doctor: versions, every spec's backend, presets, and the refusals.

    Args:
        device: of the calls asked about.
        head_dim, mask: of those calls, as in :class:`.AttentionCall`.
    """
    found = answers(device, head_dim, mask=mask)
    lines = [f"to do: {line}" for line in problems()]
    lines += [f"{name}: {value}" for name, value in environment().items()]
    where = torch.device(device)
    capability, hip_arch = device_arch(where)
    if capability is not None:
        lines.append(f"architecture: sm_{capability[0]}{capability[1]}")
    if hip_arch is not None:
        lines.append(f"architecture: {hip_arch}")
    card = card_name(where)
    if card is not None:
        lines += verdicts.describe(card)
    lines.append("")
    lines.append("spec            runs on")
    reasons: dict[str, dict[str, list[str]]] = {}
    for spec, answer in found.items():
        lines.append(f"{spec:<15} {answer.auto or 'nothing'}")
        for backend, reason in answer.refusals.items():
            if reason is not None:
                reasons.setdefault(backend, {}).setdefault(reason, []).append(spec)
    lines.append("")
    known = this_card(where)
    lines += [f"preset {describe_preset(x, preset(x, device), known)}" for x in PRESETS]
    lines.append("")
    for backend, by_reason in reasons.items():
        for reason, refused in by_reason.items():
            which = "every spec" if len(refused) == len(found) else ", ".join(refused)
            lines.append(f"{backend} can't run {which}: {reason}")
    if where.type != "cuda":
        lines.append(
            "No GPU here: quantized specs run as their Torch twin, which shows what they do to the "
            "picture and is slower than ordinary attention."
        )
    return "\n".join(lines)
