"""``sage-diffusion vq``: pictures as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, emit, quiet_stdout
from sage_diffusion.commands.vq_pictures import (
    numbers,
    read,
    whole_tokens,
    write_all,
)
from sage_diffusion.commands.vq_train import repair, train

app = typer.Typer(help="Encode pictures to tokens and back.", no_args_is_help=True)

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

TokenizerPath = Annotated[
    Path,
    typer.Option(
        "--tokenizer",
        help='"bundled", a .safetensors file, or a folder as diffusers writes it.',
    ),
]
_BUNDLED = Path("bundled")


@app.command("encode")
def encode(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    tokenizer: TokenizerPath = _BUNDLED,
    out: Annotated[Path, typer.Option(help="File of ids.")] = Path("tokens.vqt"),
    as_json: AsJson = False,
) -> None:
    """A picture to ids, packed to their bits.  Sides are cropped to whole tokens, centred."""
    from sage_diffusion.vq.checkpoints import load_tokenizer
    from sage_diffusion.vq.idfile import Tokens, save_tokens
    from sage_diffusion.vq.tokenizer import psnr

    loaded = load_tokenizer(tokenizer)
    pixels, note = whole_tokens(read(image), loaded.traits.factor, image)
    ids = loaded.encode(pixels)
    save_tokens(out, Tokens.of(loaded, ids))
    size = out.stat().st_size
    height, width = pixels.shape[2:]
    document: dict[str, Any] = {
        "out": str(out),
        "picture": [width, height],
        "cropped_from": note,
        "tokens": list(ids.shape[1:]),
        "codebook_size": loaded.codebook_size,
        "bytes": size,
        "bits_per_pixel": 8 * size / (width * height),
        "bits_per_token": 8 * size / (ids.shape[1] * ids.shape[2]),
        "psnr": None if loaded.decoder is None else psnr(loaded.decode(ids), pixels),
    }
    lines = [
        f"{out}: {width} x {height} pixels, {ids.shape[2]} x {ids.shape[1]} tokens, {size} bytes "
        f"({document['bits_per_pixel']:.3f} bits a pixel)"
    ]
    if note:
        lines.append(f"cropped from {note[0]} x {note[1]} to whole tokens")
    if document["psnr"] is not None:
        lines.append(f"decoded again: {document['psnr']:.2f} dB")
    emit(as_json, document, *lines)


@app.command("decode")
def decode(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file of ids (.vqt).")],
    tokenizer: TokenizerPath = _BUNDLED,
    out: Annotated[Path, typer.Option(help="The picture; of several, one file each.")] = Path(
        "decoded.png"
    ),
    as_json: AsJson = False,
) -> None:
    """Ids to a picture, with the tokenizer that made them."""
    from sage_diffusion.vq.checkpoints import load_tokenizer
    from sage_diffusion.vq.idfile import load_tokens

    found, loaded = load_tokens(tokens), load_tokenizer(tokenizer)
    found.check(loaded)
    pixels = loaded.decode(found.ids)
    paths = write_all(out, pixels)
    document = {"files": [str(path) for path in paths], "picture": list(pixels.shape[:1:-1])}
    emit(as_json, document, *(f"wrote {path}" for path in paths))


@app.command("fill")
def fill(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file of ids (.vqt).")],
    mask: Annotated[Path, typer.Option(help="A picture of the decoded size, white where to fill.")],
    model: Annotated[
        Path, typer.Option(help='"bundled", a folder of a fill model, or of an aMUSEd pipeline.')
    ] = _BUNDLED,
    tokenizer: TokenizerPath = _BUNDLED,
    out: Annotated[Path, typer.Option(help="The picture; of several, one file each.")] = Path(
        "filled.png"
    ),
    seed: Annotated[int, typer.Option(help="Of the first variant; the next has the next.")] = 0,
    steps: Annotated[int, typer.Option(help="Of the model.", min=1)] = 12,
    variants: Annotated[int, typer.Option(help="Of the picture.", min=1)] = 1,
    temperature: Annotated[
        float, typer.Option(help="Of the first step's noise in what is kept; the last has none.")
    ] = 2.0,
    guidance: Annotated[float, typer.Option(help="Towards the prompt; 1: none.")] = 1.0,
    prompt: Annotated[str, typer.Option(help="A text, or a class of the model.")] = "",
    attention: Annotated[
        Optional[str], typer.Option(help="Spec or plan of the model's attention, e.g. int8/fp8.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Complete the tokens under a mask, in as many variants as wanted."""
    from sage_diffusion.vq.checkpoints import load_tokenizer
    from sage_diffusion.vq.fill import load_fill, token_mask
    from sage_diffusion.vq.idfile import load_tokens

    found, loaded = load_tokens(tokens), load_tokenizer(tokenizer)
    found.check(loaded)
    with quiet_stdout():
        filler = load_fill(model, attention)
    filler.check(loaded)
    where = token_mask(read(mask)[0].mean(0), loaded.traits.factor)
    ids = filler.fill(
        found.ids,
        where,
        seed=seed,
        steps=steps,
        variants=variants,
        temperature=(temperature, 0.0),
        guidance=guidance,
        prompt=prompt,
    )
    paths = write_all(out, loaded.decode(ids))
    document = {
        "files": [str(path) for path in paths],
        "tokens": list(found.ids.shape[1:]),
        "masked": int(where.sum()),
        "seeds": [seed + i for i in range(variants)],
    }
    emit(as_json, document, f"{int(where.sum())} tokens filled", *(f"wrote {p}" for p in paths))


