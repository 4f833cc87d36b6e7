"""A plan as a picture: one row per layer, one column per step, one colour per spec."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.plan import PrecisionPlan, step_progress

if TYPE_CHECKING:
    from PIL import Image

#: From "as it was" to "fastest"; readable for colour-blind people, light on both themes.
_COLOURS = {
    "fp16": (224, 224, 224),
    "int8/fp16": (198, 219, 239),
    "int8/int8": (158, 202, 225),
    "int8/fp8": (107, 174, 214),
    "int8/fp8-fast": (49, 130, 189),
    "int4/int8": (253, 208, 162),
    "int4/fp8-fast": (253, 141, 60),
    "fp4/fp8-fast": (230, 85, 13),
    "fp4/fp4": (166, 54, 3),
}
_OTHER = (188, 189, 220)  # a spec that is no name of the ladder

_ROW, _PAD = 14, 8


def plan_layers(plan: PrecisionPlan) -> list[str]:
    """Rows for a plan without a model: its own globs, and one line for everything else."""
    globs = dict.fromkeys(rule.layers for rule in plan.rules if rule.layers.strip("*"))
    return [*globs, "(other layers)"]


def grid(
    plan: PrecisionPlan, layers: Sequence[str], steps: int, branch: str | None, tokens: int
) -> list[list[AttentionSpec]]:
    """The spec of every layer (row) at every step (column)."""
    return [
        [
            plan.resolve(layer, step_progress(step, steps), branch=branch, tokens=tokens)
            for step in range(steps)
        ]
        for layer in layers
    ]


def shares(cells: Sequence[Sequence[AttentionSpec]]) -> dict[str, float]:
    """Share of each spec over all cells, largest first."""
    names = [str(spec) for row in cells for spec in row]
    counts = {name: names.count(name) / len(names) for name in dict.fromkeys(names)}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def draw(
    cells: Sequence[Sequence[AttentionSpec]], layers: Sequence[str], title: str
) -> Image.Image:
    """The picture, with a legend of the specs that occur."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    steps = len(cells[0]) if cells else 0
    left = _PAD * 2 + int(max([font.getlength(name) for name in layers] or [0]))
    column = max(10, min(28, 560 // max(steps, 1)))
    named = sorted(
        {str(spec) for row in cells for spec in row},
        key=lambda name: (LADDER.index(name) if name in LADDER else len(LADDER), name),
    )
    top = _PAD * 2 + _ROW
    bottom = top + _ROW * len(layers)
    width = int(max(left + column * steps + _PAD, font.getlength(title) + 2 * _PAD, 320))
    image = Image.new("RGB", (width, bottom + 2 * _ROW + _PAD + _ROW * len(named)), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((_PAD, _PAD), title, "black", font)
    for i, (name, row) in enumerate(zip(layers, cells, strict=True)):
        y = top + i * _ROW
        canvas.text((_PAD, y), name, "black", font)
        for step, spec in enumerate(row):
            x = left + step * column
            colour = _COLOURS.get(str(spec), _OTHER)
            canvas.rectangle((x, y, x + column - 2, y + _ROW - 2), colour)
    every = max(1, -(-24 // column))
    for step in range(0, steps, every):
        canvas.text((left + step * column, bottom), str(step), "black", font)
    parts = shares(cells) if cells else {}
    for i, name in enumerate(named):
        y = bottom + 2 * _ROW + i * _ROW
        canvas.rectangle((_PAD, y, _PAD + 18, y + _ROW - 3), _COLOURS.get(name, _OTHER))
        canvas.text((_PAD + 26, y), f"{name}  {parts[name]:.0%}", "black", font)
    return image


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


def matching(layers: Sequence[str], patterns: str) -> list[str]:
    """Layers that one of the globs (separated by commas or spaces) names; all for no glob."""
    globs = [glob for glob in re.split(r"[,\s]+", patterns) if glob] or ["*"]
    return [name for name in layers if any(fnmatchcase(name, glob) for glob in globs)]
