"""What a compressed KV cache took: text, and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
    ratio = memory.host / memory.peak
    gain = f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x as much"
    lines = [
        f"KV cache: {size(memory.peak)} at its peak instead of {size(memory.host)}, {gain}",
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


#: Stretches of time that differences are told of: late ones say nothing once runs part.
_STRETCHES = 4


@dataclass(frozen=True)
class Difference:
    """Between a run and the same one with an exact cache.

    Attributes:
        decibels: of each stretch of time, the first one first; of pictures against their range, of
            a latent against its own power; infinite where nothing differs.
        frames: of each stretch, the last may have fewer.
        picture: ``[1, h, w, 3]``, a frame of each stretch: exact, found, and four times how far
            they are apart.
    """

    decibels: tuple[float, ...]
    frames: int
    picture: Tensor

    def __str__(self) -> str:
        figures = ", ".join("equal" if x == math.inf else f"{x:.1f} dB" for x in self.decibels)
        return f"difference to the exact run, by {self.frames} frames: {figures}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None where nothing differs."""
        shown = [None if x == math.inf else x for x in self.decibels]
        return {"kind": "difference", "frames": self.frames, "decibels": shown}


def difference(found: Any, exact: Any) -> Difference:
    """Compare two runs' LATENT or IMAGE.

    Raises:
        ValueError: they are of different kinds or sizes, or neither latents nor pictures.
    """
    latent = isinstance(found, Mapping)
    a, b = _frames(found), _frames(exact)
    if a.shape != b.shape or isinstance(exact, Mapping) != latent:
        raise ValueError(
            f"both runs must be latents or pictures of the same size, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    size = -(-len(a) // _STRETCHES)
    decibels = []
    for one, other in zip(a.split(size), b.split(size), strict=True):
        error = float((one - other).square().mean())
        power = float(other.square().mean()) if latent else 1.0
        decibels.append(math.inf if error == 0 else 10 * math.log10(max(power, 1e-12) / error))
    shown = slice(0, len(a), size)
    rows = [_shown(x[shown], b) for x in (b, a)]
    rows.append((4 * (rows[0] - rows[1]).abs()).clamp(max=1))
    return Difference(tuple(decibels), size, torch.cat(rows)[None])


def _frames(given: Any) -> Tensor:
    """``[F, C, h, w]`` float32 of a LATENT ``[B, C, (F,) h, w]`` or an IMAGE ``[F, h, w, C]``."""
    x = given["samples"] if isinstance(given, Mapping) else given
    if not isinstance(x, Tensor) or x.ndim not in (4, 5):
        raise ValueError("the exact run must be given as a latent or pictures, as the other is")
    x = x.detach().float().cpu()
    if not isinstance(given, Mapping):
        return x.movedim(-1, 1)
    return x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)


def _shown(x: Tensor, like: Tensor) -> Tensor:
    """Frames side by side ``[h, F w, 3]``; of a latent its first three channels, as ``like``'s."""
    low, high = (like[:, :3].amin(), like[:, :3].amax()) if like.shape[1] > 3 else (0.0, 1.0)
    x = ((x[:, :3] - low) / max(float(high - low), 1e-6)).clamp(0, 1)
    return x.expand(-1, 3, -1, -1).permute(2, 0, 3, 1).flatten(1, 2)
