"""Geometry of the report's charts: plain data that the template draws as SVG.

Colours are classes of the page's style sheet, so that a chart follows the light or dark theme.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sage_diffusion.accuracy.findings import Findings
from sage_diffusion.accuracy.records import Row
from sage_diffusion.kernels.spec import LADDER

#: Classes ``e0`` .. of the style sheet: low to high error.
ERROR_CLASSES = 9


class Cell(NamedTuple):
    """One rectangle; ``title`` is its tooltip."""

    x: float
    y: float
    css: str
    title: str


class Label(NamedTuple):
    """Text at a point."""

    x: float
    y: float
    text: str
    full: str = ""


class Key(NamedTuple):
    """One entry of a legend."""

    css: str
    text: str


class HeatMap(NamedTuple):
    """A layer x step grid."""

    title: str
    width: float
    height: float
    cell_width: float
    cell_height: float
    left: float
    top: float
    cells: tuple[Cell, ...]
    rows: tuple[Label, ...]
    columns: tuple[Label, ...]
    legend: tuple[Key, ...]


class Line(NamedTuple):
    """One series of a line chart: an SVG path and its marked points."""

    name: str
    css: str
    path: str
    points: tuple[Label, ...]


class LineChart(NamedTuple):
    """Values per step."""

    title: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    lines: tuple[Line, ...]
    x_ticks: tuple[Label, ...]
    y_ticks: tuple[Label, ...]


def spec_class(spec: str) -> str:
    """Style class of a spec: its place on the ladder, switches aside."""
    base = spec.split("+")[0]
    while base and base not in LADDER and "-" in base:
        base = base.rsplit("-", 1)[0]
    return f"s{LADDER.index(base)}" if base in LADDER else "s-other"


def error_edges(values: Sequence[float]) -> tuple[float, ...]:
    """Edges between the error classes: geometric, over the range of the positive finite values."""
    known = [value for value in values if value > 0 and math.isfinite(value)]
    if not known:
        return ()
    low, high = min(known), max(known)
    if high < low * 1.05:  # one colour is honest where all values are the same
        return ()
    ratio = (high / low) ** (1 / ERROR_CLASSES)
    return tuple(low * ratio**i for i in range(1, ERROR_CLASSES))


def error_class(value: float, edges: Sequence[float]) -> str:
    """Style class of an error."""
    if math.isnan(value):
        return "bad"
    return f"e{sum(value >= edge for edge in edges)}"


def error_map(report: Findings) -> HeatMap | None:
    """Mean relative L1 of every cell; None without a quantized row."""
    cells = report.cells()
    means = {
        key: sum(row.rel_l1 for row in rows if row.spec.quantized)
        / sum(row.spec.quantized for row in rows)
        for key, rows in cells.items()
        if any(row.spec.quantized for row in rows)
    }
    if not means:
        return None
    edges = error_edges(list(means.values()))
    classes = {key: error_class(means[key], edges) if key in means else "exact" for key in cells}
    legend = [Key("e0", f"below {edges[0]:.3g}" if edges else f"{max(means.values()):.3g}")]
    legend += [Key(f"e{i + 1}", f"from {edge:.3g}") for i, edge in enumerate(edges)]
    if any(css == "bad" for css in classes.values()):
        legend.append(Key("bad", "not finite"))
    if any(css == "exact" for css in classes.values()):
        legend.append(Key("exact", "fp16, no error"))
    return _grid("Relative L1 of each attention call", report, classes, legend)


def spec_map(report: Findings) -> HeatMap | None:
    """The spec that ran in every cell; None without a row."""
    if not report.rows:
        return None
    classes = {
        key: spec_class(Counter(str(row.spec) for row in rows).most_common(1)[0][0])
        for key, rows in report.cells().items()
    }
    legend = [Key(spec_class(spec), spec) for spec in report.specs]
    return _grid("Precision that ran", report, classes, legend)


def _grid(
    title: str,
    report: Findings,
    classes: dict[tuple[str, int], str],
    legend: list[Key],
) -> HeatMap:
    layers, steps = report.layers, report.steps
    cells = report.cells()
    wide = max(9.0, min(26.0, 760.0 / len(steps)))
    high = 20.0 if len(layers) <= 16 else 14.0
    shown = [_shorten(name) for name in layers]
    left = 12 + 6.6 * max(map(len, shown))
    top = 22.0
    found = [
        Cell(
            left + column * wide,
            top + line * high,
            classes.get((layer, step), "unknown"),
            _tooltip(layer, step, cells.get((layer, step), ())),
        )
        for line, layer in enumerate(layers)
        for column, step in enumerate(steps)
    ]
    if any(cell.css == "unknown" for cell in found):
        legend = [*legend, Key("unknown", "did not run")]
    every = max(1, math.ceil(24 / wide), math.ceil(len(steps) / 20))
    return HeatMap(
        title,
        left + wide * len(steps) + 8,
        top + high * len(layers) + 4,
        wide,
        high,
        left,
        top,
        tuple(found),
        tuple(
            Label(left - 8, top + (line + 0.5) * high, text, name)
            for line, (text, name) in enumerate(zip(shown, layers, strict=True))
        ),
        tuple(
            Label(left + (column + 0.5) * wide, top - 8, str(step))
            for column, step in enumerate(steps)
            if column % every == 0
        ),
        tuple(legend),
    )


def _shorten(name: str, limit: int = 34) -> str:
    """The ends of a long name: the model's part in front, the block and module behind."""
    return (
        name if len(name) <= limit else f"{name[: limit // 3]}…{name[-(limit - limit // 3 - 1) :]}"
    )


