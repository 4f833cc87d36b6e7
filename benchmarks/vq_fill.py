"""A fill model on held-out photographs: how well it knows masked ids, and what fills look like.

    python -m benchmarks.vq_fill --data photographs            # the bundled pair
    python -m benchmarks.vq_fill --data photographs --model FOLDER --tokenizer FILE

A quarter of the tokens is masked, scattered or as one square hole, in the middle 512 x 512 pixels
of the photographs of ``tools/photographs.json`` that training never saw.  Pictures are compared
inside the mask with what the unmasked tokens decode to, beside the mask's own mean colour there,
which no one could know who fills it.  CPU-seconds are those of the whole path: encode, fill and
decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.vq_tokenizer import middle
from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.fill import load_fill
from sage_diffusion.vq.tokenizer import Tokenizer, psnr, token_bits
from tools.train_tokenizer import photographs


def masks(side: int) -> dict[str, Tensor]:
    """Boolean ``[side, side]``, a quarter of them true."""
    scattered = torch.rand(side, side, generator=torch.Generator().manual_seed(0)) < 0.25
    square = torch.zeros(side, side, dtype=torch.bool)
    square[side // 4 : side - side // 4, side // 4 : side - side // 4] = True
    return {"scattered": scattered, "square": square}


def inside(got: Tensor, want: Tensor, mask: Tensor, factor: int) -> tuple[float, float]:
    """PSNR under the mask of a picture and of the mean colour that it should have there."""
    where = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    got, want = got[0, :, where], want[0, :, where]
    return psnr(got, want), psnr(want.mean(1, keepdim=True).expand_as(want), want)


def measure(tokenizer: Tokenizer, filler: Any, pictures: dict[str, Tensor]) -> dict[str, Any]:
    """Means over the pictures."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    all_ids, start = [], time.process_time()
    for picture in pictures.values():
        x = middle(picture)
        ids = tokenizer.encode(x)
        all_ids.append(ids)
        want = tokenizer.decode(ids)
        for name, mask in masks(ids.shape[1]).items():
            bits = filler.bits(ids, mask)
            begin = time.process_time()
            got = tokenizer.decode(filler.fill(tokenizer.encode(x), mask))
            spent = time.process_time() - begin
            known, mean = inside(got, want, mask, tokenizer.traits.factor)
            rows.setdefault(name, []).append((bits, known, mean, spent))
    names = ("bits", "psnr", "psnr_of_mean_colour", "cpu_seconds")
    return {
        "pictures": len(pictures),
        "entropy": round(token_bits(torch.cat([ids.flatten() for ids in all_ids])), 2),
        "masks": {
            mask: {
                name: round(statistics.mean(column), 2)
                for name, column in zip(names, zip(*found, strict=True), strict=True)
            }
            for mask, found in rows.items()
        },
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", default="bundled")
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, filler = load_tokenizer(options.tokenizer), load_fill(options.model)
    filler.check(tokenizer)
    found = measure(tokenizer, filler, photographs("held_out", options.data))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
