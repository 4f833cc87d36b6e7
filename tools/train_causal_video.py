"""Train a small causal video diffusion model on a CPU.

Diffusers' own ``WanTransformer3DModel`` on the bouncing digits of ``sage_diffusion.kv.bouncing``:
a latent is a 2 x 2 block of pixels (12 channels, no autoencoder), a token 2 x 2 latents, so 64
tokens a frame, and a frame is a block of the autoregression.  Trained as a rectified flow
(2209.03003) with teacher forcing: noisy frames read the clean frames before them, all in one
sequence.

    python tools/train_causal_video.py --out causal_video --minutes 60
    python tools/train_causal_video.py --out causal_video --minutes 30 --resume
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from sage_diffusion.kv.bouncing import FRAMES, Clips, empty_scene, render, sample_clips, vote

CHECKPOINT_STEPS = 100


def build_model(layers: int = 5, heads: int = 3) -> WanTransformer3DModel:
    """The untrained network, its modulation zero as in the DiT paper (2212.09748 section 3.2)."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=12,
        out_channels=12,
        text_dim=16,
        ffn_dim=640,
        num_layers=layers,
        rope_max_seq_len=128,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    nn.init.zeros_(model.condition_embedder.time_proj.weight)
    nn.init.zeros_(model.condition_embedder.time_proj.bias)
    for block in model.blocks:
        nn.init.zeros_(block.scale_shift_table)
    nn.init.zeros_(model.scale_shift_table)
    return model


def to_latents(pictures: Tensor) -> Tensor:
    """``[..., 3, 32, 32]`` in -1 .. 1 to ``[..., 12, 16, 16]``, 2 x 2 pixels to a latent."""
    return F.pixel_unshuffle(pictures, 2)


def rotary(
    model: WanTransformer3DModel, frames: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Wan's rotary angles of the tokens of some frames, ``[1, frames * tokens, 1, 64]`` each."""
    count = int(frames.max()) + 1
    whole = model.rope(torch.empty(1, 1, count, height, width))
    cos, sin = (x.unflatten(1, (count, -1))[:, frames].flatten(1, 2) for x in whole)
    return cos, sin


class TeacherForcing:
    """Self-attention over [clean frames, noisy frames], block-causal.

    Matrix products, as those are what a CPU does well with bfloat16.

    Args:
        clean: the clean frames' places in time, ascending.
        noisy: frame that each noisy block stands for; it reads the clean frames before and itself.
        tokens: of a frame.
    """

    def __init__(self, clean: list[int], noisy: list[int], tokens: int):
        past = torch.tensor(clean).repeat_interleave(tokens)
        place = torch.tensor(noisy).repeat_interleave(tokens)
        self.tokens = tokens
        self.length, self.blocks = len(past), len(noisy)
        self.clean = torch.zeros(len(past), len(past)).masked_fill_(past[:, None] < past, -1e4)
        self.noisy = torch.zeros(len(place), len(past)).masked_fill_(place[:, None] <= past, -1e4)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        shape = (attn.heads, -1)
        query = _rotated(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, shape), rotary_emb)
        key = _rotated(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, shape), rotary_emb)
        value = attn.to_v(hidden_states).unflatten(2, shape)
        query = query * query.shape[-1] ** -0.5
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
        rest = query.shape[2] - self.length
        sizes = [self.length, rest]
        (old, new), (past_key, own_key) = query.split(sizes, 2), key.split(sizes, 2)
        past_value, own_value = value.split(sizes, 2)
        found = torch.softmax((old @ past_key.mT).float() + self.clean, -1).to(value) @ past_value
        per_block = (self.blocks, self.tokens)
        own = new.unflatten(2, per_block) @ own_key.unflatten(2, per_block).mT
        past = (new @ past_key.mT).float() + self.noisy
        weights = torch.softmax(torch.cat([past, own.flatten(2, 3).float()], -1), -1).to(value)
        mixed = weights[..., : self.length] @ past_value
        local = weights[..., self.length :].unflatten(2, per_block)
        mixed = mixed + (local @ own_value.unflatten(2, per_block)).flatten(2, 3)
        return attn.to_out[0](torch.cat([found, mixed], 2).transpose(1, 2).flatten(2))


