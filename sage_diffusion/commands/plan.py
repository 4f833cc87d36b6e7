"""``sage-diffusion plan``: look at plans and check them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, emit, quiet_stdout

app = typer.Typer(help="Show a precision plan, or check one.", no_args_is_help=True)

PlanPath = Annotated[Path, typer.Argument(metavar="PATH", help="A plan, a JSON file.")]


@app.command("show")
def show(path: PlanPath, as_json: AsJson = False) -> None:
    """Print a plan's rules in the order in which they are tried."""
    from rich.table import Table

    from sage_diffusion.accuracy.render import rules_of
    from sage_diffusion.plan import PrecisionPlan

    plan = PrecisionPlan.load(path)
    table = Table(title=plan.name or str(path), title_justify="left")
    for heading in ("rule", "layers", "progress", "only", "spec"):
        table.add_column(heading)
    for row in rules_of(plan):
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
        Optional[str],  # noqa: UP045 (typer reads it on Python 3.10)
        typer.Option(help='A pipeline to check the layers of: folder, hub name or "bundled".'),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A rule that matches no layer is an error.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a plan; exit code 1 and the JSON path of what is wrong if it is not one."""
    from sage_diffusion.plan import PrecisionPlan

    plan = PrecisionPlan.load(path)
    document: dict[str, Any] = {"valid": True, "rules": len(plan.rules), "warnings": []}
    text = f"{path}: valid, {len(plan.rules)} rules"
    if model is not None:
        with quiet_stdout():
            layers = layer_names(model)
        document["warnings"] = plan.check(layers, strict=strict)
        document["layers"] = len(layers)
        text += f", fits {model} ({len(layers)} layers)"
    emit(as_json, document, text, *(f"warning: {warning}" for warning in document["warnings"]))


def layer_names(model: str) -> list[str]:
    """Names of the attention layers of a pipeline."""
    from sage_diffusion.integrations.diffusers import apply
    from sage_diffusion.integrations.pipelines import load_pipeline
    from sage_diffusion.session import AttentionSession

    session = AttentionSession("fp16")
    with apply(load_pipeline(model, device="cpu"), session):
        return list(session.layers)
