"""Reports for people: Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sage_diffusion.accuracy import charts
from sage_diffusion.accuracy.findings import Findings
from sage_diffusion.accuracy.records import Aggregate, Variant
from sage_diffusion.plan.show import table_of


def number(value: float | None, digits: int = 4) -> str:
    """A figure of a table; a dash where nothing was measured."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}f}"


def shares(specs: Mapping[str, int]) -> str:
    """``int8/fp8 30 %, int4/fp8-fast 70 %``."""
    total = sum(specs.values())
    return ", ".join(f"{spec} {n / total:.0%}" for spec, n in specs.items()) if total else "-"


def fallbacks(summary: Mapping[str, Any] | None) -> list[tuple[str, str, int]]:
    """(layer, reason, calls) of what the host had to run itself."""
    layers = [] if summary is None else summary.get("layers", [])
    return [
        (layer["name"], reason, calls)
        for layer in layers
        for reason, calls in layer["declined"].items()
    ]


def not_finite(summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(layer, steps) of non-finite outputs."""
    layers = [] if summary is None else summary.get("layers", [])
    return [
        (layer["name"], ", ".join(map(str, layer["non_finite_steps"])))
        for layer in layers
        if layer.get("non_finite_steps")
    ]


def headline(report: Findings) -> list[tuple[str, str]]:
    """The report in a few figures: (label, value)."""
    tiles = []
    end = report.end_to_end
    if end is not None and end.psnr:
        tiles.append(("PSNR against FP16", f"{number(end.mean_psnr, 1)} dB"))
    if end is not None and end.mean_ssim is not None:
        tiles.append(("SSIM", number(end.mean_ssim)))
    if end is not None and end.latent_cosine:
        tiles.append(("cosine of the final latents", number(end.final_cosine, 5)))
    if report.quantized:
        tiles.append(("mean relative L1 of a call", number(report.mean("rel_l1"))))
        worst = report.worst("cosine")
        tiles.append((f"worst cosine ({worst.layer}, step {worst.step})", number(worst.cosine)))
    total = len(report.rows)
    if total:
        share = f"{len(report.quantized) / total:.0%}"
        tiles.append((f"of {total} attention calls below 16 bit", share))
    return tiles


def markdown(report: Findings) -> str:
    """See :meth:`.AccuracyReport.to_markdown`."""
    parts = [f"# Accuracy of {report.name}"]
    parts.append("\n".join(f"- {label}: **{value}**" for label, value in headline(report)))
    parts[-1] += f"\n- calls by spec: {shares(report.specs)}"
    if report.variants:
        parts.append("## Side by side\n\n" + _table(*variant_table(report.variants)))
    end = report.end_to_end
    if end is not None and end.psnr:
        pictures = zip(end.labels, end.psnr, end.ssim, strict=True)
        cells = ((label, number(a, 2), number(b)) for label, a, b in pictures)
        parts.append("## Pictures\n\n" + _table(("picture", "PSNR dB", "SSIM"), cells))
    if report.rows:
        layers = map(aggregate_cells, report.per_layer())
        parts.append("## Layers\n\n" + _table(("layer", *AGGREGATE_HEAD), layers))
        steps = map(aggregate_cells, report.per_step())
        parts.append("## Steps\n\n" + _table(("step", *AGGREGATE_HEAD), steps))
    if report.plan is not None:
        head = ("rule", "layers", "progress", "only", "spec")
        parts.append("## Plan\n\n" + _table(head, table_of(report.plan)))
    if report.summary is not None:
        parts.append("## What fell back\n\n" + _fallback_text(report.summary))
    environment = "\n".join(f"- {key}: {value}" for key, value in report.environment.items())
    if environment:
        parts.append("## Environment\n\n" + environment)
    return "\n\n".join(parts) + "\n"


def _fallback_text(summary: Mapping[str, Any]) -> str:
    declined = fallbacks(summary)
    lines = [f"- `{layer}` x{calls}: {reason}" for layer, reason, calls in declined]
    lines += [f"- `{layer}`: not finite at steps {steps}" for layer, steps in not_finite(summary)]
    return "\n".join(lines) or "Nothing: every call ran as planned."


def variant_table(variants: Sequence[Variant]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines of the side-by-side table; predicted time only where a variant has one."""
    timed = any(variant.predicted_time is not None for variant in variants)
    head = ("plan", "PSNR dB", "SSIM", "final latent cosine", "mean relative L1")
    lines = []
    for variant in variants:
        time = (number(variant.predicted_time, 3),) if timed else ()
        lines.append(
            (
                variant.name,
                number(variant.psnr, 2),
                number(variant.ssim),
                number(variant.latent_cosine, 5),
                number(variant.rel_l1),
                *time,
                shares(variant.specs),
            )
        )
    return (*head, *(("predicted time",) if timed else ()), "calls"), lines


AGGREGATE_HEAD = (
    "calls",
    "cosine",
    "worst",
    "relative L1",
    "worst L1",
    "RMSE",
    "max. error",
    "specs",
)


def aggregate_cells(aggregate: Aggregate) -> tuple[str, ...]:
    """One line under a name and ``AGGREGATE_HEAD``."""
    return (
        aggregate.name,
        str(aggregate.calls),
        number(aggregate.cosine, 5),
        number(aggregate.worst_cosine, 5),
        number(aggregate.rel_l1),
        number(aggregate.worst_rel_l1),
        number(aggregate.rmse, 5),
        number(aggregate.max_abs),
        shares(aggregate.specs),
    )


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        # A pipe ends a cell, also inside code; globs keep their stars.
        cells = (cell.replace("|", "\\|").replace("*", "\\*") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def html(report: Findings) -> str:
    """See :meth:`.AccuracyReport.to_html`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(number=number, shares=shares, data_uri=_data_uri)
    maps = [charts.error_map(report), charts.spec_map(report)]
    lines = [charts.step_error_chart(report), charts.latent_chart(report)]
    end = report.end_to_end
    variant_head, variant_lines = variant_table(report.variants)
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        maps=[chart for chart in maps if chart is not None],
        lines=[chart for chart in lines if chart is not None],
        variant_head=variant_head,
        variants=[
            (variant.name == report.name, line)
            for variant, line in zip(report.variants, variant_lines, strict=True)
        ],
        aggregate_head=AGGREGATE_HEAD,
        layers=[aggregate_cells(layer) for layer in report.per_layer()],
        rules=[] if report.plan is None else table_of(report.plan),
        pictures=[
            (picture, end.psnr[i] if end else None, end.ssim[i] if end else None)
            for i, picture in enumerate(report.pictures)
        ],
        fallbacks=fallbacks(report.summary),
        not_finite=not_finite(report.summary),
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
