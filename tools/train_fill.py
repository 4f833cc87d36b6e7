"""Train a model that fills masked tokens, on the photographs that the tokenizer was trained on.

    python tools/train_fill.py --data photographs --out out/fill

A bidirectional transformer over the ids (MaskGIT, 2202.04200) in diffusers' ``UVit2DModel``: a
share of a crop's tokens is masked, drawn along a cosine, and predicted from the others.  Codes that
are near each other start as near ids, read and written, and rare ones as improbable: what is left
to learn is how codes follow each other.  A run that is stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UVit2DModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sage_diffusion.files import write_bytes
from sage_diffusion.integrations.diffusers.fill import Notes, save_fill
from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.tokenizer import Tokenizer, cropped, token_bits
from sage_diffusion.vq.training import scales
from tools.train_tokenizer import photographs

#: Sides of a batch's crops, and how many tokens a batch has.
SIDES, TOKENS = (16, 16, 16, 24, 32), 4096
RATE = 2e-3

#: Pixels by which pictures are shifted against the tokens' grid: each shift gives other tokens.
SHIFTS = ((0, 0), (3, 5), (6, 2))


def model_of(codebook: Tensor, counts: Tensor, width: int = 128, layers: int = 5) -> UVit2DModel:
    """Fresh weights for a codebook ``[K, D]``, whose ids occur ``counts`` times.

    The last id is that of a masked token.
    """
    torch.manual_seed(0)
    codes, dim = codebook.shape
    model = UVit2DModel(
        hidden_size=width,
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
        use_bias=True,
    )
    codebook = (codebook - codebook.mean(0)) / codebook.std(0)
    head = model.mlm_layer.conv2
    with torch.no_grad():
        model.embed.embeddings.weight[:codes] = codebook @ torch.randn(dim, width) / dim**0.5
        head.weight[:, :, 0, 0] = codebook @ torch.randn(dim, width) / (dim * width) ** 0.5
        head.bias.copy_((counts + 1).log() - (counts + 1).sum().log())
    return model


class Trained(nn.Module):
    """The model without its last product, which only masked tokens need."""

    def __init__(self, model: UVit2DModel):
        super().__init__()
        self.head, model.mlm_layer.conv2 = model.mlm_layer.conv2, nn.Identity()
        self.model = model

    def whole(self) -> UVit2DModel:
        """The model again."""
        self.model.mlm_layer.conv2 = self.head
        return self.model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[M, K]`` of the ids under the mask, without any condition."""
        count, config = len(ids), self.model.config
        micro = config.micro_cond_embed_dim // config.micro_cond_encode_dim
        hidden = self.model(
            ids.masked_fill(mask, config.vocab_size - 1),
            encoder_hidden_states=torch.zeros(count, 1, config.encoder_hidden_size),
            pooled_text_emb=torch.zeros(count, config.cond_embed_dim),
            micro_conds=torch.zeros(count, micro),
        )
        return F.linear(hidden.movedim(1, 3)[mask], self.head.weight[:, :, 0, 0], self.head.bias)


@torch.no_grad()
def grids_of(tokenizer: Tokenizer, pictures: dict[str, Tensor], shifts: tuple) -> list[Tensor]:
    """Ids ``[h, w]`` of every picture, its mirror image, and both at smaller scales, shifted."""
    found = []
    for picture in pictures.values():
        for scaled in scales(picture):
            for turned in (scaled, scaled.flip(2)):
                for down, right in shifts:
                    shifted = turned[None, :, down:, right:].float() / 255
                    ids = tokenizer.encode(cropped(shifted, tokenizer.traits.factor)[0])[0]
                    if min(ids.shape) >= max(SIDES):
                        found.append(ids.short())
    return found


def crops(grids: list[Tensor], side: int, generator: torch.Generator) -> Tensor:
    """A batch ``[N, side, side]``, larger grids more often."""
    areas = torch.tensor([float(g.numel()) for g in grids])
    out = []
    count = TOKENS // side**2
    for i in torch.multinomial(areas.sqrt(), count, replacement=True, generator=generator):
        grid = grids[int(i)]
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in grid.shape)
        out.append(grid[top : top + side, left : left + side])
    return torch.stack(out).long()


@torch.no_grad()
def held_out_bits(trained: Trained, grids: list[Tensor], share: float = 0.25) -> float:
    """Cross-entropy of masked ids in bits, with that share of the tokens masked."""
    trained.eval()
    generator = torch.Generator().manual_seed(1)
    total = number = 0.0
    for _ in range(8):
        ids = crops(grids, SIDES[0], generator)
        mask = torch.rand(ids.shape, generator=generator) < share
        total += F.cross_entropy(trained(ids, mask), ids[mask], reduction="sum").item()
        number += mask.sum().item()
    trained.train()
    return total / number / math.log(2)


def optimizer_of(trained: Trained) -> torch.optim.Optimizer:
    """Weights decay, norms and biases do not."""
    decayed = [p for p in trained.parameters() if p.ndim > 1]
    plain = [p for p in trained.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))


def checkpoint(path: Path, trained: Trained, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write where the run stands."""
    tensors = {f"model.{name}": x for name, x in trained.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"adam.{index}.{name}": x for name, x in state.items()})
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    write_bytes(path, save(tensors, {"step": json.dumps(step)}))


def resumed(path: Path, trained: Trained, optimizer: torch.optim.Optimizer) -> int:
    """Steps that were done, after their state was read."""
    if not path.is_file():
        return 0
    model, adam = {}, {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            kind, rest = name.split(".", 1)
            if kind == "model":
                model[rest] = file.get_tensor(name)
            else:
                index, field = rest.split(".")
                adam.setdefault(int(index), {})[field] = file.get_tensor(name)
        step = json.loads(file.metadata()["step"])
    trained.load_state_dict(model)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": adam})
    return step


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--tokenizer", default="bundled")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    grids = grids_of(tokenizer, photographs("training", options.data), SHIFTS)
    others = grids_of(tokenizer, photographs("held_out", options.data), SHIFTS[:1])
    entropy = token_bits(torch.cat([g.flatten() for g in others]).long())
    ids = torch.cat([g.flatten() for g in grids]).long()
    print(f"{len(grids)} grids, {len(ids)} tokens; held out {entropy:.2f} bits a token", flush=True)
    counts = torch.bincount(ids, minlength=tokenizer.codebook_size).float()
    codebook = tokenizer.quantizer.decode(torch.arange(tokenizer.codebook_size)[None])[0].detach()
    trained = Trained(model_of(codebook, counts))
    optimizer, start = optimizer_of(trained), time.process_time()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "training.safetensors"
    for step in range(resumed(path, trained, optimizer), options.steps):
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        generator = torch.Generator().manual_seed(step)
        side = SIDES[int(torch.randint(len(SIDES), (), generator=generator))]
        ids = crops(grids, side, generator)
        share = torch.cos(0.5 * math.pi * torch.rand(len(ids), 1, 1, generator=generator))
        mask = torch.rand(ids.shape, generator=generator) < share.clamp(min=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = trained(ids, mask)
        loss = F.cross_entropy(logits.float(), ids[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            bits, seen = held_out_bits(trained, others), loss.item() / math.log(2)
            spent = time.process_time() - start
            print(f"{step + 1} {seen:.2f} bits, held out {bits:.2f}, {spent:.0f} CPU-s", flush=True)
            checkpoint(path, trained, optimizer, step + 1)
    model = trained.eval().whole().half()
    notes = Notes(fingerprint=tokenizer.fingerprint, window=max(SIDES), sharpness=2.5)
    save_fill(options.out / "model", model, notes)


if __name__ == "__main__":
    main()
