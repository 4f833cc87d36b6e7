"""Train a tokenizer on photographs of known licence.

    apt-get download lomiri-wallpapers-16.04 && dpkg -x lomiri-wallpapers-16.04_*.deb photographs
    python tools/train_tokenizer.py --data photographs --out out/tokenizer

``tools/photographs.json`` names every photograph with author and licence, and those that are held
out: all are CC0, CC-BY or in the public domain.  Those of scikit-image lie in its wheel, the others
anywhere below ``--data``.  A run that is stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from sage_diffusion.vq.checkpoints import save_tokenizer
from sage_diffusion.vq.families import compact
from sage_diffusion.vq.quantizers import VectorQuantizer
from sage_diffusion.vq.training import Step, Training, train

LIST = Path(__file__).with_name("photographs.json")
CODES, DIM = 4096, 16
NETWORK = {"widths": [48, 96], "depths": [1, 2]}

#: Sides are at most this long: no crop shows finer detail.
LONGEST = 2048


def photographs(which: str, data: Path | None) -> dict[str, Tensor]:
    """Photographs of the list by name, ``[3, H, W]`` uint8."""
    found = {}
    for entry in json.loads(LIST.read_text(encoding="utf-8"))[which]:
        folder = Path(skimage.data.__file__).parent
        if entry["source"] != "scikit-image":
            if data is None:
                raise SystemExit(f"{entry['file']} is from {entry['source']}: needs --data")
            folder = data
        paths = list(folder.rglob(entry["file"]))
        if len(paths) != 1:
            raise SystemExit(f"{entry['file']} must be once below {folder}, found {len(paths)}")
        image = Image.open(paths[0]).convert("RGB")
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        found[entry["file"]] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and result")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--bfloat16", action="store_true", help="convolutions in BF16 (AMX, AVX-512)"
    )
    options = parser.parse_args()
    pictures = list(photographs("training", options.data).values())
    torch.manual_seed(0)
    tokenizer = compact.make(VectorQuantizer(DIM, CODES), NETWORK)
    tokenizer = tokenizer.to(memory_format=torch.channels_last)
    training = Training(steps=options.steps, bfloat16=options.bfloat16)
    start, seen = time.process_time(), []

    def report(step: Step) -> None:
        seen.append(step.psnr)
        if step.step % 100 == 0:
            spent = time.process_time() - start
            mean = sum(seen[-100:]) / len(seen[-100:])
            print(f"{step.step} {mean:.2f} dB, {step.used} ids, {spent:.0f} CPU-s", flush=True)

    checkpoint = options.out / "training.safetensors"
    train(tokenizer, pictures, training, checkpoint=checkpoint, save_every=250, progress=report)
    save_tokenizer(options.out / "tokenizer.safetensors", tokenizer, half=True)


if __name__ == "__main__":
    main()
