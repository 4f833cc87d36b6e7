"""The layer x step heat map as a PNG, for papers and model cards."""

from __future__ import annotations

import io
import math

from sage_diffusion.accuracy.findings import Findings


def heatmap_png(report: Findings) -> bytes:
    """PNG bytes: mean relative L1 of every (layer, step), grey where nothing was measured.

    Raises:
        ImportError: matplotlib, the extra ``plot``, is not installed.
        ValueError: the report has no quantized row.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter
    except ImportError:
        raise ImportError(
            "the heat map needs matplotlib: pip install 'sage-diffusion[plot]'"
        ) from None
    if not report.quantized:
        raise ValueError("no quantized call was compared: there is nothing to draw")
    layers, steps = report.layers, report.steps
    # Colours are logarithmic: a call without any error, or not finite, is left grey like one that
    # did not run or ran in fp16.
    table = [[math.nan] * len(steps) for _ in layers]
    for (layer, step), rows in report.cells().items():
        errors = [row.rel_l1 for row in rows if row.spec.quantized]
        if errors and 0 < sum(errors) < math.inf:
            table[layers.index(layer)][steps.index(step)] = sum(errors) / len(errors)
    known = [value for line in table for value in line if not math.isnan(value)]
    figure = Figure(
        figsize=(3.2 + 0.3 * max(len(steps), 8), 1.4 + 0.26 * max(len(layers), 4)),
        layout="constrained",
    )
    axes = figure.add_subplot()
    axes.set_facecolor("#d9d9d9")
    low, high = (min(known), max(known)) if known else (1e-3, 1.0)
    norm = LogNorm(low, high if high > low else low * 1.01)
    image = axes.imshow(table, aspect="auto", cmap="magma_r", norm=norm)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    every = max(1, len(steps) // 20)
    axes.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]], fontsize=8)
    axes.set_xlabel("step")
    axes.set_title(f"{report.name}: relative L1 of attention", fontsize=10)
    bar = figure.colorbar(image, ax=axes, format="%.3g")
    bar.ax.yaxis.set_minor_formatter(FormatStrFormatter("%.3g"))
    buffer = io.BytesIO()
    # No date, no version: the same report gives the same file.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
