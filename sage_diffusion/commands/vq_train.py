"""``sage-diffusion vq train`` and ``vq repair``: what makes new tokenizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout
from sage_diffusion.commands.vq_pictures import for_training, numbers, write

if TYPE_CHECKING:
    from sage_diffusion.vq.training import Step

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

Images = Annotated[list[Path], typer.Argument(metavar="IMAGE..", help="Pictures and folders.")]
Steps = Annotated[int, typer.Option(help="Of the optimizer.", min=1)]
Batch = Annotated[int, typer.Option(help="Crops a step.", min=1)]
Crop = Annotated[int, typer.Option(help="Side of a crop in pixels.", min=4)]
Checkpoint = Annotated[Optional[Path], typer.Option(help="To stop and go on; removed when done.")]
Preview = Annotated[
    Optional[Path],
    typer.Option(help="Picture of crops and what becomes of them, written every 100 steps."),
]

#: Steps between previews.
_EVERY = 100


def train(
    images: Images,
    out: Annotated[Path, typer.Option(help="The tokenizer; it must not exist.")],
    steps: Steps = 2000,
    batch: Batch = 16,
    crop: Crop = 64,
    quantizer: Annotated[
        str,
        typer.Option(
            help="vector (moving averages, k-means, revival), cosine (by angle), simvq, ibq, fsq, "
            "bsq, lfq."
        ),
    ] = "vector",
    codes: Annotated[
        int, typer.Option(help="Of each group and level; of fsq, bsq, lfq a power of two.", min=2)
    ] = 4096,
    levels: Annotated[
        Optional[str], typer.Option(help="Of fsq, in place of codes, e.g. 8,5,5,5.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Channels are split into so many.", min=1)] = 1,
    depth: Annotated[int, typer.Option(help="Residual levels.", min=1)] = 1,
    dim: Annotated[int, typer.Option(help="Dims of the latents.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of weights and crops.")] = 0,
    checkpoint: Checkpoint = None,
    preview: Preview = None,
    as_json: AsJson = False,
) -> None:
    """Train a small tokenizer on your own pictures, on the CPU, 8 x 8 pixels a token."""
    import torch

    from sage_diffusion.vq.checkpoints import save_tokenizer
    from sage_diffusion.vq.families import compact
    from sage_diffusion.vq.quantizers.recipes import recipe
    from sage_diffusion.vq.training import Training
    from sage_diffusion.vq.training import train as run

    _check_new(out)
    fsq = numbers("--levels", levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = compact.make(recipe(quantizer, codes, dim, levels=fsq, groups=groups, depth=depth))
    pictures = for_training(images)
    training = Training(steps=steps, batch=batch, crop=crop, seed=seed)
    with _watched(steps, lambda: _preview(preview, made, pictures, crop)) as (report, last):
        run(made, pictures, training, checkpoint=checkpoint, progress=report)
    save_tokenizer(out, made)
    _done(checkpoint)
    mean = sum(step.psnr for step in last) / max(len(last), 1)
    document = {
        "out": str(out),
        "steps": steps,
        "pictures": len(pictures),
        "quantizer": made.quantizer.settings,
        "bits_per_token": made.bits,
        "psnr_of_last_100_batches": mean if last else None,
        "fingerprint": made.fingerprint,
    }
    emit(as_json, document, f"{out}: {steps} steps, {mean:.2f} dB in the last 100 batches")


def repair(
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="One whose codes died.")],
    images: Images,
    out: Annotated[Path, typer.Option(help="The new tokenizer; it must not exist.")],
    method: Annotated[
        str, typer.Option(help="kmeans of the latents, or simvq with a fresh basis.")
    ] = "kmeans",
    parts: Annotated[
        str, typer.Option(help="What learns: all, or decoder (and codes), the encoder stays.")
    ] = "all",
    steps: Steps = 500,
    batch: Batch = 16,
    crop: Crop = 64,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    held_out: Annotated[
        Optional[Path], typer.Option(help="Picture or folder for the figures alone.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="To count, the same for figures that compare.", min=1)
    ] = 25_600,
    seed: Annotated[int, typer.Option(help="Of codes and crops.")] = 0,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """New codes for a tokenizer that uses hardly any, trained with its decoder."""
    from sage_diffusion.vq.checkpoints import check_writable, load_tokenizer, save_tokenizer
    from sage_diffusion.vq.repair import repair as run
    from sage_diffusion.vq.training import Training

    _check_new(out)
    loaded = load_tokenizer(tokenizer)
    check_writable(loaded)
    pictures = for_training(images)
    judged = [] if held_out is None else for_training([held_out])
    training = Training(
        steps=steps, batch=batch, crop=crop, learning_rate=learning_rate, seed=seed, parts=parts
    )
    with _watched(steps, lambda: None) as (report, _):
        found = run(
            loaded,
            pictures,
            training,
            method=method,
            held_out=judged,
            checkpoint=checkpoint,
            progress=report,
            tokens=tokens,
        )
    save_tokenizer(out, found.tokenizer)
    _done(checkpoint)
    document = {
        "out": str(out),
        "method": method,
        "parts": parts,
        "steps": steps,
        "held_out": len(judged),
        **found.as_dict(),
        "fingerprint": found.tokenizer.fingerprint,
    }
    emit(as_json, document, str(found), f"wrote {out}")


def _check_new(out: Path) -> None:
    if out.exists():
        raise CommandError(f"{out} exists; nothing is overwritten")


def _done(checkpoint: Path | None) -> None:
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def _preview(path: Path | None, made: Any, pictures: list[Any], crop: int) -> None:
    from sage_diffusion.vq.training import preview

    if path is not None:
        write(path, preview(made, pictures, crop)[0])


@contextlib.contextmanager
def _watched(
    steps: int, show: Callable[[], None]
) -> Iterator[tuple[Callable[[Step], None], list[Step]]]:
    """What is called after every step, and the last 100 of them."""
    last: list[Step] = []
    with quiet_stdout(), progress() as bar:
        task = bar.add_task("train", total=steps)

        def report(step: Step) -> None:
            last[:] = [*last[-99:], step]
            bar.update(task, completed=step.step, description=f"{step.psnr:.1f} dB")
            if step.step % _EVERY == 0 or step.step == steps:
                show()

        yield report, last
