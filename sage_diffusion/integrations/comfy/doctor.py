"""What a machine can run, and why not the rest, in plain text."""

from __future__ import annotations

import torch

from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.integrations.comfy.presets import PRESETS, preset
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.machine import device_arch, environment


def answers(
    device: str, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, mask: str | None = None
) -> dict[str, dict[str, str | None]]:
    """Spec -> backend -> None where it runs such a call, else the reason why not."""
    where = torch.device(device)
    capability, hip_arch = device_arch(where)
    shape = (1, 24, 4096, head_dim)
    found = {}
    for name in LADDER:
        spec = AttentionSpec.parse(name)
        call = AttentionCall(
            shape, shape, dtype, where.type, capability, hip_arch, mask, False, False, spec
        )
        found[name] = backends.refusals(call)
    return found


def diagnosis(device: str, **call: object) -> str:
    """The text of Sage Doctor: versions, every spec's backend, presets, and the refusals."""
    found = answers(device, **call)  # type: ignore[arg-type]
    lines = [f"{name}: {value}" for name, value in environment().items()]
    where = torch.device(device)
    capability, hip_arch = device_arch(where)
    if capability is not None:
        lines.append(f"architecture: sm_{capability[0]}{capability[1]}")
    if hip_arch is not None:
        lines.append(f"architecture: {hip_arch}")
    lines.append("")
    lines.append("spec            runs on")
    reasons: dict[str, dict[str, list[str]]] = {}
    for spec, by_backend in found.items():
        able = [name for name, reason in by_backend.items() if reason is None]
        lines.append(f"{spec:<15} {able[0] if able else 'nothing'}")
        for backend, reason in by_backend.items():
            if reason is not None:
                reasons.setdefault(backend, {}).setdefault(reason, []).append(spec)
    lines.append("")
    for name, chosen in PRESETS.items():
        plan = preset(name, device)
        specs = ", ".join(dict.fromkeys(str(rule.spec) for rule in plan.rules))
        lines.append(f"preset {name}: {specs} ({chosen.describes})")
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
