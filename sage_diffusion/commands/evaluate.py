"""``sage-diffusion evaluate``: prove a plan on prompts and seeds that calibration never saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout
from sage_diffusion.commands.options import (
    PLAN_HELP,
    Tokens,
    check_names,
    default_tokens,
    parse_option,
    prompts_of,
    read_plan,
)

if TYPE_CHECKING:
    from rich.table import Table

    from sage_diffusion.adapt.evaluate import Evaluation

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

#: Calibration's default seed is 0.
_HELD_OUT_SEED = 1000


def evaluate(
    plan: Annotated[
        Optional[list[Path]],
        typer.Argument(help=f"Plans, each {PLAN_HELP}; the bundled model's if none."),
    ] = None,
    model: Annotated[
        str, typer.Option(help='A diffusers pipeline: a folder, a hub name, or "bundled".')
    ] = "bundled",
    bundled: Annotated[
        bool, typer.Option("--bundled", help="The bundled model and its plan.")
    ] = False,
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(help="Held-out prompt, repeatable; classes separated by commas."),
    ] = None,
    seed: Annotated[
        Optional[list[int]], typer.Option(help="Held-out seed, repeatable. [default: 1000]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=2)] = 20,
    option: Annotated[
        Optional[list[str]],
        typer.Option("--set", help="Argument of the pipeline, NAME=JSON, e.g. height=512."),
    ] = None,
    spec: Annotated[
        Optional[list[str]], typer.Option(help="Uniform spec to compare with, repeatable.")
    ] = None,
    card: Annotated[
        str, typer.Option(help="Card whose costs count, or a JSON file of spec: cost.")
    ] = "rtx4090",
    tokens: Tokens = None,
    out: Annotated[
        Optional[Path],
        typer.Option(help="Folder for plots: quality against speed, latents after each step."),
    ] = None,
    table: Annotated[
        Optional[Path],
        typer.Option(
            help="Score table of the first plan: --out also gets heat maps, bars per layer, and "
            "why the plan differs by layer and step."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """PSNR, SSIM, latent cosine and Frechet distance of plans, uniform specs and simple rules.

    All run the same held-out prompts and seeds; times are predicted bounds relative to FP16.
    """
    from sage_diffusion.adapt.costs import load_costs, relative_cost
    from sage_diffusion.adapt.evaluate import UNIFORM
    from sage_diffusion.adapt.evaluate import evaluate as run
    from sage_diffusion.adapt.table import ScoreTable
    from sage_diffusion.plan.library import bundled_plan

    if bundled and model != "bundled":
        raise CommandError(f"--bundled names the model already, got --model {model}")
    if table is not None and out is None:
        raise CommandError("--table is for plots: give --out as well")
    paths = list(plan or ())
    stems = [path.stem for path in paths]
    plans = {
        path.stem if stems.count(path.stem) == 1 else str(path): read_plan(path) for path in paths
    }
    if not plans:
        if model != "bundled":
            raise CommandError("name at least one plan to evaluate")
        plans = {"bundled": bundled_plan()}
    costs = load_costs(card, default_tokens(model, tokens))
    for name in spec or ():
        relative_cost(name, costs)  # one that the user names is not left out
    scores = None if table is None else ScoreTable.load(table)
    extra = dict(parse_option(text) for text in option or ())
    with quiet_stdout(), progress() as bar:
        from sage_diffusion.integrations.diffusers.pipelines import load_pipeline
        from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

        pipe = load_pipeline(model)
        check_names(pipe, extra)
        sampler = PipelineSampler(pipe, {"num_inference_steps": steps} | extra)
        prompts = prompts_of(sampler, prompt, count=3, first=4)
        pairs = [(p, s) for p in prompts for s in seed or (_HELD_OUT_SEED,)]
        task = bar.add_task("evaluate", total=None)
        found = run(
            sampler.generate,
            pairs,
            plans,
            uniform=tuple(spec or UNIFORM),
            costs=costs,
            progress=lambda name, done, total: bar.update(task, completed=done, total=total),
        )
    notes = []
    if out is not None:
        from sage_diffusion.adapt.plots import calibration_plots, latent_cosines, pareto

        drawn = [out / "pareto.png", out / "latents.png"]
        pareto(found, drawn[0])
        latent_cosines(found, drawn[1])
        if scores is not None:
            drawn += calibration_plots(scores, next(iter(plans.values())), out)
        notes.append(f"wrote {', '.join(map(str, drawn))}")
    emit(as_json, found.to_dict(), _table(found), *notes)


def _table(found: Evaluation) -> Table:
    from rich.table import Table

    view = Table(title=f"{found.runs} held-out runs", title_justify="left")
    for heading in (
        "plan",
        "predicted time",
        "PSNR dB",
        "mean",
        "worst",
        "SSIM",
        "last cosine",
        "Frechet",
        "4-bit work",
    ):
        view.add_column(heading)
    for s in found.scored:
        view.add_row(
            s.name,
            f"{s.predicted_time:.3f}",
            f"{s.psnr:.1f}",
            f"{s.mean_psnr:.1f}",
            f"{min(s.pictures, default=s.psnr):.1f}",
            "-" if s.ssim is None else f"{s.ssim:.4f}",
            f"{s.latent_cosine[-1]:.6f}" if s.latent_cosine else "-",
            "-" if s.frechet is None else f"{s.frechet:.2e}",
            f"{s.below_8_bit:.0%}",
        )
    return view
