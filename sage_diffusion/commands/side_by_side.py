"""Several plans against one FP16 run, and the folder of files that shows the result."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage_diffusion.commands.common import progress

if TYPE_CHECKING:
    from rich.table import Table

    from sage_diffusion.accuracy.compare import Generation
    from sage_diffusion.accuracy.report import AccuracyReport
    from sage_diffusion.attend.guard import Guard
    from sage_diffusion.integrations.diffusers.pipelines import PipelineRun
    from sage_diffusion.plan import PrecisionPlan


@dataclass(frozen=True)
class SideBySide:
    """Reports of several plans, each with the table of all, and what every run made."""

    exact: Generation
    reports: tuple[AccuracyReport, ...]
    made: tuple[Generation, ...]


def run_side_by_side(
    run: PipelineRun,
    plans: Sequence[tuple[str, PrecisionPlan]],
    *,
    begun: SideBySide | None = None,
    backend: str = "auto",
    strict: bool = False,
    guard: Guard | None = None,
    rows: int | None = None,
) -> SideBySide:
    """Sample once in FP16 and once per (name, plan), on the same seeds.

    ``begun``: what an earlier call with the same run made; its FP16 run and plans come first.
    """
    from sage_diffusion.accuracy.compare import compare_with, reference_run

    steps = run.arguments.get("num_inference_steps")
    total = None if steps is None else steps * len(run.seeds)
    reports = list(begun.reports) if begun else []
    made = list(begun.made) if begun else []
    with progress() as bar:

        @contextlib.contextmanager
        def task(name: str) -> Iterator[PipelineRun]:
            number = bar.add_task(name, total=total)
            yield replace(run, on_step=lambda: bar.advance(number))

        if begun:
            exact = begun.exact
        else:
            with task("fp16") as advancing:
                exact = reference_run(advancing)
        for name, plan in plans:
            with task(name) as advancing:
                report, images = compare_with(
                    advancing,
                    plan,
                    exact,
                    name=name,
                    backend=backend,
                    strict=strict,
                    guard=guard,
                    rows=rows,
                )
            reports.append(report)
            made.append(images)
    variants = tuple(report.variant() for report in reports)
    return SideBySide(
        exact, tuple(replace(report, variants=variants) for report in reports), tuple(made)
    )


def write_grid(result: SideBySide, out: Path) -> list[Path]:
    """``grid.png`` of all runs so far; no file where the host makes no such pictures."""
    from sage_diffusion.accuracy.pictures import grid_png
    from sage_diffusion.files import write_bytes

    if result.exact.images is None or result.exact.images.shape[1] not in (1, 3):
        return []
    runs = [("fp16", result.exact.images)]
    for report, made in zip(result.reports, result.made, strict=True):
        if made.images is not None:
            runs.append((report.name, made.images))
    shown = [(name, images[:8]) for name, images in runs]
    write_bytes(out / "grid.png", grid_png(shown, result.exact.labels[:8]))
    return [out / "grid.png"]


def write_files(result: SideBySide, out: Path) -> tuple[list[Path], list[str]]:
    """Write reports, plan, grid and heat map; ``report.*`` and ``plan.json`` are the last plan's.

    Returns:
        The files, and a note for each that could not be written.
    """
    files: list[Path] = []
    notes: list[str] = []
    *others, main = result.reports
    files += main.save(out, "report")
    for report in others:
        files += report.save(out, f"report-{slug(report.name)}")
    if main.plan is not None:
        main.plan.save(out / "plan.json")
        files.append(out / "plan.json")
    files += write_grid(result, out)
    if main.quantized:
        try:
            main.heatmap_png(out / "heatmap.png")
            files.append(out / "heatmap.png")
        except ImportError as error:
            notes.append(str(error))
    return files, notes


def slug(name: str) -> str:
    """A file name's part of a plan's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "plan"


def variant_table(reports: Sequence[AccuracyReport]) -> Table:
    """The plans side by side, for a terminal."""
    from rich.table import Table

    from sage_diffusion.accuracy.render import number, shares

    table = Table(title="Against FP16, same seeds", title_justify="left")
    table.add_column("plan")
    for heading in ("PSNR dB", "SSIM", "latent cosine", "mean L1"):
        table.add_column(heading, justify="right")
    table.add_column("attention calls")
    for report in reports:
        variant = report.variant()
        table.add_row(
            variant.name,
            number(variant.psnr, 2),
            number(variant.ssim),
            number(variant.latent_cosine, 5),
            number(variant.rel_l1),
            shares(variant.specs),
        )
    return table


def stepped_up(result: SideBySide) -> dict[str, dict[str, list[str]]]:
    """plan -> layer -> why the guard gave it a more accurate spec."""
    return {
        report.name: {
            layer["name"]: layer["stepped_up"]
            for layer in report.summary["layers"]
            if layer["stepped_up"]
        }
        for report in result.reports
        if report.summary is not None
    }


def document(result: SideBySide, files: Sequence[Path], notes: Sequence[str]) -> dict[str, Any]:
    """The outcome as plain data for ``--json``."""
    from sage_diffusion.accuracy.report_json import variant_to_dict

    return {
        "variants": [variant_to_dict(report.variant()) for report in result.reports],
        "fell_back": {
            report.name: report.summary["declined"]
            for report in result.reports
            if report.summary is not None
        },
        "stepped_up": stepped_up(result),
        "environment": dict(result.reports[-1].environment),
        "files": [str(path) for path in files],
        "notes": list(notes),
    }
