"""``sage-diffusion cost``: predicted bounds of kernels, from their machine code."""

from __future__ import annotations

from typing import Annotated, Optional

import typer
from rich import box
from rich.table import Table

from sage_diffusion.commands.common import AsJson, CommandError, emit, quiet_stdout
from sage_diffusion.cost import CostError, KernelCost, kernel_costs, peer_costs
from sage_diffusion.cost_sass import GPUS
from sage_diffusion.kernels.spec import LADDER


def cost(
    gpu: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer reads it on Python 3.10)
        typer.Option(help=f"Card, repeatable: {', '.join(GPUS)}. [default: rtx4090]"),
    ] = None,
    spec: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Spec, repeatable, e.g. int4/fp8-fast. [default: the ladder]"),
    ] = None,
    head_dim: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Head dim, repeatable. [default: 64 and 128]", min=1, max=256),
    ] = None,
    against: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Also a cubin, shared library or wheel by path, or an installed package "
            "(comfy_kitchen). Read, never executed. Repeatable."
        ),
    ] = None,
    match: Annotated[str, typer.Option(help="Part of the names of --against's kernels.")] = "",
    mask: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Our kernels with a mask: bool or additive."),
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Our kernels, causal.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predicted bounds of the kernels on cards that need not be there (no GPU is used).

    Cycles of one SM per 262,144 multiply-accumulates in the slowest pipe: lower is faster, and the
    further the second pipe stays below the first, the closer a real card comes.
    """
    gpus = tuple(gpu or ("rtx4090",))
    dims = tuple(head_dim or (64, 128))
    if mask not in (None, "bool", "additive"):
        raise CommandError(f"mask must be bool or additive, got {mask!r}")
    rows: list[KernelCost] = []
    with quiet_stdout():
        for name in gpus:
            try:
                rows += kernel_costs((name,), spec or LADDER, dims, mask=mask, is_causal=causal)
            except CostError:
                if not against:
                    raise
        for target in against or ():
            rows += peer_costs(target, gpus, dims, match)
    emit(as_json, {"kernels": [row.as_dict() for row in rows]}, _table(rows))


def _table(rows: list[KernelCost]) -> Table:
    table = Table(
        title="Predicted bounds (cycles of one SM per 262,144 multiply-accumulates)",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("GPU", "kernel", "head dim"):
        table.add_column(heading, no_wrap=True)
    for heading in ("cycles", "bound", "second pipe", "TOPS <=", "registers", "spills"):
        table.add_column(heading, justify="right", no_wrap=True)
    order = list(GPUS)
    for row in sorted(rows, key=lambda r: (order.index(r.gpu), r.head_dim or 0)):
        table.add_row(
            row.gpu,
            row.spec if row.head_dim is not None else f"{row.spec} {row.kernel[:40]}",
            "?" if row.head_dim is None else str(row.head_dim),
            f"{row.cycles:.0f}",
            row.bound,
            f"{row.second_pipe} {row.second:.2f}",
            f"{row.tops:.0f}",
            str(row.registers),
            str(row.spills),
        )
    return table