class Silent:
    """Cross-attention to a single token: its value, whatever the query."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return attn.to_out[0](attn.to_v(encoder_hidden_states)).expand_as(hidden_states)


def _rotated(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = angles
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def forward(
    model: WanTransformer3DModel,
    clean: Tensor,
    places: list[int],
    noisy: Tensor,
    frames: list[int],
    time: Tensor,
) -> Tensor:
    """Velocities of the noisy frames.

    Args:
        clean: latents ``[B, C, 12, 16, W]``; W is 16, or less where only the left columns are
            learned.
        places: the C frames that they are, ascending.
        noisy: latents ``[B, M, 12, 16, W]``.
        frames: the M frames that they stand for; each reads the clean frames before it.
        time: ``[B, M]`` in 0 .. 1, 1 is noise.

    Returns:
        ``[B, M, 12, 16, W]``.
    """
    batch, past, _, height, width = clean.shape
    size = height // 2 * (width // 2)
    attention = TeacherForcing(places, frames, size)
    for block in model.blocks:
        block.attn1.processor = attention
        block.attn2.processor = Silent()
    angles = rotary(model, torch.tensor([*places, *frames]), height, width)
    tokens = model.patch_embedding(torch.cat([clean, noisy], 1).transpose(1, 2))
    tokens = tokens.flatten(2).transpose(1, 2).contiguous()
    times = torch.cat([torch.zeros(batch, past), time * 1000], 1)
    text = torch.zeros(batch, 1, model.config.text_dim)
    embedded, modulation, text, _ = model.condition_embedder(
        times.flatten(), text, None, timestep_seq_len=times.shape[1]
    )
    modulation = modulation.unflatten(2, (6, -1)).repeat_interleave(size, 1)
    for block in model.blocks:
        # Called past torch.compile where shapes are others than those of training.
        call = block if model.training else block.forward
        tokens = call(tokens, text, modulation, angles)
    tokens = tokens[:, past * size :]
    embedded = embedded[:, past:].repeat_interleave(size, 1)
    shift, scale = (model.scale_shift_table[None] + embedded[:, :, None]).chunk(2, 2)
    tokens = model.norm_out(tokens.float()) * (1 + scale[:, :, 0]) + shift[:, :, 0]
    out = model.proj_out(tokens)  # [B, M * size, 4 * 12]: token = (row, column), (dy, dx, channel)
    out = out.view(batch, len(frames), height // 2, width // 2, 2, 2, 12)
    return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(noisy.shape)


def frames_of_a_step(
    clean: int, noisy: int, random: torch.Generator
) -> tuple[list[int], list[int]]:
    """Which frames a step reads, and which it denoises: mostly those that show the digit.

    The history of a step is the first ten frames, when the digit is there to be seen, and some of
    the others: a step costs by the frame.
    """
    rest = 10 + torch.randperm(FRAMES - 11, generator=random)[: clean - 10].sort().values
    hidden, before, after = noisy // 8, noisy // 4, noisy - noisy // 8 - noisy // 4
    draw = [(12, 28, hidden), (1, 17, before), (25, FRAMES, after)]
    drawn = [torch.randint(low, high, (count,), generator=random) for low, high, count in draw]
    return [*range(10), *rest.tolist()], torch.cat(drawn).tolist()


def weights_of(latents: Tensor) -> Tensor:
    """Weights of the loss, ``[B, M, 1, 12, W]``: 5 at and around the digit, 1 elsewhere, mean 1."""
    background = to_latents(empty_scene())[..., : latents.shape[-1]]
    digit = ((latents - background).abs().amax(2, keepdim=True) > 1e-3).float()
    near = F.max_pool2d(digit.flatten(0, 1), 3, 1, 1).view_as(digit)
    return (1 + 4 * near) / (1 + 4 * near).mean()


def remembered(
    model: WanTransformer3DModel, clips: Clips, frame: int, width: int
) -> tuple[float, float]:
    """Shares of clips whose identity, and identity and place, one step from noise gets right."""
    latents = to_latents(render(clips))[..., :width]
    noise = torch.randn(
        len(clips), 1, *latents.shape[2:], generator=torch.Generator().manual_seed(1)
    )
    past = list(range(frame))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = forward(model, latents[:, :frame], past, noise, [frame], torch.ones(len(clips), 1))
    pictures = empty_scene().repeat(len(clips), 1, 1, 1)
    pictures[..., : 2 * width] = F.pixel_shuffle((noise - found.float())[:, 0], 2)
    judged = vote(pictures, int(clips.visible(frame).min()))
    same = judged.identity == clips.identity
    x, y = clips.place(frame)
    exact = same & (judged.x == x) & (judged.y == y)
    return same.float().mean().item(), exact.float().mean().item()


def optimizers(model: nn.Module, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    blocks = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(blocks, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, fraction: float) -> float:
    """Warm-up over 50 steps, then constant, then linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / 50) * min(1.0, (1 - fraction) / 0.4 + 0.01)


