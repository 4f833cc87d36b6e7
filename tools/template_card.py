"""A workflow's card in the template browser: what it is, and what attention takes on which card."""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _EDGE = 768, 432, 40
_GREY, _WHITE = (150, 156, 168), (240, 242, 246)


def card(name: str, heading: str, times: Mapping[str, float], tokens: int) -> Image.Image:
    """A picture with bars.

    Args:
        name: of the workflow, ``model - what``; the model gives it its colour.
        heading: what it shows.
        times: card -> time of attention, FP16's being 1; may be empty.
        tokens: of its calls.
    """
    model = name.partition(" -")[0]
    hue = zlib.crc32(model.encode()) % 360 / 360
    red, green, blue = (round(255 * x) for x in colorsys.hls_to_rgb(hue, 0.6, 0.55))
    colour = red, green, blue
    image = Image.new("RGB", (_WIDTH, _HEIGHT), (24, 26, 31))
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, 14, _HEIGHT), colour)
    canvas.text((_EDGE, 30), model, colour, ImageFont.load_default(46))
    canvas.text((_EDGE, 92), heading, _WHITE, ImageFont.load_default(28))
    if not times:
        return _columns(image, canvas, colour)
    small = ImageFont.load_default(22)
    told = f"attention at {tokens:,} tokens, FP16 = 1 (predicted)"
    canvas.text((_EDGE, 160), told, _GREY, small)
    full = _WIDTH - 2 * _EDGE - 230
    for i, (gpu, time) in enumerate(times.items()):
        y = 204 + 50 * i
        canvas.text((_EDGE, y), gpu, _WHITE, small)
        left = _EDGE + 130
        canvas.rectangle((left, y, left + full, y + 28), (52, 56, 66))
        canvas.rectangle((left, y, left + round(full * min(time, 1)), y + 28), colour)
        canvas.text((left + full + 16, y), f"{time:.2f}", _WHITE, small)
    return image


def _columns(
    image: Image.Image, canvas: ImageDraw.ImageDraw, colour: tuple[int, int, int]
) -> Image.Image:
    """Three panes side by side, where there is nothing to measure."""
    for i in range(3):
        x = _EDGE + i * 236
        shade = tuple(round(c * (1 - 0.28 * i)) for c in colour)
        canvas.rectangle((x, 170, x + 212, 390), shade)
    return image
