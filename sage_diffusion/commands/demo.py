"""``sage-diffusion demo``: calibrate the bundled model, plan, generate, and show what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sage_diffusion.commands.common import AsJson, emit, progress, quiet_stdout
from sage_diffusion.commands.options import PICTURES_PER_GRAPH, prompts_of

if TYPE_CHECKING:
    from sage_diffusion.accuracy.compare import Generation
    from sage_diffusion.adapt.evaluate import Evaluation
    from sage_diffusion.adapt.planner import Planned
    from sage_diffusion.adapt.table import ScoreTable

#: What is drawn, in this order.
CLASSES = (
    "cat-face",
    "face-smiling",
    "food-fruit",
    "animal-bird",
    "heart",
    "plant-flower",
    "drink",
    "monkey-face",
)

#: What FP16 is compared with before the adaptive plan.
SPECS = ("int8/fp8", "int4/fp8-fast")

#: Uniform specs on the plot of quality against speed.
PLOTTED = ("int8/fp8", "int8/int8", "int8/fp8-fast", "int4/fp8-fast")

#: Whose predicted times count, of main loops: the model's pictures are tiny.
CARD = "rtx4090"

#: Further plans for the plot: share of the way from the time of all 4 bit to that of all 8 bit.
_ON_THE_WAY = (0.6, 0.85)

#: Seeds below are for calibration: what is drawn must be held out.
_HELD_OUT = 100


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out"),
    images: Annotated[int, typer.Option(help="Pictures per run.", min=1)] = 6,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=2)] = 20,
    seed: Annotated[
        int, typer.Option(help="Of the noise; calibration has other noise.", min=_HELD_OUT)
    ] = 1000,
    pictures: Annotated[
        int, typer.Option(help="Pictures that the end-to-end stage looks at.", min=1)
    ] = 16,
    model: Annotated[
        str, typer.Option(help="Another class-conditional pipeline.", hidden=True)
    ] = "bundled",
    as_json: AsJson = False,
) -> None:
    """Draw the same seeds in FP16, INT8 and INT4; calibrate, plan, and draw with the adaptive plan.

    OUT/grid.png comes first and gains two rows with every run: the pictures and their differences.
    In the end open OUT/report.html in a browser; OUT/pareto.png shows quality against predicted
    speed, OUT/why.png why the plan differs by layer and step, OUT/layers.png the layers' scores and
    OUT/latents.png how the latents drift apart.  OUT/scores.json holds the calibration: a second
    run begins with it.
    """
    from sage_diffusion.adapt.plots import latent_cosines, layer_bars, pareto, why
    from sage_diffusion.commands.side_by_side import (
        document,
        run_side_by_side,
        variant_table,
        write_files,
        write_grid,
    )
    from sage_diffusion.plan import PrecisionPlan

    with quiet_stdout():
        from sage_diffusion.integrations.diffusers.pipelines import PipelineRun, load_pipeline
        from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

        pipe = load_pipeline(model)
        known = CLASSES if model == "bundled" else tuple(pipe.classes)
        labels = list(islice(cycle(known), images))
        arguments = {"num_inference_steps": steps}
        sampler = PipelineSampler(pipe, arguments, batch=PICTURES_PER_GRAPH)
        run = PipelineRun(pipe, (seed,), arguments | {"class_labels": labels}, labels)
        begun = run_side_by_side(run, ())
        write_grid(begun, out)
        for name in SPECS:
            begun = run_side_by_side(run, [(name, PrecisionPlan.of(name))], begun=begun)
            write_grid(begun, out)
        table = _calibrate(sampler, out / "scores.json", pictures)
        plans = _plans(table)
        name, adaptive = next((name, planned.plan) for name, planned in plans.items())
        result = run_side_by_side(run, [(name, adaptive)], begun=begun)
        files, notes = write_files(result, out)
        made = {r.name: [images] for r, images in zip(result.reports, result.made, strict=True)}
        found = _evaluate(sampler, labels, seed, plans, made)
    drawn = {"pareto.png": lambda path: pareto(found, path)}
    drawn["why.png"] = lambda path: why(table, adaptive, path)
    drawn["layers.png"] = lambda path: layer_bars(table, path)
    drawn["latents.png"] = lambda path: latent_cosines(found, path)
    try:
        for name, draw in drawn.items():
            draw(out / name)
            files.append(out / name)
    except ImportError as error:
        notes.append(f"no plots: {error}")
    data = document(result, [out / "scores.json", *files], notes)
    data["evaluation"] = found.to_dict()
    shown = [
        f"pictures: {out / 'grid.png'}",
        f"report:   {out / 'report.html'}",
        f"quality against predicted speed: {out / 'pareto.png'}",
        f"why the plan differs by layer and step: {out / 'why.png'}",
    ]
    emit(as_json, data, variant_table(result.reports), *notes, "\n".join(shown))


def _calibrate(sampler: Any, path: Path, pictures: int) -> ScoreTable:
    from sage_diffusion.adapt.calibrate import SPECS as candidates
    from sage_diffusion.adapt.calibrate import calibrate

    with progress() as bar:
        task = bar.add_task("calibrate", total=None)
        return calibrate(
            sampler,
            prompts_of(sampler, None),
            specs=candidates,
            sensitivity=pictures,
            path=path,
            progress=lambda p: bar.update(
                task, description=f"calibrate: {p.stage}", completed=p.done, total=p.total
            ),
        )


def _plans(table: ScoreTable) -> dict[str, Planned]:
    from sage_diffusion.adapt.costs import card_costs
    from sage_diffusion.adapt.planner import make_plan, predicted_time

    costs = card_costs(CARD, math.inf)
    low, high = (predicted_time(table, name, costs) for name in ("int4/fp8-fast", "int8/fp8-fast"))
    budgets = [1.1 * low, *(low + share * (high - low) for share in _ON_THE_WAY)]
    plans = {}
    for i, budget in enumerate(budgets):
        name = "adaptive" if i == 0 else f"adaptive, {budget / low - 1:.0%} over 4 bit"
        plans[name] = make_plan(table, budget=budget, costs=costs, name=name)
    return plans


def _evaluate(
    sampler: Any,
    labels: Sequence[str],
    seed: int,
    plans: dict[str, Planned],
    made: dict[str, list[Generation]],
) -> Evaluation:
    from sage_diffusion.adapt.costs import card_costs
    from sage_diffusion.adapt.evaluate import evaluate

    with progress() as bar:
        task = bar.add_task("evaluate", total=None)
        return evaluate(
            sampler.generate,
            [(list(labels), seed)],
            {name: planned.plan for name, planned in plans.items()},
            uniform=PLOTTED,
            costs=card_costs(CARD, math.inf),
            made=made,
            progress=lambda name, done, total: bar.update(task, completed=done, total=total),
        )
