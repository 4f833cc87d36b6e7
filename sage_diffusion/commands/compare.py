"""``sage-diffusion compare``: what plans cost on any diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, quiet_stdout
from sage_diffusion.commands.options import (
    PLAN_HELP,
    call_arguments,
    check_names,
    parse_option,
    read_plan,
)

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)


def compare(
    model: Annotated[
        str, typer.Argument(help='A diffusers pipeline: a folder, a hub name, or "bundled".')
    ],
    spec: Annotated[
        Optional[list[str]], typer.Option(help="Spec such as int8/fp8, repeatable.")
    ] = None,
    plan: Annotated[
        Optional[list[Path]], typer.Option(help=f"Plan, repeatable: {PLAN_HELP}.")
    ] = None,
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(help="Prompt, or class of a class-conditional model, repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 20,
    seed: Annotated[Optional[list[int]], typer.Option(help="Repeatable. [default: 0]")] = None,
    option: Annotated[
        Optional[list[str]],
        typer.Option("--set", help="Argument of the pipeline, NAME=JSON, e.g. height=512."),
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Query rows compared per attention call; 0 is all.", min=0)
    ] = 256,
    backend: Annotated[str, typer.Option(help="Backend by name.")] = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a call can't run as planned.")
    ] = False,
    guard: Annotated[
        int,
        typer.Option(
            help="Check every layer's drift every so many steps and step those up that stray; "
            "0 is never.",
            min=0,
        ),
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the reports.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Run a pipeline in FP16 and with every spec and plan on the same seeds, and report.

    Writes report.json, .md and .html of the last plan (specs come first), report-NAME.* of the
    others, grid.png, heatmap.png and plan.json.
    """
    from sage_diffusion.attend.guard import Guard
    from sage_diffusion.commands.side_by_side import (
        document,
        run_side_by_side,
        stepped_up,
        variant_table,
        write_files,
    )
    from sage_diffusion.plan import PrecisionPlan

    plans = [(name, PrecisionPlan.of(name)) for name in spec or ()]
    plans += [(path.stem, read_plan(path)) for path in plan or ()]
    if not plans:
        raise CommandError("give at least one --spec or --plan to compare with fp16")
    extra = dict(parse_option(text) for text in option or ())
    with quiet_stdout():
        from sage_diffusion.integrations.diffusers.pipelines import PipelineRun, load_pipeline

        pipe = load_pipeline(model)
        arguments, labels = call_arguments(pipe, list(prompt or ()), steps)
        check_names(pipe, extra)
        result = run_side_by_side(
            PipelineRun(pipe, tuple(seed or (0,)), arguments | extra, labels),
            plans,
            backend=backend,
            strict=strict,
            guard=Guard(every=guard),
            rows=rows or None,
        )
        files, notes = write_files(result, out)
    for name, layers in stepped_up(result).items():
        notes += [f"{name}: {layer} stepped up: {'; '.join(why)}" for layer, why in layers.items()]
    data = document(result, files, notes)
    emit(as_json, data, variant_table(result.reports), *notes, f"report: {out / 'report.html'}")
