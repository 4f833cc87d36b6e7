"""Pictures of a calibration and of an evaluation (needs matplotlib)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.evaluate import Evaluation
from sage_diffusion.adapt.planner import plan_index, problem
from sage_diffusion.adapt.table import BOTH, ScoreTable
from sage_diffusion.plan import PrecisionPlan

_KINDS = {
    "adaptive": ("adaptive plan", "tab:red", "*", 220),
    "uniform": ("one spec everywhere", "tab:blue", "o", 60),
    "first_last": ("first and last steps in 8 bit", "tab:orange", "s", 50),
}


def pareto(evaluation: Evaluation, path: str | Path) -> None:
    """Quality against predicted speed, every plan a point, the front a line.

    Quality is the mean over the pictures: one chaotic picture would decide the pooled PSNR.
    """
    figure, axes = _axes(7, 4.5)
    points = [
        (1 / s.predicted_time, s.mean_psnr, s)
        for s in evaluation.scored
        if math.isfinite(s.mean_psnr)
    ]
    for kind, (label, colour, marker, size) in _KINDS.items():
        some = [(x, y) for x, y, s in points if s.kind == kind]
        if some:
            axes.scatter(*zip(*some, strict=True), s=size, c=colour, marker=marker, label=label)
    for x, y, s in points:
        if s.kind != "first_last":
            axes.annotate(s.name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda p: (-p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    if front:
        axes.plot(*zip(*front, strict=True), c="grey", lw=1, zorder=0)
    axes.set_xlabel(f"predicted speed of attention, FP16 = 1 ({evaluation.card}, a bound)")
    axes.set_ylabel("PSNR against FP16, mean of the pictures, dB")
    axes.legend(fontsize=8)
    _save(figure, path)


def latent_cosines(evaluation: Evaluation, path: str | Path) -> None:
    """How far every plan's latents are from FP16's after each step, as 1 - cosine."""
    figure, axes = _axes(7, 4.5)
    for s in evaluation.scored:
        away = [max(1 - cosine, 1e-9) for cosine in s.latent_cosine]
        if away:
            axes.plot(range(len(away)), away, label=s.name, lw=2 if s.kind == "adaptive" else 1)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("1 - cosine of the latents to FP16's, mean of the runs")
    if axes.lines:
        axes.legend(fontsize=7)
    _save(figure, path)


def calibration_plots(table: ScoreTable, plan: PrecisionPlan, folder: str | Path) -> list[Path]:
    """A heat map of each spec, the layers' bars and the three panels of :func:`why`.

    Returns:
        The files.
    """
    heats = {name: Path(folder, f"heat-{name.replace('/', '-')}.png") for name in table.specs}
    for name, path in heats.items():
        heat_map(table, name, path)
    bars, panels = Path(folder, "layers.png"), Path(folder, "why.png")
    layer_bars(table, bars)
    why(table, plan, panels)
    return [*heats.values(), bars, panels]


def heat_map(table: ScoreTable, spec: str, path: str | Path) -> None:
    """Error of a spec per layer and step, measured cells dotted."""
    completed = complete(table)
    errors = completed.error[..., table.specs.index(spec)]
    decibel = 10 * np.log10(np.maximum(np.nanmean(errors, 2), 1e-14))
    figure, axes = _axes(1.5 + 0.3 * table.steps, 1.2 + 0.25 * len(table.layers))
    image = axes.imshow(decibel, aspect="auto", cmap="viridis")
    rows, columns = np.nonzero(table.measured.any(2))
    axes.scatter(columns, rows, s=4, c="white")
    axes.set_yticks(range(len(table.layers)), table.layers, fontsize=7)
    axes.set_xlabel("step (dots: measured, others completed)")
    axes.set_title(f"error of {spec}, dB", fontsize=9)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def why(table: ScoreTable, plan: PrecisionPlan, path: str | Path) -> None:
    """Why a plan differs by layer and step, in three panels.

    What the plan's cheapest spec does to each call, what that does to the final picture, and what
    the plan therefore runs.  Branches of guidance are rows of their own.
    """
    task = problem(table, {name: 1.0 for name in ("fp16", *table.specs)})
    used = sorted({task.specs[k] for k in plan_index(table, plan, task.specs)[table.exists]})
    column = int(np.argmax(np.nanmean(complete(table).error, (0, 1, 2))))
    local = complete(table).error[..., column]
    effect = task.damage[..., task.specs.index(table.specs[column])]
    choice = np.vectorize(lambda k: used.index(task.specs[k]))(plan_index(table, plan, task.specs))
    rows = [
        f"{layer} {'' if branch == BOTH else branch}".strip()
        for layer in table.layers
        for branch in table.branches
    ]

    def flat(array: np.ndarray) -> np.ndarray:
        shown = np.where(table.exists, array, np.nan)
        return shown.transpose(0, 2, 1).reshape(len(rows), table.steps)

    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = _axes(4 + 0.45 * table.steps, 1.4 + 0.2 * len(rows), columns=3)
    panels = (
        (f"error of {table.specs[column]} in a call, dB", 10 * np.log10(np.maximum(local, 1e-14))),
        ("what that does to the picture, dB", 10 * np.log10(np.maximum(effect, 1e-14))),
    )
    for ax, (title, values) in zip(axes, panels, strict=False):
        image = ax.imshow(flat(values), aspect="auto", cmap="viridis")
        ax.set_title(title, fontsize=9)
        figure.colorbar(image, ax=ax)
    colours = ListedColormap([f"C{i}" for i in range(len(used))])
    axes[2].imshow(flat(choice), aspect="auto", cmap=colours, vmin=-0.5, vmax=len(used) - 0.5)
    axes[2].set_title("so the plan runs", fontsize=9)
    patches = [Patch(color=f"C{i}", label=name) for i, name in enumerate(used)]
    axes[2].legend(handles=patches, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for i, ax in enumerate(axes):
        ax.set_yticks(range(len(rows)), rows if i == 0 else [], fontsize=7)
        ax.set_xlabel("step")
    _save(figure, path)


def layer_bars(table: ScoreTable, path: str | Path) -> None:
    """Mean score cosine * (1 - L1) of every layer and spec, with the spread over steps."""
    scores = table.metric("score")
    figure, axes = _axes(2 + 0.5 * len(table.layers), 4)
    width = 0.8 / len(table.specs)
    places = np.arange(len(table.layers))
    for k, spec in enumerate(table.specs):
        with np.errstate(invalid="ignore"):
            mean = np.nanmean(scores[..., k], (1, 2))
            spread = np.nanstd(scores[..., k], (1, 2))
        axes.bar(places + (k + 0.5) * width - 0.4, mean, width, yerr=spread, label=spec)
    axes.set_xticks(places, table.layers, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("cosine x (1 - L1)")
    axes.legend(fontsize=7, ncols=2)
    _save(figure, path)


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
