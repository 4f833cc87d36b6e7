"""``sage-diffusion bench``: speed and accuracy of every spec and backend, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout
from sage_diffusion.files import write_bytes, write_text
from sage_diffusion.speed.gpus import GPUS

if TYPE_CHECKING:
    from rich.table import Table

    from sage_diffusion.speed.bench import Result, Row

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)


def bench(
    spec: Annotated[
        Optional[list[str]],
        typer.Option(help="Spec, repeatable. [default: the ladder]"),
    ] = None,
    length: Annotated[
        Optional[list[int]],
        typer.Option(help="Tokens, repeatable. [default: 1024 to 131072]", min=1),
    ] = None,
    head_dim: Annotated[
        Optional[list[int]],
        typer.Option(help="Head dim, repeatable. [default: 64 and 128]", min=1, max=256),
    ] = None,
    heads: Annotated[int, typer.Option(help="Heads of Q, K and V.", min=1)] = 24,
    batch: Annotated[int, typer.Option(help="Batch size.", min=1)] = 1,
    causal: Annotated[bool, typer.Option("--causal", help="Causal attention.")] = False,
    backend: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Backend as doctor lists them, or sdpa-flash, sdpa-cudnn, sdpa-efficient; "
            "repeatable. [default: all but sdpa and reference]"
        ),
    ] = None,
    gpu: Annotated[
        Optional[str],
        typer.Option(
            help=f"Predict the bounds of this card instead: {', '.join(GPUS)}. "
            "[default without a GPU: rtx4090]"
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(help="Write bench.json and bench.png into this folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Milliseconds, TOPS, memory and accuracy of every spec on every backend.

    On a GPU it measures, quantization included.  Without one, or with --gpu, it prints predicted
    bounds of the attention kernels, which are no timings.
    """
    import torch

    from sage_diffusion.speed.bench import (
        DEFAULT_HEAD_DIMS,
        DEFAULT_LENGTHS,
        MEASURED,
        PREDICTED,
        contestants,
        default_names,
        default_specs,
        measure,
    )
    from sage_diffusion.speed.bench_report import NOTES, document, plot, predict
    from sage_diffusion.speed.timing import find_card

    names = tuple(backend or default_names())
    shapes: dict[str, Any] = {
        "lengths": tuple(length or DEFAULT_LENGTHS),
        "head_dims": tuple(head_dim or DEFAULT_HEAD_DIMS),
        "batch": batch,
        "heads": heads,
        "is_causal": causal,
    }
    specs = tuple(spec or default_specs())
    here = find_card() if gpu is None else None
    with quiet_stdout(), progress() as bar:
        task = bar.add_task("bench", total=None)

        def tell(row: Row) -> None:
            bar.update(task, description=f"{row.spec} {row.backend} {row.length}", advance=1)

        if here is not None:
            card, label = here.name, MEASURED
            entrants = contestants(specs, names)
            with torch.inference_mode():
                result = measure(entrants, here.timer, device=here.device, tell=tell, **shapes)
        else:
            card, label = gpu or "rtx4090", PREDICTED
            result = predict(specs, names, card, tell=tell, **shapes)
    if not result.rows:
        reasons = "; ".join(f"{s} on {b}: {why}" for (s, b, _), why in result.refused.items())
        raise CommandError(f"nothing to benchmark: {reasons or 'no backend computes the specs'}")
    report = document(result, label=label, gpu=card, batch=batch, heads=heads, is_causal=causal)
    if out is not None:
        write_text(out / "bench.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
        if any(row.tops is not None for row in result.rows):
            write_bytes(out / "bench.png", plot(result.rows, f"{card}: {title(label, causal)}"))
    emit(as_json, report, *tables(result, f"{card}: {title(label, causal)}", NOTES[label]))


def title(label: str, causal: bool) -> str:
    """Of the table and of the plot."""
    return f"attention{', causal' if causal else ''} ({label})"


def tables(result: Result, heading: str, note: str) -> tuple[Table, ...]:
    """The rows, and below them who was refused and why."""
    from rich import box
    from rich.table import Table

    from sage_diffusion.speed.bench import PREDICTED

    rows = Table(title=heading, caption=note, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("spec", "backend"):
        rows.add_column(name, no_wrap=True)
    bound = any(row.status == PREDICTED for row in result.rows)
    figures = ("ms >=", "TOPS <=", "call ms") if bound else ("ms", "TOPS", "host ms")
    for name in ("head dim", "tokens", *figures, "MiB", "relative L1"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("status")
    for row in sorted(result.rows, key=lambda r: (r.head_dim, r.length)):
        last = row.call_milliseconds if bound else row.host_milliseconds
        rows.add_row(
            row.spec,
            row.backend,
            str(row.head_dim),
            str(row.length),
            "-" if row.milliseconds is None else f"{row.milliseconds:.3f}",
            "-" if row.tops is None else f"{row.tops:.0f}",
            "-" if last is None else f"{last:.3f}",
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            "-" if row.relative_l1 is None else f"{row.relative_l1:.4f}",
            f"{row.status}: {row.reason}" if row.reason else row.status,
        )
    if not result.refused:
        return (rows,)
    refused = Table(title="Refused", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("backend", "reason", "specs"):
        refused.add_column(name)
    grouped: dict[tuple[str, str], list[str]] = {}
    for (spec, backend, _), reason in result.refused.items():
        specs = grouped.setdefault((backend, reason), [])
        if spec not in specs:
            specs.append(spec)
    for (backend, reason), specs in grouped.items():
        refused.add_row(backend, reason, ", ".join(specs))
    return rows, refused
