"""Train a small class-conditional diffusion transformer on a CPU.

The models are diffusers' own ``DiTTransformer2DModel`` in pixel space (heads of 64, tokens of
2 x 2 pixels), trained from scratch as a rectified flow (Liu et al., 2209.03003): they predict
``v = noise - image`` at ``x_t = (1 - t) * image + t * noise``.

    python tools/train_dit.py emoji --data package --out emoji_dit --compile --bfloat16
    python tools/train_dit.py digits --out digits_dit
    python tools/train_dit.py crops --out crops_dit

``emoji`` reads ``npm pack emoji-datasource-twitter@16.0.0`` unpacked at ``--data`` (code MIT,
pictures CC-BY 4.0, (c) Twitter, Inc and other contributors).  ``digits`` needs scikit-learn, whose
copy of the UCI "Optical Recognition of Handwritten Digits" it is (CC-BY 4.0).  ``crops`` cuts
windows out of pictures that scikit-image carries, CC0 or public domain all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from sage_diffusion.integrations.diffusers.bundled import EmojiPipeline

EMOJI_CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")

#: Pictures of scikit-image that are CC0 or in the public domain, by its documentation.
CROP_SOURCES = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "clock",
    "coffee",
    "grass",
    "gravel",
    "hubble_deep_field",
    "retina",
    "rocket",
    "text",
)
CROPS_EACH = 400


class Pictures(NamedTuple):
    """Pictures ``[N, C, H, W]`` in -1 .. 1, class indices ``[N]`` and the classes' names."""

    pixels: Tensor
    labels: Tensor
    names: list[str]


def emoji(data: Path | None) -> Pictures:
    """Twemoji graphics on white and their mirror images, a class per Unicode subcategory."""
    if data is None:
        raise SystemExit("emoji needs --data, the unpacked package emoji-datasource-twitter")
    entries = [
        e
        for e in json.loads((data / "emoji.json").read_text())
        if e["category"] in EMOJI_CATEGORIES and e["has_img_twitter"]
    ]
    names = sorted({e["subcategory"] for e in entries})
    pictures, labels = [], []
    for entry in entries:
        path = data / "img" / "twitter" / "64" / entry["image"]
        picture = Image.open(path).convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        canvas.alpha_composite(picture)
        pictures.append(_shrunk(canvas.convert("RGB"), 24))
        labels.append(names.index(entry["subcategory"]))
    return _mirrored(torch.stack(pictures), torch.tensor(labels), names)


def digits(data: Path | None) -> Pictures:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 enlarged to 16 x 16."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    pixels = F.interpolate(pixels, size=(16, 16), mode="bicubic", align_corners=False)
    return Pictures(pixels.clamp(-1, 1), torch.from_numpy(found.target), list("0123456789"))


def crops(data: Path | None) -> Pictures:
    """Square windows of scikit-image's pictures and their mirror images, a class per picture.

    A window is a third to two thirds as high as its picture.
    """
    import skimage.data

    random = np.random.default_rng(0)
    pictures, labels = [], []
    for label, name in enumerate(CROP_SOURCES):
        source = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        for _ in range(CROPS_EACH):
            side = int(min(source.size) * random.uniform(1 / 3, 2 / 3))
            left, top = (int(random.integers(0, length - side + 1)) for length in source.size)
            window = source.crop((left, top, left + side, top + side))
            pictures.append(_shrunk(window, 24))
            labels.append(label)
    return _mirrored(torch.stack(pictures), torch.tensor(labels), list(CROP_SOURCES))


def _shrunk(picture: Image.Image, side: int) -> Tensor:
    small = picture.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 127.5 - 1


def _mirrored(pixels: Tensor, labels: Tensor, names: list[str]) -> Pictures:
    return Pictures(torch.cat([pixels, pixels.flip(-1)]), torch.cat([labels, labels]), names)


@dataclass(frozen=True)
class Recipe:
    """A data set and what is trained on it.

    Attributes:
        load: reads the pictures, given ``--data``.
        layers, heads: of the transformer; a head has 64 channels.
        minutes: of training unless the caller says otherwise.
    """

    load: Callable[[Path | None], Pictures]
    layers: int
    heads: int
    minutes: float


RECIPES = {
    "emoji": Recipe(emoji, layers=6, heads=3, minutes=112),
    "digits": Recipe(digits, layers=4, heads=2, minutes=6),
    "crops": Recipe(crops, layers=5, heads=2, minutes=25),
}


def build_model(recipe: Recipe, pictures: Pictures) -> DiTTransformer2DModel:
    """The untrained network; adaLN-zero as in the DiT paper (2212.09748 section 3.2)."""
    _, channels, _, side = pictures.pixels.shape
    model = DiTTransformer2DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=64,
        in_channels=channels,
        out_channels=channels,
        num_layers=recipe.layers,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=len(pictures.names),
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    # diffusers does not zero these, and training without it is visibly slower.
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    return model


def learning_rate(step: int, fraction: float, peak: float) -> float:
    """Warm-up over 200 steps, then constant, then linear to zero over the last half."""
    return peak * min(1.0, (step + 1) / 200) * min(1.0, 2 * (1 - fraction) + 0.01)


def save(weights: dict[str, Tensor], recipe: Recipe, pictures: Pictures, out: Path) -> None:
    """The pipeline with FP16 safetensors, as ``from_pretrained`` and the commands read it."""
    model = build_model(recipe, pictures)
    model.load_state_dict(weights)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    EmojiPipeline(model.half(), scheduler, pictures.names).save_pretrained(out)


def train(
    recipe: Recipe,
    pictures: Pictures,
    out: Path,
    *,
    minutes: float,
    batch: int = 32,
    peak: float = 1e-3,
    seed: int = 0,
    compiled: bool = False,
    bfloat16: bool = False,
) -> int:
    """Train for a time, save the moving average of the weights, return the number of steps."""
    torch.manual_seed(seed)
    model = build_model(recipe, pictures).train()
    fast = torch.compile(model) if compiled else model
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    start, step, running = time.monotonic(), 0, math.nan
    while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, fraction, peak)
        index = torch.randint(len(pictures.pixels), (batch,))
        clean = pictures.pixels[index]
        noise = torch.randn_like(clean)
        t = torch.sigmoid(torch.randn(batch))  # logit-normal, 2403.03206 section 3.1
        mix = t[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            velocity = fast(
                (1 - mix) * clean + mix * noise,
                timestep=t * 1000,
                class_labels=pictures.labels[index],
            ).sample
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"{step} steps, {time.monotonic() - start:.0f} s, loss {running:.4f}", flush=True)
        if step % 400 == 0:
            save(average, recipe, pictures, out)
    save(average, recipe, pictures, out)
    print(f"done: {step} steps in {minutes:g} minutes, loss {running:.4f}", flush=True)
    return step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data", type=Path, help="folder of the data set, for emoji")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="of training [default: the recipe's]")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--bfloat16", action="store_true", help="for CPUs that compute with it")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.recipe]
    pictures = recipe.load(args.data)
    print(f"{len(pictures.pixels)} pictures, {len(pictures.names)} classes", flush=True)
    train(
        recipe,
        pictures,
        args.out,
        minutes=recipe.minutes if args.minutes is None else args.minutes,
        batch=args.batch,
        peak=args.lr,
        seed=args.seed,
        compiled=args.compile,
        bfloat16=args.bfloat16,
    )


if __name__ == "__main__":
    main()
