"""``sage-diffusion doctor``: what this machine can run, and why not the rest."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit


def doctor(
    head_dim: Annotated[int, typer.Option(help="Head dim of the calls asked about.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Their number of tokens.", min=1)] = 4096,
    device: Annotated[
        Optional[str],  # noqa: UP045 (typer reads it on Python 3.10)
        typer.Option(help="Ask about this device. [default: the GPU where there is one]"),
    ] = None,
    card: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Only what the presets are on a card that need not be here, e.g. rtx4090."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Versions, devices, presets, and every backend's answer to every spec of the ladder."""
    from rich.table import Table

    from sage_diffusion.adapt.presets import PRESETS, card_preset, describe_preset
    from sage_diffusion.kernels.spec import LADDER

    if card is not None:
        if device is not None:
            raise CommandError("give --card or --device, not both")
        lines = [describe_preset(name, card_preset(name, card), card) for name in PRESETS]
        emit(as_json, {"card": card, "presets": lines}, *lines)
        return
    document = diagnose(head_dim, tokens, device)
    versions = Table(title="This machine", title_justify="left", show_header=False)
    for key, value in document["environment"].items():
        versions.add_row(key, value)
    for gpu in document["devices"]:
        versions.add_row("gpu", f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB")
        versions.add_row("", "\n".join(gpu["verdicts"]))
    table = Table(
        title=f"Backends on {document['device']} (head_dim {head_dim}, {tokens} tokens)",
        title_justify="left",
        caption="auto: what backend='auto' takes; yes: can run it when named",
        caption_justify="left",
    )
    table.add_column("spec")
    names = [backend["name"] for backend in document["backends"]]
    for name in names:
        table.add_column(name)
    for spec in LADDER:
        answers = document["specs"][spec]
        cells = []
        for name in names:
            refused = answers["refusals"][name] is not None
            cells.append("-" if refused else "auto" if name == answers["auto"] else "yes")
        table.add_row(spec, *cells)
    reasons = Table(title="Why not", title_justify="left", show_lines=False)
    for heading in ("backend", "specs", "reason"):
        reasons.add_column(heading)
    for name in names:
        grouped: dict[str, list[str]] = {}
        for spec in LADDER:
            reason = document["specs"][spec]["refusals"][name]
            if reason is not None:
                grouped.setdefault(reason, []).append(spec)
        for reason, specs in grouped.items():
            listed = "all" if len(specs) == len(LADDER) else ", ".join(specs)
            reasons.add_row(name, listed, reason)
    todo = [f"to do: {line}" for line in document["problems"]]
    advice = [f"preset {line}" for line in document["presets"]]
    emit(as_json, document, *todo, versions, *advice, table, reasons)


def diagnose(head_dim: int, tokens: int, device: str | None = None) -> dict[str, Any]:
    """The answers as plain data."""
    import torch

    from sage_diffusion.adapt.presets import PRESETS, describe_preset, preset, this_card
    from sage_diffusion.attend import backends
    from sage_diffusion.machine import environment, version

    gpu = torch.cuda.is_available()
    target = torch.device(device or ("cuda" if gpu else "cpu"))
    if target.type == "cuda" and not gpu:
        raise ValueError("torch sees no CUDA or ROCm device here")
    comfy = version("comfyui") or version("comfyui-frontend-package")
    found = environment(comfyui=comfy or "not installed")
    for name in ("triton", "diffusers"):
        found.setdefault(name, "not installed")
    return {
        "environment": found,
        "problems": backends.problems(),
        "devices": [_gpu(i) for i in range(torch.cuda.device_count())] if gpu else [],
        "device": str(target),
        "presets": [
            describe_preset(name, preset(name, str(target)), this_card(target)) for name in PRESETS
        ],
        "backends": [{"name": b.name, "describes": b.describes} for b in backends.BACKENDS],
        "specs": {
            name: answer._asdict()
            for name, answer in backends.answers(target, head_dim, tokens).items()
        },
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from sage_diffusion.attend import verdicts
    from sage_diffusion.machine import device_arch

    properties = torch.cuda.get_device_properties(index)
    capability, hip_arch = device_arch(torch.device("cuda", index))
    architecture = hip_arch or (f"sm_{capability[0]}{capability[1]}" if capability else "unknown")
    return {
        "name": properties.name,
        "architecture": architecture,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "verdicts": verdicts.describe(properties.name),
    }
