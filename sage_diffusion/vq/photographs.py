"""Picture files, read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sage_diffusion.vq.tokenizer import TokenizerError

#: Endings of the files that count as pictures in a folder.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

#: Longest side of pictures for training: no crop shows finer detail.
LONGEST = 2048


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """Files, and those that lie in folders, in order.

    Raises:
        TokenizerError: a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS)
            if not inside:
                raise TokenizerError(
                    f"{path} must hold pictures ({', '.join(ENDINGS)}), found none"
                )
            found += inside
        else:
            found.append(path)
    return found


def load_picture(path: Path, longest: int | None = None) -> Tensor:
    """``[3, H, W]`` uint8, turned as its camera says.

    Args:
        path: of the file.
        longest: side that larger pictures are scaled down to; None: as they are.

    Raises:
        TokenizerError: it is no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise TokenizerError(f"{path} must be a picture, there is none") from None
    except (UnidentifiedImageError, OSError) as error:
        raise TokenizerError(f"{path} is no picture that can be read: {error}") from None
    if longest is not None:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
