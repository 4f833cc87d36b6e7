"""``sage-diffusion verify``: are the kernels right and fast on the card that is here?"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sage_diffusion.commands.common import CommandError, progress, quiet_stdout
from sage_diffusion.files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sage_diffusion.verify.kernels import Kernel
    from sage_diffusion.verify.places import Place
    from sage_diffusion.verify.run import Verdict

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)


def verify(
    spec: Annotated[
        Optional[list[str]],
        typer.Option(help="Spec, repeatable. [default: the ladder and fp8/fp8]"),
    ] = None,
    backend: Annotated[
        Optional[list[str]],
        typer.Option(help="Backend with kernels of ours, repeatable. [default: all]"),
    ] = None,
    device: Annotated[
        Optional[str], typer.Option(help="Which card, cuda:1. [default: the current one]")
    ] = None,
    jobs: Annotated[
        Optional[int],
        typer.Option(help="Processes that compile. [default: one a core, at most 16]", min=1),
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Time what is right too.")
    ] = True,
    emulate: Annotated[
        Optional[str],
        typer.Option(help="In a checkout, run on an emulated card: sm_80, 86, 89, 90 or 120."),
    ] = None,
    json_file: Annotated[
        Optional[Path],
        typer.Option("--json", help="Write everything into this file, which names no one."),
    ] = None,
) -> None:
    """Run every kernel of this card against its twin and float64, time it, and say a verdict.

    backend="auto" leaves out what is found wrong, until the driver, PyTorch,
    Triton or this package change.  Exit code 1 if any kernel is not right.
    """
    from sage_diffusion.verify import kernels as known
    from sage_diffusion.verify import packed_past, places, procedure, record, run, text

    began = time.monotonic()
    if emulate is not None and device is not None:
        raise CommandError("--emulate takes no --device")
    with quiet_stdout(), progress() as bar:
        place = places.emulated(emulate) if emulate else procedure.ready_card(device)
        chosen, refused = known.find(place, tuple(spec or ()), tuple(backend or ()))
        if not chosen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise CommandError(f"no kernel for {place.name}: {reasons}")
        task = bar.add_task("compile", total=len(chosen))
        procedure.compile_ahead(place, chosen, jobs or min(os.cpu_count() or 1, 16))
        found: list[Verdict] = []
        for kernel, verdicts in zip(chosen, procedure.verdicts(place, chosen), strict=True):
            found += verdicts
            bar.update(task, description=kernel.name, advance=1)
        found = run.combine(found, chosen)
        if not spec and not backend:  # all kernels
            bar.update(task, description="packed past")
            found += packed_past.verify(place)
        bar.update(task, description="times")
        timed = procedure.times(place, chosen, found) if timing else []
    lines = [*text.verdict_lines(f"{place.name}, {place.arch}", found), *text.time_lines(timed)]
    typer.echo("\n".join(lines))
    if emulate is None:
        typer.echo(_remembered(place, found, chosen))
    if json_file is not None:
        seconds = time.monotonic() - began
        rows = [row.as_dict() for row in timed]
        document = record.document(place, found, refused, rows, seconds)
        write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n")
        typer.echo(f"Wrote {json_file}")
    if any(verdict.status not in ("right", "not run") for verdict in found):
        raise typer.Exit(1)


def _remembered(place: Place, found: Iterable[Verdict], chosen: Iterable[Kernel]) -> str:
    """Store the verdicts, and a line about it."""
    from sage_diffusion.attend.verdicts import VerdictError
    from sage_diffusion.verify import record

    try:
        path = record.remember(place, found, chosen)
    except (VerdictError, OSError) as error:
        return f"The verdicts were not stored, backend='auto' knows nothing of them: {error}"
    return f"Verdicts stored in {path}"
