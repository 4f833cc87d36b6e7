"""``sage-diffusion calibrate``: measure a pipeline and write the plan that fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sage_diffusion.adapt import DEFAULT_SHARE
from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout
from sage_diffusion.commands.options import (
    PICTURES_PER_GRAPH,
    Tokens,
    check_names,
    default_tokens,
    parse_option,
    prompts_of,
)

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

#: Pictures of the end-to-end stage of the bundled model, whose graph is small.
_PICTURES = 16


def calibrate(
    model: Annotated[
        str, typer.Argument(help='A diffusers pipeline: a folder, a hub name, or "bundled".')
    ],
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(help="Prompt, repeatable, at least two; classes separated by commas."),
    ] = None,
    seed: Annotated[Optional[list[int]], typer.Option(help="Repeatable. [default: 0]")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=2)] = 20,
    spec: Annotated[
        Optional[list[str]], typer.Option(help="Candidate, repeatable. [default: five of them]")
    ] = None,
    option: Annotated[
        Optional[list[str]],
        typer.Option("--set", help="Argument of the pipeline, NAME=JSON, e.g. height=512."),
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of the cells that is measured.", min=0.01, max=1)
    ] = DEFAULT_SHARE,
    rows: Annotated[int, typer.Option(help="Query rows per measured call.", min=1)] = 64,
    sensitivity: Annotated[
        Optional[int],
        typer.Option(
            help="Pictures that the end-to-end stage averages over, eight or more; 0 skips it. "
            "Its memory holds the gradient of a whole sampling run. "
            "[default: 16 for the bundled model, else 0]",
            min=0,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Of the end-to-end stage: auto, gradient or groups.")
    ] = "auto",
    sign_seed: Annotated[
        int,
        typer.Option(
            help="Sequence of the rotations' signs, other signs at every step.",
            min=0,
            max=2**31 - 1,
        ),
    ] = 0,
    one_rotation: Annotated[
        bool, typer.Option("--one-rotation", help="The same signs at all steps instead.")
    ] = False,
    floor: Annotated[
        Optional[float], typer.Option(help="Fastest plan that keeps this predicted PSNR, dB.")
    ] = None,
    budget: Annotated[
        Optional[float],
        typer.Option(
            help="Best plan within this predicted time, FP16 = 1. "
            "[default: the fastest spec's + 10 %]"
        ),
    ] = None,
    card: Annotated[
        str, typer.Option(help="Card whose costs count, or a JSON file of spec: cost.")
    ] = "rtx4090",
    tokens: Tokens = None,
    table: Annotated[
        Path, typer.Option(help="Score table; an unfinished one is continued.")
    ] = Path("scores.json"),
    out: Annotated[Path, typer.Option(help="The plan.")] = Path("plan.json"),
    plots: Annotated[Optional[Path], typer.Option(help="Folder for plots.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what each spec does to each layer and step, and plan.

    Interrupt it at any time: the same command continues where it stopped.
    """
    from sage_diffusion.adapt.calibrate import SPECS
    from sage_diffusion.adapt.calibrate import calibrate as run
    from sage_diffusion.adapt.costs import load_costs
    from sage_diffusion.adapt.evaluate import has_cost
    from sage_diffusion.adapt.planner import make_plan, predicted_time

    if floor is not None and budget is not None:
        raise CommandError("give --floor or --budget, not both")
    costs = load_costs(card, default_tokens(model, tokens))
    candidates = tuple(spec or (name for name in SPECS if name in costs))
    if not any(has_cost(name, costs) for name in candidates):
        asked = ", ".join(candidates) or "the default candidates"
        raise CommandError(f"{card} has no cost of {asked}; it has {', '.join(costs)}")
    extra = dict(parse_option(text) for text in option or ())
    if sensitivity is None:
        sensitivity = _PICTURES if model == "bundled" else 0
    with quiet_stdout(), progress() as bar:
        from sage_diffusion.integrations.diffusers.pipelines import load_pipeline
        from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

        pipe = load_pipeline(model)
        check_names(pipe, extra)
        batch = PICTURES_PER_GRAPH if model == "bundled" else 1
        sampler = PipelineSampler(pipe, {"num_inference_steps": steps} | extra, batch=batch)
        task = bar.add_task("measure", total=None)
        found = run(
            sampler,
            prompts_of(sampler, prompt),
            seed or (0,),
            specs=candidates,
            share=share,
            rows=rows,
            sensitivity=sensitivity,
            method=method,  # type: ignore[arg-type]  # checked there
            path=table,
            sign_seed=None if one_rotation else sign_seed,
            progress=lambda p: bar.update(
                task, description=p.stage, completed=p.done, total=p.total
            ),
        )
    fastest = min(
        predicted_time(found, name, costs) for name in found.specs if has_cost(name, costs)
    )
    if floor is None and budget is None:
        budget = min(round(1.1 * fastest, 4), 1.0)
    made = make_plan(found, floor=floor, budget=budget, costs=costs, name=out.stem)
    made.plan.save(out)
    files = [str(table), str(out)]
    if plots is not None:
        from sage_diffusion.adapt.plots import calibration_plots

        files += map(str, calibration_plots(found, made.plan, plots))
    data = summary_of(made, files)
    if data["share"].get("fp16") == 1 and fastest >= 1:
        data["note"] = (
            f"no spec is predicted to make these calls faster on {card}: quantizing and launching "
            "takes what the main loop gains; --tokens N plans for longer ones"
        )
    elif data["share"].get("fp16") == 1 and floor is not None:
        data["note"] = f"nothing but fp16 is predicted to keep {floor:g} dB"
    emit(as_json, data, text_of(data))


def summary_of(made: Any, files: list[str]) -> dict[str, Any]:
    """The document of ``--json``."""
    return {
        "predicted_time": round(made.time, 4),
        "predicted_quality_db": round(made.quality, 2),
        "rules": len(made.plan.rules),
        "share": {
            name: round(made.share(lambda spec, name=name: spec == name), 4) for name in made.specs
        },
        "calibration": made.plan.calibration,
        "files": files,
    }


def text_of(data: dict[str, Any]) -> str:
    """The same for people."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in data["share"].items() if share)
    lines = [
        f"{data['rules']} rules: {shares}",
        f"predicted: {data['predicted_time']:.3f} of FP16 attention's time (a bound, no timing), "
        f"{data['predicted_quality_db']:.1f} dB",
        f"wrote {', '.join(data['files'])}",
        *([data["note"]] if "note" in data else []),
    ]
    return "\n".join(lines)
