"""Pictures and text as ComfyUI's IMAGE."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_ROW, _PAD = 14, 8


def as_image(picture: Image.Image) -> Tensor:
    """A PIL picture as ComfyUI's IMAGE, ``[1, H, W, 3]`` float32 in 0 .. 1."""
    rgb = picture.convert("RGB")
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return (pixels.float() / 255).reshape(1, rgb.height, rgb.width, 3)


def from_png(data: bytes) -> Tensor:
    """PNG bytes as ComfyUI's IMAGE."""
    from PIL import Image

    return as_image(Image.open(io.BytesIO(data)))


def note(text: str) -> Tensor:
    """A few lines of text as ComfyUI's IMAGE, where there is nothing to draw."""
    from PIL import Image, ImageDraw, ImageFont

    lines = re.findall(r".{1,70}(?:\s|$)", text) or [""]
    image = Image.new("RGB", (480, 2 * _PAD + _ROW * len(lines)), "white")
    canvas = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        canvas.text((_PAD, _PAD + i * _ROW), line, "black", ImageFont.load_default())
    return as_image(image)
