"""``sage-diffusion kv``: a model's past in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, quiet_stdout

if TYPE_CHECKING:
    from torch import Tensor

    from sage_diffusion.kv.calibration import Calibration

app = typer.Typer(help="Compress the K and V that a model keeps.", no_args_is_help=True)

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder of a model of transformers, or its GGUF.")
]


def _reading(model: Path, needed: bool = True) -> tuple[Any, Any]:
    """A model and its tokenizer, which it must have where texts are read."""
    from sage_diffusion.integrations.transformers.loading import load_model

    with quiet_stdout():
        loaded, tokenizer = load_model(model)
    if needed and tokenizer is None:
        raise CommandError(f"{model} must have a tokenizer to read a text, it has none")
    return loaded, tokenizer


def _ids(tokenizer: Any, path: Path) -> Tensor:
    """Tokens ``[n]`` of a text, one at least."""
    text = path.read_text(encoding="utf-8")
    if not text:
        raise CommandError(f"{path} must have some text, it is empty")
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids


def _calibration(path: Path | None) -> Calibration | None:
    from sage_diffusion.kv.calibration import Calibration

    return None if path is None else Calibration.load(path)


GivenCalibration = Annotated[
    Optional[Path], typer.Option(help="Of this model, as `kv calibrate` writes it.")
]


@app.command("report")
def report(
    model: Model,
    preset: Annotated[str, typer.Option(help="How to compress.")] = "k3v2",
    text: Annotated[
        Optional[Path], typer.Option(help="A prompt; without it, tokens are drawn at random.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the prompt, at most.", min=1)] = 1024,
    new: Annotated[int, typer.Option(help="Tokens decoded after it.", min=0)] = 8,
    sink: Annotated[int, typer.Option(help="First tokens that stay exact.", min=0)] = 32,
    window: Annotated[int, typer.Option(help="Last tokens that stay exact.", min=0)] = 128,
    calibration: GivenCalibration = None,
    as_json: AsJson = False,
) -> None:
    """What a compressed cache takes, measured on a prompt and a few decoded tokens."""
    import torch

    from sage_diffusion.integrations.transformers.cache import KVCache, argument

    given = _calibration(calibration)
    loaded, tokenizer = _reading(model, text is not None)
    with quiet_stdout():
        cache = KVCache.for_model(loaded, preset, given, sink=sink, window=window)
    if text is None:
        size = loaded.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (1, tokens), generator=generator)
    else:
        ids = _ids(tokenizer, text)[None, :tokens]
    name = argument(loaded)
    with torch.no_grad():
        for _ in range(1 + new):
            logits = loaded(ids, **{name: cache}, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
    found = cache.report()
    emit(as_json, found.to_dict(), str(found))


Texts = Annotated[list[Path], typer.Option("--text", help="A text; give it again for more.")]


@app.command("calibrate")
def calibrate(
    model: Model,
    text: Texts,
    out: Annotated[Path, typer.Option(help="File of the calibration.")] = Path("kv.safetensors"),
    draws: Annotated[
        int, typer.Option(help="Backward passes for each chunk; 0: plain covariance.", min=0)
    ] = 2,
    train: Annotated[
        int, typer.Option(help="Steps of training the rotations of `matryoshka`.", min=0)
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what a model's K, V and gradients are like, for the calibrated presets."""
    from sage_diffusion.integrations.transformers.kv_calibration import Recipe
    from sage_diffusion.integrations.transformers.kv_calibration import calibrate as measure

    loaded, tokenizer = _reading(model)
    texts = [path.read_text(encoding="utf-8") for path in text]
    loaded = loaded.float()
    made = measure(loaded, texts, tokenizer, recipe=Recipe(draws=draws))
    if train:
        from sage_diffusion.integrations.transformers import kv_matryoshka

        training = kv_matryoshka.Training(steps=train)
        made = kv_matryoshka.train(loaded, made, texts, tokenizer, training=training)
    made.save(out)
    document = {"out": str(out), "bytes": out.stat().st_size, "fingerprint": made.fingerprint}
    about = made.about
    lines = [
        f"{out}: {document['bytes']} bytes, of {about['tokens']} tokens and "
        f"{about['gradients']} gradients"
    ]
    if train:
        at = about["matryoshka"]
        kept = "trained" if at["trained"] else "principal components, training did not help"
        lines.append(
            f"rotations at half of the channels, KL on chunks left out: {at['before']:.4f} -> "
            f"{at['after']:.4f} ({kept})"
        )
    emit(as_json, document | {"about": about}, *lines)


