"""Train a model that fills masked tokens, on the photographs that the tokenizer was trained on.

    python tools/train_fill.py --data photographs --out out/fill

A bidirectional transformer over the ids (MaskGIT, 2202.04200) in diffusers' ``UVit2DModel``: a
share of a crop's tokens is masked, drawn along a cosine, and predicted from the others.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UVit2DModel
from torch import Tensor

from sage_diffusion.integrations.diffusers.fill import Notes, save_fill
from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.tokenizer import Tokenizer, cropped, token_bits
from sage_diffusion.vq.training import scales
from tools.train_tokenizer import photographs

SIDE, BATCH, RATE = 16, 16, 2e-3


def model_of(codes: int, width: int = 128, layers: int = 5) -> UVit2DModel:
    """Fresh weights; the last id is that of a masked token."""
    torch.manual_seed(0)
    return UVit2DModel(
        hidden_size=width,
        hidden_dropout=0.1,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=16,
        vocab_size=codes + 1,
        codebook_size=codes,
        in_channels=width,
        block_out_channels=width,
        num_res_blocks=1,
        block_num_heads=4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=3 * width,
    )


def logits_of(model: UVit2DModel, ids: Tensor) -> Tensor:
    """``[B, K, h, w]`` float32, without any condition."""
    count, config = len(ids), model.config
    found = model(
        ids,
        encoder_hidden_states=torch.zeros(count, 1, config.encoder_hidden_size),
        pooled_text_emb=torch.zeros(count, config.cond_embed_dim),
        micro_conds=torch.zeros(count, config.micro_cond_embed_dim // config.micro_cond_encode_dim),
    )
    return found.float()


def grids_of(tokenizer: Tokenizer, pictures: dict[str, Tensor]) -> list[Tensor]:
    """Ids ``[h, w]`` of every picture, its mirror image, and both at smaller scales."""
    found = []
    for picture in pictures.values():
        for scaled in scales(picture):
            for turned in (scaled, scaled.flip(2)):
                pixels, _ = cropped(turned[None].float() / 255, tokenizer.traits.factor)
                ids = tokenizer.encode(pixels)[0]
                if min(ids.shape) >= SIDE:
                    found.append(ids)
    return found


def crops(grids: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """``[count, SIDE, SIDE]``, larger grids more often."""
    areas = torch.tensor([float(g.numel()) for g in grids])
    out = []
    for i in torch.multinomial(areas.sqrt(), count, replacement=True, generator=generator):
        grid = grids[int(i)]
        top, left = (int(torch.randint(n - SIDE + 1, (), generator=generator)) for n in grid.shape)
        out.append(grid[top : top + SIDE, left : left + SIDE])
    return torch.stack(out)


@torch.no_grad()
def held_out_bits(model: UVit2DModel, grids: list[Tensor], share: float = 0.25) -> float:
    """Cross-entropy of masked ids in bits, with that share of the tokens masked."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    total = number = 0.0
    for _ in range(8):
        ids = crops(grids, BATCH, generator)
        mask = torch.rand(ids.shape, generator=generator) < share
        logits = logits_of(model, ids.masked_fill(mask, model.config.vocab_size - 1))
        total += F.cross_entropy(logits, ids, reduction="none")[mask].sum().item()
        number += mask.sum().item()
    model.train()
    return total / number / math.log(2)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--tokenizer", default="bundled")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    grids = grids_of(tokenizer, photographs("training", options.data))
    others = grids_of(tokenizer, photographs("held_out", options.data))
    entropy = token_bits(torch.cat([g.flatten() for g in others]))
    tokens = sum(g.numel() for g in grids)
    print(f"{len(grids)} grids, {tokens} tokens; held out {entropy:.2f} bits a token", flush=True)
    model = model_of(tokenizer.codebook_size)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    generator, start = torch.Generator().manual_seed(0), time.process_time()
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        ids = crops(grids, BATCH, generator)
        share = torch.cos(0.5 * math.pi * torch.rand(BATCH, 1, 1, generator=generator))
        mask = torch.rand(ids.shape, generator=generator) < share.clamp(min=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, ids.masked_fill(mask, model.config.vocab_size - 1))
        loss = F.cross_entropy(logits, ids, reduction="none")[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            bits = held_out_bits(model, others)
            spent = time.process_time() - start
            seen = loss.item() / math.log(2)
            print(f"{step + 1} {seen:.2f} bits, held out {bits:.2f}, {spent:.0f} CPU-s", flush=True)
    notes = Notes(fingerprint=tokenizer.fingerprint)
    save_fill(options.out, model.eval().half(), notes)


if __name__ == "__main__":
    main()
