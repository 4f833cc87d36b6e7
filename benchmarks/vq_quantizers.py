"""Every quantizer at 12 bits a token: a small autoencoder on photographs, one table.

    python -m benchmarks.vq_quantizers                      all arms, two seeds
    python -m benchmarks.vq_quantizers simvq ema --steps 400 --codes 65536

Eight photographs that scikit-image carries; the left three quarters are for training, the right
quarter is for the test.  32 x 32 crops, tokens of 4 x 4 pixels, D = 32, 1,200 steps of 32 crops
(2,048 tokens), Adam 1e-3, mean squared error only.  Rows already in ``--out`` are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

from sage_diffusion.files import write_text
from sage_diffusion.vq.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    Groups,
    Quantizer,
    Residual,
    SimVQ,
    VectorQuantizer,
)
from sage_diffusion.vq.tokenizer import token_bits

FILES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
    "motorcycle_left.png",
)
CROP, BATCH, DIM, WIDTH, RATE = 32, 32, 32, 64, 1e-3
TEST_CROPS, LAST = 400, 100


def plain(codes: int, **settings: Any) -> Quantizer:
    """A codebook without k-means and revival."""
    return VectorQuantizer(DIM, codes, **{"kmeans": False, "revive": 0.0, **settings})


def digits(codes: int) -> int:
    """Bits of an id; the number of codes must be a power of two."""
    return codes.bit_length() - 1


@torch.no_grad()
def equiangular(rows: Tensor, steps: int = 30, rate: float = 0.5, chunk: int = 2048) -> Tensor:
    """Turn rows away from those that they are most alike, keeping the mean norm.

    Each step moves every row against its nearest row of largest absolute cosine: descent on the
    largest cosine of Equiangular Basis Vectors, without the matrix of all cosines.
    """
    unit = nn.functional.normalize(rows, dim=-1)
    for _ in range(steps):
        moved = []
        for start in range(0, len(unit), chunk):
            part = unit[start : start + chunk]
            cosine = part @ unit.t()
            cosine[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0
            worst = cosine.abs().argmax(1)
            size = cosine.gather(1, worst[:, None])
            moved.append(part - rate * size * unit[worst])
        unit = nn.functional.normalize(torch.cat(moved), dim=-1)
    return unit * rows.norm(dim=-1).mean()


def turned(quantizer: SimVQ) -> SimVQ:
    """SimVQ from an equiangular basis."""
    quantizer.basis.copy_(equiangular(quantizer.basis))
    return quantizer


#: By name; of every number of codes that it can have.
ARMS: dict[str, Callable[[int], Quantizer]] = {
    "vanilla": lambda k: plain(k, decay=None, init="uniform"),
    "vanilla, Gaussian start": lambda k: plain(k, decay=None),
    "ema": lambda k: VectorQuantizer(DIM, k),
    "ema, neither k-means nor revival": lambda k: plain(k),
    "ema, cosine": lambda k: VectorQuantizer(DIM, k, metric="cosine"),
    "simvq": lambda k: SimVQ(DIM, k),
    "simvq, commitment 1": lambda k: SimVQ(DIM, k, commitment_weight=1.0),
    "simvq, rotation trick": lambda k: SimVQ(DIM, k, rotation_trick=True),
    "simvq, equiangular basis": lambda k: turned(SimVQ(DIM, k)),
    "ibq": lambda k: IBQ(DIM, k),
    "fsq": lambda k: FSQ((2 ** (digits(k) // 4),) * 4, DIM),
    "bsq": lambda k: BSQ(DIM, digits(k)),
    "lfq": lambda k: LFQ(DIM, digits(k)),
    "2 groups, ema": lambda k: Groups([VectorQuantizer(DIM // 2, math.isqrt(k)) for _ in range(2)]),
    "2 levels, ema": lambda k: Residual([VectorQuantizer(DIM, math.isqrt(k)) for _ in range(2)]),
}


def photographs() -> tuple[list[Tensor], list[Tensor]]:
    """Left parts and right quarters, ``[3, H, W]`` in -1 .. 1."""
    left, right = [], []
    for name in FILES:
        image = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        cut = int(pixels.shape[2] * 0.75) // 8 * 8
        left.append(pixels[:, :, :cut])
        right.append(pixels[:, :, cut:])
    return left, right


def draw(pictures: list[Tensor], count: int, g: torch.Generator) -> Tensor:
    """Random crops, half of them mirrored."""
    found = []
    for _ in range(count):
        picture = pictures[int(torch.randint(len(pictures), (1,), generator=g))]
        y, x = (int(torch.randint(n - CROP + 1, (1,), generator=g)) for n in picture.shape[1:])
        crop = picture[:, y : y + CROP, x : x + CROP]
        found.append(crop.flip(-1) if torch.rand(1, generator=g) < 0.5 else crop)
    return torch.stack(found)


class Toy(nn.Module):
    """Patches of 4 x 4 through two convolutions, and back."""

    def __init__(self, quantizer: Quantizer, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        act, conv = nn.GELU(), nn.Conv2d
        self.encoder = nn.Sequential(
            conv(3, WIDTH, 4, 4), act, conv(WIDTH, WIDTH, 3, 1, 1), act, conv(WIDTH, DIM, 1)
        )
        self.decoder = nn.Sequential(
            conv(DIM, WIDTH, 3, 1, 1),
            act,
            conv(WIDTH, WIDTH, 3, 1, 1),
            act,
            nn.ConvTranspose2d(WIDTH, 3, 4, 4),
        )
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        out = self.quantizer(z.flatten(2).transpose(1, 2))
        return self.decoder(out.quantized.transpose(1, 2).view(z.shape)), out.indices, out.loss


def one_id(indices: Tensor, size: int) -> Tensor:
    """Levels combined into one id, to count them as the others'."""
    if indices.ndim == 2:
        return indices.flatten()
    places = torch.tensor([size**i for i in range(indices.shape[2])])
    return (indices * places).sum(-1).flatten()


