"""``sage-diffusion cost``: predicted bounds of kernels, from their machine code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout
from sage_diffusion.speed.cost_sass import GPUS

if TYPE_CHECKING:
    from rich.table import Table

    from sage_diffusion.speed.cost import KernelCost

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)


def cost(
    gpu: Annotated[
        Optional[list[str]],
        typer.Option(help=f"Card, repeatable: {', '.join(GPUS)}. [default: all of them]"),
    ] = None,
    spec: Annotated[
        Optional[list[str]],
        typer.Option(help="Spec, repeatable, e.g. int4/fp8-fast. [default: the ladder]"),
    ] = None,
    head_dim: Annotated[
        Optional[list[int]],
        typer.Option(help="Head dim, repeatable. [default: 64 and 128]", min=1, max=256),
    ] = None,
    against: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Put other kernels beside ours: a cubin, shared library or wheel by path, or a "
            "package by name (comfy_kitchen), installed or as a wheel. Read, never executed. "
            "Repeatable."
        ),
    ] = None,
    wheels: Annotated[
        Optional[Path],
        typer.Option(help="Folder of wheels for --against. [default: the user's cache]"),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a wheel that is not in that folder, with pip.")
    ] = False,
    match: Annotated[str, typer.Option(help="Part of the names of --against's kernels.")] = "",
    mask: Annotated[
        Optional[str], typer.Option(help="Our kernels with a mask: bool or additive.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Our kernels, causal.")] = False,
    latent_dim: Annotated[
        Optional[list[int]],
        typer.Option(
            help="The nearest-code search of VQ tokenizers for latents of this dim, instead of "
            "attention. Repeatable.",
            min=1,
            max=2048,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predicted bounds of the kernels on cards that need not be there (no GPU is used).

    Cycles of one SM per 262,144 multiply-accumulates in the slowest pipe: lower is faster, and the
    further the second pipe stays below the first, the closer a real card comes.
    """
    from sage_diffusion.kernels.spec import LADDER
    from sage_diffusion.speed.cost import NoKernelError, gpu_named, kernel_costs, library_costs
    from sage_diffusion.vq.cost import search_costs

    gpus = tuple(dict.fromkeys(gpu or GPUS))
    for name in gpus:
        gpu_named(name)
    dims = tuple(dict.fromkeys(head_dim or (64, 128)))
    if mask not in (None, "bool", "additive"):
        raise CommandError(f"mask must be bool or additive, got {mask!r}")
    if not against and (wheels or download or match):
        raise CommandError("--wheels, --download and --match need --against")
    theirs: list[KernelCost] = []
    ours: list[KernelCost] = []
    without: list[str] = []
    with quiet_stdout(), progress() as bar:
        task = bar.add_task("read", total=len(against or ()) + len(gpus))
        for target in against or ():
            bar.update(task, description=target[-24:])
            theirs += library_costs(target, gpus, dims, match, wheels=wheels, download=download)
            bar.advance(task)
        for name in gpus:
            bar.update(task, description=name)
            try:
                ours += (
                    search_costs((name,), latent_dim)
                    if latent_dim
                    else kernel_costs((name,), spec or LADDER, dims, mask=mask, is_causal=causal)
                )
            except NoKernelError as error:
                without.append(str(error))
            bar.advance(task)
    if without and not ours and not theirs:
        raise CommandError("; ".join(without))
    document = {"kernels": [row.as_dict() for row in (*ours, *theirs)]}
    emit(as_json, document, *_tables(ours, theirs, gpus), *without)


def _tables(ours: list[KernelCost], theirs: list[KernelCost], gpus: tuple[str, ...]) -> list[Table]:
    """Ours with the other packages' beside them, and below what has no counterpart."""
    from rich import box
    from rich.table import Table

    from sage_diffusion.speed.cost import beside

    def table(title: str, *right: str) -> Table:
        new = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("GPU", "head dim", "kernel"):
            new.add_column(heading, no_wrap=True)
        for heading in (*("cycles", "bound", "second pipe", "TOPS <=", "registers"), *right):
            new.add_column(heading, justify="right", no_wrap=True)
        return new

    def cells(row: KernelCost) -> list[str]:
        second = f"{row.second_pipe} {row.second:.2f}"
        figures = [f"{row.cycles:.0f}", row.bound, second, f"{row.tops:.0f}", str(row.registers)]
        return [row.gpu, "?" if row.head_dim is None else str(row.head_dim), row.spec, *figures]

    packages = list(dict.fromkeys(row.package for row in theirs))
    beyond = [heading for package in packages for heading in (package, "its cycles / ours")]
    found = table(
        "Predicted bounds (cycles of one SM per 262,144 multiply-accumulates)", "spills", *beyond
    )
    shown = set()
    for row in sorted(ours, key=lambda r: (gpus.index(r.gpu), r.head_dim or 0)):
        compared = []
        for package in packages:
            other = beside(row, (other for other in theirs if other.package == package))
            if other is None:
                compared += ["-", "-"]
                continue
            shown.add(other)
            compared += [
                f"{other.spec} {other.cycles:.0f} {other.bound}, "
                f"{other.second_pipe} {other.second:.2f}",
                f"{other.cycles / row.cycles:.2f}",
            ]
        found.add_row(*cells(row), str(row.spills), *compared)
    rest = [row for row in theirs if row not in shown]
    if not rest:
        return [found]
    others = table("Of others, with no kernel of ours beside them", "spills", "of", "name")
    for row in sorted(rest, key=lambda r: (gpus.index(r.gpu), r.head_dim or 0)):
        name = row.kernel if len(row.kernel) <= 40 else f"{row.kernel[:37]}..."
        others.add_row(*cells(row), str(row.spills), row.package, name)
    return [found, others] if ours else [others]
