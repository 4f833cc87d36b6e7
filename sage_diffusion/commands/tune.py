"""``sage-diffusion tune``: the best launch configurations for the card that is here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout
from sage_diffusion.speed.gpus import GPUS

if TYPE_CHECKING:
    from rich.table import Table

    from sage_diffusion.speed.tune import Choice

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)


def tune(
    spec: Annotated[
        Optional[list[str]],
        typer.Option(help="Spec, repeatable. [default: the ladder]"),
    ] = None,
    head_dim: Annotated[
        Optional[list[int]],
        typer.Option(help="Head dim, repeatable. [default: 64 and 128]", min=1, max=256),
    ] = None,
    backend: Annotated[
        Optional[list[str]],
        typer.Option(help="Backend with kernels of ours, repeatable. [default: all]"),
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Choose by predicted bounds, without a GPU.")
    ] = False,
    gpu: Annotated[
        Optional[str],
        typer.Option(help=f"With --predict, the card: {', '.join(GPUS)}."),
    ] = None,
    table: Annotated[
        Optional[Path],
        typer.Option(help="File of the result. [default: the user's cache, which is then used]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Store nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try launch configurations of our kernels and store the best.

    Measures on the GPU that is here.  With --predict it compiles every candidate for the named
    card and compares predicted bounds, which are no timings.
    """
    from sage_diffusion.attend import backends, launches
    from sage_diffusion.kernels.attention import tuning
    from sage_diffusion.kernels.spec import LADDER
    from sage_diffusion.speed import tune as tuner
    from sage_diffusion.speed.bench import MEASURED, PREDICTED
    from sage_diffusion.speed.cost import gpu_named
    from sage_diffusion.speed.timing import find_card

    ours = backends.ours()
    names = tuple(backend or ours)
    for name in names:
        if name not in ours:
            raise CommandError(f"backend must be one of {', '.join(ours)}, got {name!r}")
    card = None
    if predict:
        if gpu is None:
            raise CommandError(f"--predict needs --gpu, one of {', '.join(GPUS)}")
        card_name, arch = gpu, gpu_named(gpu).arch
    else:
        if gpu is not None:
            raise CommandError(
                "--gpu needs --predict: without it the card that is here is measured"
            )
        card = find_card()
        if card is None:
            raise CommandError(
                "no CUDA or ROCm device is here to measure on; --predict --gpu rtx4090 chooses by "
                "predicted bounds"
            )
        card_name, arch = card.name, tuning.architecture(card.device)
    path = table or launches.default_path()
    if not dry_run:
        launches.read(path)  # a broken table is found before anything is measured
    choices, refused = [], {}
    with quiet_stdout(), progress() as bar:
        task = bar.add_task("tune", total=None)
        for name in names:
            for kernel in tuner.specs_of(name, spec or LADDER):
                for dim in head_dim or (64, 128):
                    bar.update(task, description=f"{name} {kernel} {dim}")
                    reason = tuner.refusal(name, kernel, dim, arch)
                    if reason is not None:
                        refused[f"{name} {kernel.formats} {dim}"] = reason
                    elif card is None:
                        choices.append(tuner.predict(name, kernel, dim, card_name))
                    else:
                        choices.append(tuner.measure(name, kernel, dim, card, arch=arch))
                    bar.advance(task)
    if not choices:
        reasons = "; ".join(f"{kernel}: {reason}" for kernel, reason in refused.items())
        raise CommandError(f"nothing to tune on {card_name}: {reasons or 'no kernel of ours'}")
    source = PREDICTED if predict else MEASURED
    if not dry_run:
        launches.write(path, tuner.entries(choices, card_name, arch, source))
    document = {
        "label": source,
        "gpu": card_name,
        "arch": arch,
        "table": None if dry_run else str(path),
        "kernels": [choice.as_dict() for choice in choices],
        "refused": refused,
    }
    where = "Nothing was stored." if dry_run else f"Stored in {path}"
    emit(as_json, document, _table(choices, f"{card_name} ({source})", predict), where)


def _table(choices: list[Choice], title: str, predicted: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        caption="*: best; =: built in",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("kernel", "head dim", "launch"):
        table.add_column(heading, no_wrap=True)
    figures = ("cycles >=", "second pipe") if predicted else ("ms",)
    for heading in (*figures, ""):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note")
    for choice in choices:
        for trial in choice.trials:
            value = "-" if trial.value is None else f"{trial.value:.{1 if predicted else 3}f}"
            second = "-" if trial.second is None else f"{trial.second:.2f}"
            table.add_row(
                f"{choice.backend} {choice.spec.formats}",
                str(choice.head_dim),
                ", ".join(f"{name} {knob}" for name, knob in trial.launch.items()),
                *((value, second) if predicted else (value,)),
                "*" * (trial is choice.best) + "=" * trial.built_in,
                trial.note,
            )
    return table