@torch.no_grad()
def judge(model: Toy, pictures: list[Tensor]) -> dict[str, float]:
    """Figures on the held-out quarters: 25,600 tokens."""
    g = torch.Generator().manual_seed(123)
    model.eval()
    errors, ids = [], []
    for _ in range(TEST_CROPS // 50):
        x = draw(pictures, 50, g)
        again, indices, _ = model(x)
        errors.append(((again.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))
        ids.append(one_id(indices, model.quantizer.codebook_size))
    model.train()
    error, found = torch.cat(errors), torch.cat(ids)
    return {
        "psnr_pooled": round(-10 * math.log10(error.mean().item()), 2),
        "psnr_mean": round((-10 * error.log10()).mean().item(), 2),
        "ids_used": len(found.unique()),
        "entropy_bits": round(token_bits(found), 2),
    }


def run(name: str, codes: int, steps: int, seed: int) -> dict[str, Any]:
    """Train one arm."""
    left, right = photographs()
    torch.manual_seed(1000 + seed)
    model = Toy(ARMS[name](codes), seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.99))
    g, seen = torch.Generator().manual_seed(7), []
    start = time.process_time()
    for step in range(steps):
        x = draw(left, BATCH, g)
        again, indices, loss = model(x)
        optimizer.zero_grad()
        (nn.functional.mse_loss(again, x) + loss).backward()
        optimizer.step()
        if step >= steps - LAST:
            seen.append(one_id(indices, model.quantizer.codebook_size))
    spent = time.process_time() - start
    return {
        "arm": name,
        "codes": codes,
        "steps": steps,
        "seed": seed,
        **judge(model, right),
        "ids_used_in_training": len(torch.cat(seen).unique()),
        "cpu_seconds": round(spent, 1),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("arms", nargs="*", default=list(ARMS), metavar="arm", help="; ".join(ARMS))
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/vq_quantizers.json"))
    options = parser.parse_args()
    unknown = set(options.arms) - set(ARMS)
    if unknown:
        parser.error(f"arms must be of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    known = {(row["arm"], row["codes"], row["steps"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, options.codes, options.steps, seed) in known:
                continue
            rows.append(run(arm, options.codes, options.steps, seed))
            print(json.dumps(rows[-1]), flush=True)
            write_text(options.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