@app.command("inspect")
def inspect(
    tokenizer: TokenizerPath = _BUNDLED,
    images: Annotated[
        Optional[list[Path]],
        typer.Argument(metavar="[IMAGE..]", help="Pictures or folders to count the codes of."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to count, the same for figures that compare.", min=1)
    ] = 25_600,
    as_json: AsJson = False,
) -> None:
    """What a tokenizer is, and how pictures use its codes."""
    from sage_diffusion.vq.checkpoints import load_tokenizer
    from sage_diffusion.vq.photographs import picture_files
    from sage_diffusion.vq.usage import usage

    loaded = load_tokenizer(tokenizer)
    traits = loaded.traits
    document: dict[str, Any] = {
        "family": traits.family,
        "quantizer": loaded.quantizer.settings,
        "codebook_size": loaded.codebook_size,
        "levels": loaded.quantizer.levels,
        "bits_per_token": loaded.bits,
        "factor": traits.factor,
        "range": [traits.low, traits.high],
        "offset": traits.offset,
        "decodes": loaded.decoder is not None,
        "fingerprint": loaded.fingerprint,
        "usage": None,
    }
    lines = [
        f"{traits.family}: {loaded.quantizer.settings['kind']}, {loaded.codebook_size} codes, "
        f"{loaded.bits:.2f} bits a token of {traits.factor} x {traits.factor} pixels",
        f"pictures in {_ends(traits.low)} .. {_ends(traits.high)}, ids from {traits.offset} on in "
        f"a generator's vocabulary, fingerprint {loaded.fingerprint}",
    ]
    if traits.no_decoder:
        lines.append(f"can't decode: {traits.no_decoder}")
    if images:
        pictures = (
            whole_tokens(read(path), traits.factor, path)[0] for path in picture_files(images)
        )
        with quiet_stdout():
            found = usage(loaded, pictures, tokens)
        document["usage"] = found.as_dict()
        lines += [
            f"{found.used} of {found.codes} codes in {found.tokens} tokens (even use would show "
            f"{found.even:.0f}), {found.dead} unused",
            f"entropy {found.entropy_bits:.2f} bits, as {found.perplexity:.0f} codes used evenly",
            f"effective rank of the latents {found.effective_rank:.1f} of {found.dim}",
            "most used: " + ", ".join(f"{code} ({count})" for code, count in found.most),
        ]
    emit(as_json, document, *lines)


@app.command("convert")
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A .ckpt, .pt or .bin file.")],
    out: Annotated[Path, typer.Option(help="The new file; it must not exist.")],
    metric: Annotated[
        Optional[str],
        typer.Option(help="Of the codes, where keys do not tell: l2, cosine, dot (small IBQ)."),
    ] = None,
    levels: Annotated[
        Optional[str], typer.Option(help="Of a VQGAN that rounds (FSQ), e.g. 8,8,8,8.")
    ] = None,
    scales: Annotated[
        Optional[str], typer.Option(help="Sides of VAR's grids, where they are not for 256 pixels.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A pickled tokenizer checkpoint to safetensors, without running its code."""
    from sage_diffusion.vq.checkpoints import convert as rewrite

    loaded = rewrite(
        checkpoint,
        out,
        metric=metric,
        levels=numbers("--levels", levels),
        scales=numbers("--scales", scales),
    )
    document = {
        "out": str(out),
        "family": loaded.traits.family,
        "codebook_size": loaded.codebook_size,
        "fingerprint": loaded.fingerprint,
    }
    emit(as_json, document, f"{out}: {loaded.traits.family}, {loaded.codebook_size} codes")


app.command("train")(train)
app.command("repair")(repair)


def _ends(value: float | tuple[float, ...]) -> str:
    """One end of a range, or of each colour's."""
    return "/".join(f"{x:.4g}" for x in (value if isinstance(value, tuple) else (value,)))