def _tooltip(layer: str, step: int, rows: Sequence[Row]) -> str:
    if not rows:
        return f"{layer}, step {step}: did not run"
    lines = [f"{layer}, step {step}"]
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.branch or "", str(row.spec)), []).append(row)
    for (branch, spec), same in grouped.items():
        head = f"{branch} {spec}".strip() + (f" ({len(same)} calls)" if len(same) > 1 else "")
        if same[0].spec.quantized:
            cosine = sum(row.cosine for row in same) / len(same)
            error = sum(row.rel_l1 for row in same) / len(same)
            head += f": cosine {cosine:.5f}, relative L1 {error:.4f}"
        lines.append(head)
    return "\n".join(lines)


def step_error_chart(report: Findings) -> LineChart | None:
    """Mean and worst relative L1 per step."""
    steps = [(int(step.name), step) for step in report.per_step() if step.rel_l1 is not None]
    if not steps:
        return None
    return line_chart(
        "Relative L1 of the attention calls, per step",
        [
            ("worst call", "l1", [(x, step.worst_rel_l1) for x, step in steps]),
            ("mean", "l0", [(x, step.rel_l1) for x, step in steps]),
        ],
    )


def latent_chart(report: Findings) -> LineChart | None:
    """How far the latents have drifted after each step."""
    end = report.end_to_end
    if end is None or not end.latent_cosine:
        return None
    drift = [(step, max(0.0, 1 - value)) for step, value in enumerate(end.latent_cosine)]
    return line_chart(
        "Drift of the latents, 1 - cosine after each step", [("latents", "l0", drift)]
    )


def line_chart(
    title: str, series: Sequence[tuple[str, str, Sequence[tuple[int, float | None]]]]
) -> LineChart:
    """Series of ``(name, style class, [(step, value)])``; values that aren't finite are gaps."""
    width, height, left, right, top, bottom = 460.0, 210.0, 58.0, 14.0, 12.0, 30.0
    steps = sorted({x for _, _, points in series for x, _ in points})
    values = [y for _, _, points in series for _, y in points if y is not None and math.isfinite(y)]
    ticks = nice_ticks(max(values, default=1.0))
    ceiling = ticks[-1]

    def at_x(step: int) -> float:
        span = steps[-1] - steps[0]
        return left + (width - left - right) * ((step - steps[0]) / span if span else 0.5)

    def at_y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / ceiling

    lines = []
    for name, css, points in series:
        path, marks, pen = [], [], "M"
        for x, y in points:
            if y is None or not math.isfinite(y):
                pen = "M"
                continue
            path.append(f"{pen}{at_x(x):.1f} {at_y(y):.1f}")
            marks.append(Label(at_x(x), at_y(y), f"{name}, step {x}: {y:.5g}"))
            pen = "L"
        lines.append(Line(name, css, " ".join(path), tuple(marks)))
    every = max(1, math.ceil(len(steps) / 10))
    return LineChart(
        title,
        width,
        height,
        left,
        right,
        top,
        bottom,
        tuple(lines),
        tuple(
            Label(at_x(step), height - bottom + 17, str(step))
            for i, step in enumerate(steps)
            if i % every == 0
        ),
        tuple(Label(left - 8, at_y(tick), f"{tick:g}") for tick in ticks),
    )


def nice_ticks(largest: float, count: int = 4) -> tuple[float, ...]:
    """About ``count`` round values from 0 to at least ``largest``."""
    if largest <= 0:
        return 0.0, 1.0
    raw = largest / count
    unit = 10.0 ** math.floor(math.log10(raw))
    size = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
    number = math.ceil(largest / size - 1e-9)
    return tuple(float(f"{i * size:.6g}") for i in range(number + 1))
