"""``sage-diffusion vq``: pictures as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import AsJson, CommandError, emit, progress, quiet_stdout

if TYPE_CHECKING:
    from torch import Tensor

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
Images = Annotated[list[Path], typer.Argument(metavar="IMAGE..", help="Pictures.")]

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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
    pixels, note = _cropped(_read(image), loaded.traits.factor, image)
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
    paths = _write_all(out, pixels)
    document = {"files": [str(path) for path in paths], "picture": list(pixels.shape[:1:-1])}
    emit(as_json, document, *(f"wrote {path}" for path in paths))


@app.command("fill")
def fill(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file of ids (.vqt).")],
    model: Annotated[
        Path, typer.Option(help="A fill model: a folder of one, or of an aMUSEd pipeline.")
    ],
    mask: Annotated[Path, typer.Option(help="A picture of the decoded size, white where to fill.")],
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
    where = token_mask(_read(mask)[0].mean(0), loaded.traits.factor)
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
    paths = _write_all(out, loaded.decode(ids))
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
        pictures = (_cropped(_read(path), traits.factor, path)[0] for path in _pictures(images))
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
        levels=_numbers("--levels", levels),
        scales=_numbers("--scales", scales),
    )
    document = {
        "out": str(out),
        "family": loaded.traits.family,
        "codebook_size": loaded.codebook_size,
        "fingerprint": loaded.fingerprint,
    }
    emit(as_json, document, f"{out}: {loaded.traits.family}, {loaded.codebook_size} codes")


@app.command("train")
def train(
    images: Images,
    out: Annotated[Path, typer.Option(help="The tokenizer; it must not exist.")],
    steps: Annotated[int, typer.Option(help="Of the optimizer.", min=1)] = 2000,
    batch: Annotated[int, typer.Option(help="Crops a step.", min=1)] = 16,
    crop: Annotated[int, typer.Option(help="Side of a crop in pixels.", min=4)] = 64,
    quantizer: Annotated[
        str, typer.Option(help="vector (moving averages, k-means, revival), simvq, ibq, bsq, lfq.")
    ] = "vector",
    codes: Annotated[
        int, typer.Option(help="Codebook size; of bsq and lfq a power of two.", min=2)
    ] = 4096,
    dim: Annotated[int, typer.Option(help="Dims of the latents.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of weights and crops.")] = 0,
    checkpoint: Annotated[
        Optional[Path], typer.Option(help="To stop and go on; removed when done.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small tokenizer on your own pictures, on the CPU, 8 x 8 pixels a token."""
    import torch

    from sage_diffusion.vq.checkpoints import save_tokenizer
    from sage_diffusion.vq.families import compact
    from sage_diffusion.vq.quantizers import build
    from sage_diffusion.vq.training import Step, Training
    from sage_diffusion.vq.training import train as run

    if out.exists():
        raise CommandError(f"{out} exists; nothing is overwritten")
    settings: dict[str, Any] = {"kind": quantizer, "dim": dim, "codebook_size": codes}
    if quantizer in ("bsq", "lfq"):
        del settings["codebook_size"]
        settings["width"] = codes.bit_length() - 1
        if 2 ** settings["width"] != codes:
            raise CommandError(f"--codes must be a power of two for {quantizer}, got {codes}")
    pictures = [(_read(path)[0] * 255).round().to(torch.uint8) for path in _pictures(images)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = compact.make(build(settings))
    training = Training(steps=steps, batch=batch, crop=crop, seed=seed)
    last: list[Step] = []
    with quiet_stdout(), progress() as bar:
        task = bar.add_task("train", total=steps)

        def report(step: Step) -> None:
            last[:] = [*last[-99:], step]
            bar.update(task, completed=step.step, description=f"{step.psnr:.1f} dB")

        run(made, pictures, training, checkpoint=checkpoint, progress=report)
    save_tokenizer(out, made)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    mean = sum(step.psnr for step in last) / max(len(last), 1)
    document = {
        "out": str(out),
        "steps": steps,
        "pictures": len(pictures),
        "psnr_of_last_100_batches": mean if last else None,
        "fingerprint": made.fingerprint,
    }
    emit(as_json, document, f"{out}: {steps} steps, {mean:.2f} dB in the last 100 batches")


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Of "8,8,5"."""
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise CommandError(f"{option} must be numbers like 8,8,5, got {text}") from None


def _ends(value: float | tuple[float, ...]) -> str:
    """One end of a range, or of each colour's."""
    return "/".join(f"{x:.4g}" for x in (value if isinstance(value, tuple) else (value,)))


def _pictures(paths: list[Path]) -> list[Path]:
    """Files, and those of folders, in order."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _ENDINGS)
            if not inside:
                raise CommandError(f"{path} must hold pictures ({', '.join(_ENDINGS)}), found none")
            found += inside
        else:
            found.append(path)
    return found


def _read(path: Path) -> Tensor:
    """``[1, 3, H, W]`` in 0 .. 1."""
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise CommandError(f"{path} must be a picture, there is none") from None
    except (UnidentifiedImageError, OSError) as error:
        raise CommandError(f"{path} is no picture that can be read: {error}") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _cropped(pixels: Tensor, factor: int, path: Path) -> tuple[Tensor, list[int] | None]:
    """The middle of whole tokens, and width and height before if they were others."""
    from sage_diffusion.vq.tokenizer import TokenizerError, cropped

    try:
        return cropped(pixels, factor)
    except TokenizerError as error:
        raise CommandError(f"{path}: {error}") from None


def _write_all(out: Path, pixels: Tensor) -> list[Path]:
    """One picture into ``out``, several into numbered files beside it."""
    paths = [
        out if len(pixels) == 1 else out.with_stem(f"{out.stem}_{i:03}") for i in range(len(pixels))
    ]
    for path, picture in zip(paths, pixels, strict=True):
        _write(path, picture)
    return paths


def _write(path: Path, pixels: Tensor) -> None:
    """A picture ``[3, H, W]`` in 0 .. 1, in the format of the file's ending."""
    import io

    import torch
    from PIL import Image

    from sage_diffusion.files import write_bytes

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise CommandError(f"--out must end like a picture (.png, .jpg, ..), got {path.name}")
    array = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    write_bytes(path, buffer.getvalue())
