"""Train the bundled class-conditional diffusion transformer on Twemoji pictures, on a CPU.

The model is diffusers' own ``DiTTransformer2DModel`` (6 layers, 3 heads of 64, 144 tokens of
2 x 2 pixels), trained from scratch as a rectified flow (Liu et al., 2209.03003): it predicts
``v = noise - image`` at ``x_t = (1 - t) * image + t * noise``.

Data: ``npm pack emoji-datasource-twitter@16.0.0`` unpacked somewhere (code MIT, pictures
CC-BY 4.0, (c) Twitter, Inc and other contributors).  One class per Unicode subcategory.

    python tools/train_emoji_dit.py --data package --out emoji_dit --minutes 112 --compile
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from PIL import Image

SIZE = 24
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")


def load_pictures(data: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pictures ``[N, 3, 24, 24]`` in [-1, 1] on white, class indices ``[N]``, class names."""
    entries = [
        e
        for e in json.loads((data / "emoji.json").read_text())
        if e["category"] in CATEGORIES and e["has_img_twitter"]
    ]
    names = sorted({e["subcategory"] for e in entries})
    pictures, labels = [], []
    for entry in entries:
        path = data / "img" / "twitter" / "64" / entry["image"]
        picture = Image.open(path).convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        canvas.alpha_composite(picture)
        small = canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        pictures.append(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 127.5 - 1)
        labels.append(names.index(entry["subcategory"]))
    return torch.stack(pictures), torch.tensor(labels), names


def build_model(classes: int) -> DiTTransformer2DModel:
    """The untrained network; adaLN-zero as in the DiT paper (2212.09748 section 3.2)."""
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=6,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=classes,
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


def save(ema: dict[str, torch.Tensor], model: DiTTransformer2DModel, names: list[str], out: Path):
    """FP16 safetensors with the config, the scheduler's config and the class names."""
    shadow = build_model(len(names))
    shadow.load_state_dict(ema)
    shadow.half().save_pretrained(out / "transformer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000).save_pretrained(out / "scheduler")
    (out / "classes.json").write_text(json.dumps(names, indent=1) + "\n")


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    pictures, labels, names = load_pictures(args.data)
    mirrored = torch.cat([pictures, pictures.flip(-1)]), torch.cat([labels, labels])
    pictures, labels = mirrored
    print(f"{len(pictures)} pictures (mirrored ones included), {len(names)} classes", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model = build_model(len(names)).train()
    fast = torch.compile(model) if args.compile else model
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    start, step, running = time.monotonic(), 0, math.nan
    while (fraction := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, fraction, args.lr)
        index = torch.randint(len(pictures), (args.batch,))
        clean, noise = pictures[index], torch.randn(args.batch, 3, SIZE, SIZE)
        t = torch.sigmoid(torch.randn(args.batch))  # logit-normal, 2403.03206 section 3.1
        mix = t[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = fast(
                (1 - mix) * clean + mix * noise, timestep=t * 1000, class_labels=labels[index]
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
                    ema[key].lerp_(value, 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"{step} steps, {time.monotonic() - start:.0f} s, loss {running:.4f}", flush=True)
        if step % 400 == 0:
            save(ema, model, names, args.out)
    save(ema, model, names, args.out)
    print(f"done: {step} steps in {args.minutes:.0f} minutes, loss {running:.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    train(parser.parse_args())
