"""A tokenizer on held-out photographs, beside JPEG and WebP of the same bytes and 8 x down-scaling.

    python -m benchmarks.vq_tokenizer --data photographs            # the bundled tokenizer
    python -m benchmarks.vq_tokenizer --data photographs --tokenizer FILE

The photographs are those of ``tools/photographs.json`` that training never saw, their middle
512 x 512 pixels.  Bytes are those of whole files, headers included.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sage_diffusion.accuracy.metrics import ssim
from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.idfile import Tokens, pack
from sage_diffusion.vq.tokenizer import Tokenizer, psnr, token_bits
from tools.train_tokenizer import photographs

SIDE = 512


def middle(picture: Tensor) -> Tensor:
    """``[3, H, W]`` uint8 -> ``[1, 3, 512, 512]`` in 0 .. 1; smaller ones are enlarged first."""
    x = picture[None].float() / 255
    short = min(x.shape[2:])
    if short < SIDE:
        sides = [round(n * SIDE / short) for n in x.shape[2:]]
        x = F.interpolate(x, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (x.shape[2] - SIDE) // 2, (x.shape[3] - SIDE) // 2
    return x[:, :, top : top + SIDE, left : left + SIDE]


def coded(x: Tensor, kind: str, limit: int) -> tuple[Tensor, int]:
    """The best JPEG or WebP of at most so many bytes, or the smallest there is."""
    image = Image.fromarray((x[0].permute(1, 2, 0) * 255).round().byte().numpy())
    found: tuple[Tensor, int] | None = None
    low, high = 0, 100
    while low <= high:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality, **({"method": 6} if kind == "WEBP" else {}))
        size = buffer.tell()
        if size <= limit or found is None:
            array = np.array(Image.open(buffer).convert("RGB"))
            found = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255, size
        low, high = (quality + 1, high) if size <= limit else (low, quality - 1)
    assert found is not None
    return found


def ways(tokenizer: Tokenizer, x: Tensor) -> Iterator[tuple[str, Tensor, int]]:
    """Name, picture and bytes of every way to keep it."""
    ids = tokenizer.encode(x)
    size = len(pack(Tokens.of(tokenizer, ids)))
    yield "tokens", tokenizer.decode(ids), size
    for kind in ("JPEG", "WEBP"):
        yield kind.lower(), *coded(x, kind, size)
    small = F.interpolate(x, scale_factor=1 / 8, mode="bicubic", antialias=True)
    small = (small.clamp(0, 1) * 255).round() / 255
    large = F.interpolate(small, size=x.shape[2:], mode="bicubic").clamp(0, 1)
    yield "down-scaled by 8", large, small.numel()


def measure(tokenizer: Tokenizer, pictures: dict[str, Tensor]) -> dict[str, Any]:
    """Means over the pictures, and each tokenizer's own."""
    rows: dict[str, list[tuple[float, float, int]]] = {}
    bits = []
    for picture in pictures.values():
        x = middle(picture)
        bits.append(token_bits(tokenizer.encode(x)))
        for name, got, size in ways(tokenizer, x):
            rows.setdefault(name, []).append((psnr(got, x), ssim(got[0], x[0]), size))
    table = {
        name: {
            "psnr": round(statistics.mean(row[0] for row in found), 2),
            "worst": round(min(row[0] for row in found), 2),
            "ssim": round(statistics.mean(row[1] for row in found), 4),
            "bytes": round(statistics.mean(row[2] for row in found)),
        }
        for name, found in rows.items()
    }
    return {"pictures": len(pictures), "bits_used": round(statistics.mean(bits), 2), "ways": table}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", default="bundled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.tokenizer)
    print(json.dumps(measure(tokenizer, photographs("held_out", options.data)), indent=1))


if __name__ == "__main__":
    main()
