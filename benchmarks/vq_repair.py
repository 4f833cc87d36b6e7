"""Repair of a collapsed codebook: codes used, entropy and PSNR before and after.

    python -m benchmarks.vq_repair

The photographs and the split of :mod:`benchmarks.vq_quantizers`; a tokenizer of 4 x 4 pixels whose
codebook starts small and learns by gradient, 800 steps, collapses; each repair trains 250 steps.
Figures are of the held-out quarters, 25,600 tokens.
"""

from __future__ import annotations

import copy
import time

import torch

from benchmarks.vq_quantizers import photographs
from sage_diffusion.vq import VectorQuantizer
from sage_diffusion.vq.families import compact
from sage_diffusion.vq.repair import health, repair
from sage_diffusion.vq.training import Training, train

CODES, DIM, CROP = 4096, 32, 32
STEPS, REPAIR = 800, 250


def main() -> None:
    """Print every repair."""
    torch.set_num_threads(1)
    left, right = ([(x.add(1) * 127.5).round().byte() for x in part] for part in photographs())
    torch.manual_seed(0)
    dying = VectorQuantizer(DIM, CODES, decay=None, kmeans=False, revive=0.0, init="uniform")
    tokenizer = compact.make(dying, {"widths": [64], "depths": [1]})
    train(tokenizer, left, Training(steps=STEPS, batch=32, crop=CROP))
    print("collapsed", health(tokenizer, right, CROP), flush=True)
    more = copy.deepcopy(tokenizer)
    train(more, left, Training(steps=REPAIR, batch=32, crop=CROP))
    print("trained on without repair", health(more, right, CROP), flush=True)
    for method, parts in (("kmeans", "all"), ("kmeans", "decoder"), ("simvq", "all")):
        training = Training(steps=REPAIR, batch=32, crop=CROP, parts=parts)
        start = time.process_time()
        found = repair(tokenizer, left, training, method=method, held_out=right)
        print(f"{method}, {parts}, {time.process_time() - start:.0f} CPU-s\n{found}", flush=True)


if __name__ == "__main__":
    main()
