"""Pictures for commands: files, folders, reading and writing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sage_diffusion.commands.common import CommandError

if TYPE_CHECKING:
    from torch import Tensor


def numbers(option: str, text: str | None) -> list[int] | None:
    """Of "8,8,5"."""
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise CommandError(f"{option} must be numbers like 8,8,5, got {text}") from None


def read(path: Path) -> Tensor:
    """``[1, 3, H, W]`` in 0 .. 1."""
    from sage_diffusion.vq.photographs import load_picture

    return load_picture(path)[None].float() / 255


def for_training(paths: list[Path]) -> list[Tensor]:
    """Pictures of files and folders, ``[3, H, W]`` uint8."""
    from sage_diffusion.vq.photographs import LONGEST, load_picture, picture_files

    return [load_picture(path, LONGEST) for path in picture_files(paths)]


def whole_tokens(pixels: Tensor, factor: int, path: Path) -> tuple[Tensor, list[int] | None]:
    """The middle of whole tokens, and width and height before if they were others."""
    from sage_diffusion.vq.tokenizer import TokenizerError, cropped

    try:
        return cropped(pixels, factor)
    except TokenizerError as error:
        raise CommandError(f"{path}: {error}") from None


def write_all(out: Path, pixels: Tensor) -> list[Path]:
    """One picture into ``out``, several into numbered files beside it."""
    paths = [
        out if len(pixels) == 1 else out.with_stem(f"{out.stem}_{i:03}") for i in range(len(pixels))
    ]
    for path, picture in zip(paths, pixels, strict=True):
        write(path, picture)
    return paths


def write(path: Path, pixels: Tensor) -> None:
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
