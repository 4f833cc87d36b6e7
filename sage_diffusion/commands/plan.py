"""``sage-diffusion plan``: look at plans, check, merge and move them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, quiet_stdout
from sage_diffusion.commands.options import PLAN_HELP, read_plan

if TYPE_CHECKING:
    from sage_diffusion.plan import PrecisionPlan

app = typer.Typer(help="Show, check, merge and move precision plans.", no_args_is_help=True)

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help=f"A plan: {PLAN_HELP}.")]


@app.command("list")
def list_plans(as_json: AsJson = False) -> None:
    """The plans that come with the package; their names go wherever a plan does."""
    from rich.table import Table

    from sage_diffusion.plan.catalog import shipped
    from sage_diffusion.plan.library import shipped_plan

    plans = {name: shipped_plan(name) for name in shipped()}
    table = Table("plan", "made for", "calibrated", "rules")
    for name, plan in plans.items():
        calibrated = "no" if plan.calibration is None else "yes"
        table.add_row(name, plan.model or "any model", calibrated, str(len(plan.rules)))
    emit(
        as_json,
        {
            name: {
                "name": plan.name,
                "model": plan.model,
                "calibrated": plan.calibration is not None,
                "rules": len(plan.rules),
            }
            for name, plan in plans.items()
        },
        table,
    )


@app.command("show")
def show(path: PlanPath, as_json: AsJson = False) -> None:
    """Print a plan's rules in the order in which they are tried."""
    from rich.table import Table

    from sage_diffusion.plan.show import table_of

    plan = read_plan(path)
    table = Table(title=plan.name or str(path), title_justify="left")
    for heading in ("rule", "layers", "progress", "only", "spec"):
        table.add_column(heading)
    for row in table_of(plan):
        table.add_row(*row)
    notes = [f"made for {plan.model}"] if plan.model else []
    if plan.calibration is None:
        notes.append("not calibrated")
    else:
        notes.append(", ".join(f"{key}: {value}" for key, value in plan.calibration.items()))
    emit(as_json, plan.to_dict(), table, "\n".join(notes))


@app.command("validate")
def validate(
    path: PlanPath,
    model: Annotated[
        Optional[str],
        typer.Option(help='A pipeline to check the layers of: folder, hub name or "bundled".'),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A rule that matches no layer is an error.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a plan; exit code 1 and the JSON path of what is wrong if it is not one."""
    plan = read_plan(path)
    document: dict[str, Any] = {"valid": True, "rules": len(plan.rules), "warnings": []}
    text = f"{path}: valid, {len(plan.rules)} rules"
    if model is not None:
        with quiet_stdout():
            layers, kind = layer_names(model)
        document["warnings"] = plan.check(layers, model=kind, strict=strict)
        document["layers"] = len(layers)
        text += f", fits {model} ({len(layers)} layers)"
    emit(as_json, document, text, *(f"warning: {warning}" for warning in document["warnings"]))


@app.command("merge")
def merge(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A plan; its rules win.")],
    second: Annotated[
        Path, typer.Argument(metavar="SECOND", help="Counts where the first has no rule.")
    ],
    out: Annotated[Path, typer.Option(help="The merged plan.")] = Path("merged.json"),
    as_json: AsJson = False,
) -> None:
    """Two plans of one model as one: the first's rules on top, the second's default."""
    from sage_diffusion.plan.edit import merge_plans

    plans = read_plan(first), read_plan(second)
    _write(merge_plans(*plans), sum(len(plan.rules) for plan in plans), out, as_json)


@app.command("remap")
def remap(
    path: PlanPath,
    sigmas: Annotated[
        Optional[str],
        typer.Option(help="The other schedule, one sigma a step, descending: 1,0.9,0.75,0.5"),
    ] = None,
    like: Annotated[
        Optional[Path],
        typer.Option(help="Take the schedule of this plan or score table."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The moved plan.")] = Path("remapped.json"),
    as_json: AsJson = False,
) -> None:
    """Move a plan to another number of steps or another schedule.

    Every rule covers the same sigmas as before.  Sampling does so by itself wherever a plan stores
    its schedule; this is for reading and editing the result.
    """
    from sage_diffusion.plan.edit import remap_plan

    if (sigmas is None) == (like is None):
        raise CommandError("say which schedule: give --sigmas or --like")
    plan = read_plan(path)
    target, unit = (_numbers(sigmas), None) if sigmas is not None else _schedule_of(like or Path())
    _write(remap_plan(plan, target, unit), len(plan.rules), out, as_json)


def _write(plan: PrecisionPlan, before: int, out: Path, as_json: bool) -> None:
    plan.save(out)
    count = len(plan.rules)
    document = {"rules": count, "dropped": before - count, "files": [str(out)]}
    lost = f", {before - count} that never apply were dropped" if before > count else ""
    emit(as_json, document, f"{count} rules{lost}", f"wrote {out}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(f"--sigmas must be numbers with commas between, got {text!r}") from None


def _schedule_of(path: Path) -> tuple[list[float], str | None]:
    """The schedule that a plan or a score table stores, and its unit."""
    from sage_diffusion.adapt.table import ScoreTable
    from sage_diffusion.adapt.table_json import TableError

    try:
        source: Any = ScoreTable.load(path)
    except TableError:
        source = read_plan(path)
    if not source.schedule:
        raise CommandError(f"{path} stores no schedule")
    return list(source.schedule), source.schedule_unit


def layer_names(model: str) -> tuple[list[str], str]:
    """Names of the attention layers of a pipeline, and the class of its denoiser."""
    from sage_diffusion.attend.session import AttentionSession
    from sage_diffusion.integrations.diffusers import apply, model_name
    from sage_diffusion.integrations.diffusers.pipelines import load_pipeline

    session, pipe = AttentionSession("fp16"), load_pipeline(model, device="cpu")
    with apply(pipe, session):
        return list(session.layers), model_name(pipe)