@dataclass
class State:
    """What a checkpoint holds besides the weights."""

    step: int = 0
    seconds: float = 0.0


def train(
    out: Path,
    *,
    minutes: float,
    batch: int = 4,
    clean: int = 16,
    noisy: int = 16,
    peak: float = 2e-3,
    resume: bool = False,
    width: int = 16,
    compiled: bool = True,
) -> State:
    """Train until `minutes` have passed, with checkpoints, and save the moving average."""
    torch.manual_seed(0)
    model = build_model().train()
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    steppers = optimizers(model, peak)
    state = State()
    checkpoint = out / "checkpoint.pt"
    if resume:
        held = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(held["model"])
        average = held["average"]
        for stepper, kept in zip(steppers, held["optimizers"], strict=True):
            stepper.load_state_dict(kept)
        state = State(held["step"], held["seconds"])
    out.mkdir(parents=True, exist_ok=True)
    if compiled:
        for block in model.blocks:
            block.compile()
    random = torch.Generator().manual_seed(state.step)
    test = sample_clips(32, seed=1, split="test")
    running, begin = math.nan, time.monotonic() - state.seconds
    while (fraction := (time.monotonic() - begin) / (60 * minutes)) < 1:
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = peak * schedule(state.step, fraction)
        past, frames = frames_of_a_step(clean, noisy, random)
        latents = to_latents(render(sample_clips(batch, seed=state.step + 1000)))[..., :width]
        known, target = latents[:, past], latents[:, frames]
        # The model will read its own pictures, so it learns to read ones that are a bit off.
        dirt = 0.15 * torch.rand(batch, len(past), 1, 1, 1) * torch.rand(batch, 1, 1, 1, 1)
        known = known + dirt * torch.randn_like(known)
        noise = torch.randn_like(target)
        t = torch.sigmoid(torch.randn(batch, len(frames)) + 0.6)
        mix = t[:, :, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            found = forward(model, known, past, (1 - mix) * target + mix * noise, frames, t)
        loss = (weights_of(target) * (found.float() - (noise - target)) ** 2).mean()
        for stepper in steppers:
            stepper.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        decay = min(0.995, (state.step + 1) / (state.step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        state.step, state.seconds = state.step + 1, time.monotonic() - begin
        if state.step % 20 == 0:
            spent = time.process_time()
            done = f"{state.step} steps, {state.seconds:.0f} s, {spent:.0f} s of CPU"
            print(f"{done}, loss {running:.4f}", flush=True)
        if state.step % CHECKPOINT_STEPS == 0:
            same, exact = remembered(model.eval(), test, FRAMES - 1, width)
            model.train()
            print(f"  after the wall: identity {same:.0%}, with place {exact:.0%}", flush=True)
            held = {
                "model": model.state_dict(),
                "average": average,
                "optimizers": [stepper.state_dict() for stepper in steppers],
                "step": state.step,
                "seconds": state.seconds,
            }
            torch.save(held, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save(average, out)
    save(average, out)
    print(f"done: {state.step} steps, loss {running:.4f}", flush=True)
    return state


def save(weights: dict[str, Tensor], out: Path) -> None:
    """The model with FP16 safetensors, as ``from_pretrained`` reads it."""
    model = build_model()
    model.load_state_dict(weights)
    model.half().save_pretrained(out / "transformer")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="those before a resume too")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clean", type=int, default=16, help="frames of history in a step, <= 31")
    parser.add_argument("--noisy", type=int, default=16, help="frames denoised in a step")
    parser.add_argument(
        "--width", type=int, default=16, help="columns of latents; all that moves is in the first 8"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    train(
        args.out,
        minutes=args.minutes,
        batch=args.batch,
        clean=args.clean,
        noisy=args.noisy,
        peak=args.lr,
        width=args.width,
        resume=args.resume,
        compiled=not args.no_compile,
    )


if __name__ == "__main__":
    main()
