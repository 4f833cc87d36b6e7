"""``sage-diffusion cost``: predicted bounds of kernels, from their machine code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout
from sage_diffusion.speed.gpus import GPUS

if TYPE_CHECKING:
    from rich.table import Table

    from sage_diffusion.speed.cost import KernelCost

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

#: Of the calls whose times are given.
CALL_HEADS = 24


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
    tokens: Annotated[
        int,
        typer.Option(
            help=f"Of the calls of {CALL_HEADS} heads whose times are given, quantization and "
            "launches included.",
            min=1,
        ),
    ] = 4608,
    latent_dim: Annotated[
        Optional[list[int]],
        typer.Option(
            help="The nearest-code search of VQ tokenizers for latents of this dim, instead of "
            "attention. Repeatable.",
            min=1,
            max=2048,
        ),
    ] = None,
    kv: Annotated[
        bool,
        typer.Option(
            "--kv",
            help="Decode attention on packed keys and values, beside a cache in bfloat16, instead "
            "of attention. Of the other options only --gpu counts.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predicted bounds of the kernels on cards that need not be there (no GPU is used).

    Cycles of one SM per 262,144 multiply-accumulates in the slowest pipe: lower is faster, and the
    further the second pipe stays below the first, the closer a real card comes. A call is more than
    its main loop, the more so the shorter it is.
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
    if kv:
        _packed_past(gpus, as_json)
        return
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
    calls = {} if latent_dim else {row: row.call_milliseconds(tokens, CALL_HEADS) for row in ours}
    rows = []
    for row in (*ours, *theirs):
        rows.append(row.as_dict())
        if row in calls:
            loop, call = (round(time, 5) for time in calls[row])
            rows[-1] |= {"tokens": tokens, "loop_milliseconds": loop, "call_milliseconds": call}
    emit(as_json, {"kernels": rows}, *_tables(ours, theirs, gpus, calls, tokens), *without)


def _tables(
    ours: list[KernelCost],
    theirs: list[KernelCost],
    gpus: tuple[str, ...],
    calls: dict[KernelCost, tuple[float, float]],
    tokens: int,
) -> list[Table]:
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
    whole = (f"call ms, {tokens:,} tokens", "call / loop") if calls else ()
    found = table(
        "Predicted bounds (cycles of one SM per 262,144 multiply-accumulates)",
        *("spills", *whole, *beyond),
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
        loop, call = calls.get(row, (0.0, 0.0))
        timed = (f"{call:.3f}", f"{call / loop:.2f}") if loop else ()
        found.add_row(*cells(row), str(row.spills), *timed, *compared)
    rest = [row for row in theirs if row not in shown]
    if not rest:
        return [found]
    others = table("Of others, with no kernel of ours beside them", "spills", "of", "name")
    for row in sorted(rest, key=lambda r: (gpus.index(r.gpu), r.head_dim or 0)):
        name = row.kernel if len(row.kernel) <= 40 else f"{row.kernel[:37]}..."
        others.add_row(*cells(row), str(row.spills), row.package, name)
    return [found, others] if ours else [others]


def _packed_past(gpus: tuple[str, ...], as_json: bool) -> None:
    """The document and tables of ``--kv``; cards without a kernel are named."""
    from rich import box
    from rich.table import Table

    from sage_diffusion.kv.cost import DIM, GROUP, HEADS, DecodeCost, decode_costs, rope_costs
    from sage_diffusion.speed.cost import NoKernelError

    rows: list[DecodeCost] = []
    without: list[str] = []
    with quiet_stdout(), progress() as bar:
        task = bar.add_task("compile", total=len(gpus))
        for name in gpus:
            bar.update(task, description=name)
            try:
                rows += decode_costs((name,))
            except NoKernelError as error:
                without.append(str(error))
            bar.advance(task)
    if not rows:
        raise CommandError("; ".join(without))
    table = Table(
        title=f"Predicted bounds of one decode step: {HEADS} KV heads, {GROUP} query heads of "
        f"each, {DIM} channels (microseconds, and times as fast as bfloat16)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("GPU", "bits", "tokens", "instructions", "bound", "registers", "spills"):
        table.add_column(heading, justify="left" if heading in ("GPU", "bound") else "right")
    for heading in ("us <=", "bf16 us", "times"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.gpu,
            f"{row.bits:g}",
            f"{row.length:,}",
            f"{row.instructions:.2f}",
            row.bound,
            str(row.registers),
            str(row.spills),
            f"{row.microseconds:.1f}",
            f"{row.bf16:.1f}",
            f"{row.ratio:.2f}",
        )
    rotated = rope_costs(rows)
    second = Table(
        title="Keys before RoPE at 65,536 tokens: turned in the Triton kernel (machine code), "
        "or through a scratch of one layer, estimated (microseconds)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    headings = ("GPU", "bits", "rows of Q", "instructions", "in the kernel", "scratch", "faster")
    for heading in headings:
        second.add_column(heading, justify="right")
    for one in rotated:
        times = (f"{one.instructions:.1f}", f"{one.kernel:.1f}", f"{one.scratch:.1f}")
        figures = (*times, one.faster)
        second.add_row(one.gpu, f"{one.bits:g}", str(one.rows), *figures)
    document = {
        "decode": [row.as_dict() for row in rows],
        "rope": [one._asdict() for one in rotated],
    }
    emit(as_json, document, table, second, *without)
