"""What a compressed KV cache took: text, and bars."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sage_diffusion.integrations.comfy.images import as_image
from sage_diffusion.integrations.comfy.kv import Memory

_WIDTH, _LEFT, _ROW = 640, 170, 34
_INK, _GREY, _GREEN, _BLUE = "#222222", "#b8b8b8", "#3f8f5f", "#6f9fd8"


def size(nbytes: int) -> str:
    """``3.2 MiB``, or smaller and larger units."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.1f} {unit}"
    return f"{nbytes} B"


def text_of(memory: Memory) -> str:
    """Totals, what the bytes hold, and what was left alone.

    Returns:
        Lines of text; a warning where no run has used the cache.
    """
    if memory.kept == 0:
        text = "WARNING: no run has used this KV cache yet"
        return text + "".join(f"\nleft as it is: {n} x {why}" for why, n in memory.left.items())
    lines = [
        f"KV cache: {size(memory.peak)} at its peak instead of {size(memory.host)}, "
        f"{memory.host / memory.peak:.1f}x smaller",
        f"{memory.layers} layers, {memory.tokens} tokens; {size(memory.kept)} kept at the end",
    ]
    lines += [f"  {name}: {size(count)}" for name, count in memory.parts.most_common() if count]
    lines += [f"left as it is: {n} x {why}" for why, n in memory.left.items()]
    return "\n".join(lines)


def bars(memory: Memory) -> Tensor:
    """A picture ``[1, H, W, 3]`` in 0 .. 1: ComfyUI's cache, the peak, and what is kept."""
    rows = [
        ("ComfyUI's own", memory.host, _GREY),
        ("peak", memory.peak, _BLUE),
        ("kept", memory.kept, _GREEN),
    ]
    rows += [(name, count, _GREEN) for name, count in memory.parts.most_common() if count]
    picture = Image.new("RGB", (_WIDTH, _ROW * len(rows) + 20), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    largest = max(memory.host, memory.peak, 1)
    room = _WIDTH - _LEFT - 100
    for index, (name, count, colour) in enumerate(rows):
        top = 10 + index * _ROW
        draw.text((10, top + 6), name, fill=_INK, font=font)
        right = _LEFT + max(round(room * count / largest), 1)
        draw.rectangle((_LEFT, top + 4, right, top + _ROW - 6), fill=colour)
        draw.text((right + 8, top + 6), size(count), fill=_INK, font=font)
    return as_image(picture)
