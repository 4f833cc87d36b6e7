"""Pictures and text as ComfyUI's IMAGE."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_ROW, _PAD = 14, 8
_PALE, _DARK = (255, 245, 235), (127, 39, 4)


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


def cell_map(values: Mapping[tuple[str, int], float], title: str) -> Tensor:
    """Values of (layer, step) as ComfyUI's IMAGE, layers down and steps across, darker for more.

    Args:
        values: one at least; shades go by the logarithm.
        title: stands above.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    layers = list(dict.fromkeys(layer for layer, _ in values))
    steps = max(step for _, step in values) + 1
    least = max(min(values.values()), 1e-6)
    span = math.log(max(*values.values(), least * 1.001) / least)
    left = 2 * _PAD + int(max(font.getlength(layer) for layer in layers))
    column = max(8, min(28, 560 // steps))
    scale = f"{title}: {least:.2g} (pale) .. {max(values.values()):.2g} (dark)"
    width = int(max(left + column * steps + _PAD, font.getlength(scale) + 2 * _PAD))
    image = Image.new("RGB", (width, 4 * _PAD + _ROW * (len(layers) + 2)), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((_PAD, _PAD), scale, "black", font)
    for i, layer in enumerate(layers):
        y = 2 * _PAD + _ROW * (i + 1)
        canvas.text((_PAD, y), layer, "black", font)
        for step in range(steps):
            if (layer, step) in values:
                share = math.log(max(values[layer, step], least) / least) / span
                shade = [round(a + (b - a) * share) for a, b in zip(_PALE, _DARK, strict=True)]
                x = left + step * column
                canvas.rectangle((x, y, x + column - 2, y + _ROW - 2), tuple(shade))
    for step in range(0, steps, max(1, -(-24 // column))):
        y = 2 * _PAD + _ROW * (len(layers) + 1)
        canvas.text((left + step * column, y), str(step), "black", font)
    return as_image(image)