@app.command("bench")
def bench(
    model: Model,
    text: Annotated[Path, typer.Option(help="What is scored; not what was calibrated on.")],
    preset: Annotated[list[str], typer.Option(help="How to compress; give it again for more.")],
    calibration: GivenCalibration = None,
    tokens: Annotated[int, typer.Option(help="Prefilled, and compressed.", min=256)] = 3584,
    scored: Annotated[int, typer.Option(help="Tokens after them, at most.", min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """What presets do to a model's predictions, and the bits that they take."""
    from dataclasses import asdict

    from sage_diffusion.integrations.transformers.cache import KVCache
    from sage_diffusion.integrations.transformers.kv_evaluate import judge, passage
    from sage_diffusion.kv.presets import method

    methods = {name: method(name) for name in preset}
    found = _calibration(calibration)
    loaded, tokenizer = _reading(model)
    for made in methods.values():  # what can't be is said before anything runs
        KVCache.for_model(loaded, made, found)
    ids = _ids(tokenizer, text)
    if ids.numel() < tokens + 2:
        raise CommandError(f"{text} must have more than {tokens + 1} tokens, it has {ids.numel()}")
    scored = min(scored, ids.numel() - tokens - 1)
    exact = passage(loaded, ids[: tokens + scored + 1], tokens)
    rows, lines = {}, []
    for name, made in methods.items():
        verdict = judge(loaded, exact, made, found, scored=scored)
        at, bits = verdict.agreement, verdict.bits
        rows[name] = asdict(at) | {"body_bits": bits.body, "all_in_bits": bits.all_in(tokens)}
        lines.append(
            f"{name}: {bits.body:.2f} bits ({bits.all_in(tokens):.2f} all in), KL {at.kl:.5f}, "
            f"top-1 {at.top1:.3f}, perplexity {at.perplexity:.3f} ({at.exact_perplexity:.3f})"
        )
    lines.append(f"{scored} tokens scored after {tokens}")
    emit(as_json, {"tokens": tokens, "scored": scored, "presets": rows}, *lines)


@app.command("convert")
def convert(
    model: Model,
    text: Texts,
    judged: Annotated[
        Path, typer.Option(help="Text whose first chunk tells what the conversion costs.")
    ],
    rank: Annotated[int, typer.Option(help="Of the latent that a token keeps.", min=1)],
    rope: Annotated[int, typer.Option(help="Channels that keep RoPE.", min=0)],
    out: Annotated[Path, typer.Option(help="File of the maps.")] = Path("transmla.safetensors"),
    chunk: Annotated[int, typer.Option(help="Tokens of a text looked at at once.", min=32)] = 640,
    as_json: AsJson = False,
) -> None:
    """Convert a model's attention to one latent for all heads (TransMLA), and say what it costs."""
    from sage_diffusion.integrations.transformers import transmla
    from sage_diffusion.kv.transmla import Sizes

    loaded, tokenizer = _reading(model)
    texts = [part for path in text for part in _ids(tokenizer, path).split(chunk)]
    ids = _ids(tokenizer, judged)[:chunk]
    sizes, loaded = Sizes(rank, rope), loaded.float()
    grams = transmla.measure(loaded, texts)
    made = transmla.convert(loaded, grams, sizes)
    partial = transmla.convert(loaded, grams, transmla.full_rank(sizes, made.width))
    found = transmla.cost(loaded, ids, made, partial)
    made.save(out)
    document = {"out": str(out), "bytes": out.stat().st_size, **found.as_dict()}
    lines = [
        f"{out}: {found.numbers} numbers a token instead of {found.before}, KL {found.whole.kl:.3f}"
        f" ({found.partial.kl:.3f} of it for RoPE that is dropped), perplexity "
        f"{found.whole.exact_perplexity:.2f} -> {found.whole.perplexity:.2f}"
    ]
    if found.warning:
        lines.append(f"warning: {found.warning}")
    emit(as_json, document, *lines)
