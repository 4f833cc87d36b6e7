"""``sage-diffusion demo``: the bundled model in FP16, two uniform specs and an adaptive plan."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import typer

from sage_diffusion.commands.common import AsJson, emit, quiet_stdout

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


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out"),
    images: Annotated[int, typer.Option(help="Pictures per run.", min=1)] = 6,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    model: Annotated[
        str, typer.Option(help="Another class-conditional pipeline.", hidden=True)
    ] = "bundled",
    as_json: AsJson = False,
) -> None:
    """Draw the same seeds in FP16, INT8, INT4 and with an adaptive plan; write pictures and report.

    Open OUT/report.html in a browser; OUT/grid.png shows the pictures and their differences.
    """
    from sage_diffusion.commands.side_by_side import (
        document,
        run_side_by_side,
        variant_table,
        write_files,
    )
    from sage_diffusion.plan import PrecisionPlan

    with quiet_stdout():
        from sage_diffusion.integrations.bundled import ASSETS
        from sage_diffusion.integrations.pipelines import load_pipeline

        pipe = load_pipeline(model)
        adaptive = PrecisionPlan.load(ASSETS / "adaptive.json")
        known = CLASSES if model == "bundled" else tuple(pipe.classes)
        labels = list(islice(cycle(known), images))
        result = run_side_by_side(
            pipe,
            [*((name, PrecisionPlan.of(name)) for name in SPECS), ("adaptive", adaptive)],
            seeds=(seed,),
            arguments={"class_labels": labels, "num_inference_steps": steps},
            labels=labels,
        )
        files, notes = write_files(result, out)
    data = document(result, files, notes)
    shown = f"pictures: {out / 'grid.png'}\nreport:   {out / 'report.html'}"
    emit(as_json, data, variant_table(result.reports), *notes, shown)
