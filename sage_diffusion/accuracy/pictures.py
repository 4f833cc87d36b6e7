"""Pictures for reports: PNG bytes, amplified differences, and a labelled grid."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sage_diffusion.accuracy.records import Picture

if TYPE_CHECKING:
    from PIL import Image

#: Differences of quantized attention are a few grey levels: shown sixteen times as large.
GAIN = 16.0


def to_pil(image: Tensor) -> Image.Image:
    """``[C, H, W]`` in 0 .. 1 (1 or 3 channels) as 8-bit RGB; values outside are clamped."""
    from PIL import Image

    pixels = image.detach().float().cpu().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def to_png(image: Tensor) -> bytes:
    """``[C, H, W]`` in 0 .. 1 as PNG bytes."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def difference(image: Tensor, reference: Tensor, gain: float = GAIN) -> Tensor:
    """Amplified absolute difference, clamped to 1."""
    return ((image.float() - reference.float()).abs() * gain).clamp(0, 1)


def make_picture(label: str, image: Tensor, reference: Tensor) -> Picture:
    """The pair of a report, ``[C, H, W]`` in 0 .. 1."""
    changed = difference(image, reference)
    return Picture(label, to_png(reference), to_png(image), to_png(changed), GAIN)


def grid_png(
    rows: Sequence[tuple[str, Tensor]],
    columns: Sequence[str],
    *,
    cell: int = 96,
    gain: float = GAIN,
) -> bytes:
    """A labelled grid as PNG bytes: one line per run, an amplified difference below all but one.

    Args:
        rows: (label, images ``[N, C, H, W]`` in 0 .. 1); the first is what the others differ from.
        columns: label of each of the N images.
        cell: least side of a picture in pixels; small ones are enlarged by a whole factor.
        gain: factor of the differences.

    Raises:
        ValueError: no row, or shapes or labels that don't match.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("a grid needs at least one row")
    _, reference = rows[0]
    for label, images in rows:
        if images.shape != reference.shape or len(images) != len(columns):
            raise ValueError(
                f"row {label!r} must hold {len(columns)} pictures of shape "
                f"{tuple(reference.shape[1:])}, got {tuple(images.shape)}"
            )
    lines: list[tuple[str, Tensor]] = []
    for i, (label, images) in enumerate(rows):
        lines.append((label, images))
        if i:
            lines.append((f"difference x{gain:g}", difference(images, reference, gain)))
    factor = max(1, -(-cell // reference.shape[-1]))
    high, wide = (side * factor for side in reference.shape[-2:])
    font, gap, top = ImageFont.load_default(13), 6, 30
    left = 16 + int(max(font.getlength(label) for label, _ in lines))
    size = (left + len(columns) * (wide + gap) + gap, top + len(lines) * (high + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(columns):
        x = left + column * (wide + gap)
        draw.text((x + wide / 2, top - 8), _fit(label, font, wide), "black", font, "ms")
    for line, (label, images) in enumerate(lines):
        y = top + line * (high + gap)
        draw.text((left - 8, y + high / 2), label, "black", font, "rm")
        for column, image in enumerate(images):
            picture = to_pil(image).resize((wide, high), Image.Resampling.NEAREST)
            x = left + column * (wide + gap)
            canvas.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + wide, y + high), outline="#d0d4da")
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _fit(text: str, font: object, width: int) -> str:
    """The text, shortened until it is no wider than a column."""
    while len(text) > 1 and font.getlength(text) > width:  # type: ignore[attr-defined]
        text = text.rstrip("…")[:-1] + "…"
    return text


def stack(images: Sequence[Tensor]) -> Tensor:
    """Images ``[N, C, H, W]`` of several runs as one batch on the CPU, float32."""
    return torch.cat([image.detach().float().cpu() for image in images])
