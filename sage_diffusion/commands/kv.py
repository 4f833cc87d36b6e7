"""``sage-diffusion kv``: a model's past in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, quiet_stdout

app = typer.Typer(help="Compress the K and V that a model keeps.", no_args_is_help=True)

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder of a model of transformers, or its GGUF.")
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
    as_json: AsJson = False,
) -> None:
    """What a compressed cache takes, measured on a prompt and a few decoded tokens."""
    import torch

    from sage_diffusion.integrations.transformers.cache import KVCache, argument
    from sage_diffusion.integrations.transformers.loading import load_model

    with quiet_stdout():
        loaded, tokenizer = load_model(model)
        cache = KVCache.for_model(loaded, preset, sink=sink, window=window)
    if text is None:
        size = loaded.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (1, tokens), generator=generator)
    elif tokenizer is None:
        raise CommandError(f"{model} must have a tokenizer to read a text, it has none")
    else:
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :tokens]
    name = argument(loaded)
    with torch.no_grad():
        for _ in range(1 + new):
            logits = loaded(ids, **{name: cache}, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
    found = cache.report()
    emit(as_json, found.to_dict(), str(found))
