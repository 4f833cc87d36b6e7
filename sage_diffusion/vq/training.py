"""Train a tokenizer on pictures: crops, mean squared error, a checkpoint to go on from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sage_diffusion.files import write_bytes
from sage_diffusion.json_files import JSONError, parse_json
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError

#: Shorter sides that larger pictures are scaled down to, so that crops show things of many sizes.
_SIDES = (1024, 512, 320)

_WARM_UP = 100

#: What may be trained.
PARTS = ("all", "decoder")


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        steps: of the optimizer.
        batch: crops a step.
        crop: side of a crop in pixels.
        learning_rate: at its highest, after a linear start; it falls to zero along a cosine.
        seed: of crops and dead codes' new places.
        bfloat16: convolutions in BF16 (autocast); the quantizer stays in float32.
        parts: "all", or "decoder": the encoder stays, quantizer and decoder learn.
    """

    steps: int = 2000
    batch: int = 16
    crop: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    bfloat16: bool = False
    parts: str = "all"

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.crop) < 1 or not self.learning_rate > 0:
            raise ValueError(f"steps, batch, crop and learning_rate must be positive, got {self}")
        if self.parts not in PARTS:
            raise ValueError(f"parts must be one of {', '.join(PARTS)}, got {self.parts!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        start = min(1.0, (step + 1) / min(_WARM_UP, self.steps))
        return self.learning_rate * start * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Step(NamedTuple):
    """One step of training, for a progress bar.

    Attributes:
        step: how many are done.
        psnr: of the batch, dB.
        used: different ids in the batch.
    """

    step: int
    psnr: float
    used: int


def scales(picture: Tensor) -> list[Tensor]:
    """A picture ``[3, H, W]`` uint8 in the sizes that crops are taken from."""
    side = min(picture.shape[1:])
    found = []
    for wanted in _SIDES:
        if side >= wanted:
            size = [max(1, round(n * wanted / side)) for n in picture.shape[1:]]
            small = torch.nn.functional.interpolate(
                picture[None].float(), size, mode="bilinear", antialias=True
            )
            found.append(small[0].round().clamp(0, 255).to(torch.uint8))
    return found or [picture]


def crops(
    pictures: Sequence[Sequence[Tensor]], count: int, side: int, g: torch.Generator
) -> Tensor:
    """``[count, 3, side, side]`` in 0 .. 1: any picture, size and place, half of them mirrored."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=g))

    found = []
    for _ in range(count):
        sizes = pictures[pick(len(pictures))]
        picture = sizes[pick(len(sizes))]
        y, x = (pick(n - side + 1) for n in picture.shape[1:])
        crop = picture[:, y : y + side, x : x + side]
        found.append(crop.flip(-1) if pick(2) else crop)
    return torch.stack(found).float() / 255


def train(
    tokenizer: Tokenizer,
    pictures: Sequence[Tensor],
    training: Training,
    *,
    checkpoint: Path | None = None,
    save_every: int = 500,
    progress: Callable[[Step], None] = lambda step: None,
) -> Tokenizer:
    """Train in place and return the tokenizer, in evaluation mode.

    Steps depend on their number and the seed alone: a run that goes on from its checkpoint ends as
    one that was never interrupted.

    Args:
        tokenizer: one with a decoder; what is frozen stays so.
        pictures: ``[3, H, W]`` uint8.
        training: the settings.
        checkpoint: safetensors with everything needed to go on; read where it exists.
        save_every: steps between checkpoints.
        progress: called after every step; what it raises ends the training, with a checkpoint.

    Raises:
        TokenizerError: no pictures, one that is smaller than a crop, a crop that the tokenizer
            can't take, a checkpoint of other settings, or latents or a loss that are not finite.
    """
    check_pictures(tokenizer, pictures, training.crop)
    sizes = [scales(picture) for picture in pictures]
    trained: list[nn.Module] = [tokenizer]
    if training.parts == "decoder":
        assert tokenizer.decoder is not None
        trained = [tokenizer.quantizer, tokenizer.decoder]
    parameters = [p for part in trained for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, training.learning_rate, betas=(0.9, 0.99))
    done = _resume(checkpoint, tokenizer, optimizer, training)
    tokenizer.train()
    with torch.random.fork_rng(devices=[]):
        for step in range(done, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step)
            seed = training.seed * 1_000_003 + step
            torch.manual_seed(seed)
            batch = crops(sizes, training.batch, training.crop, torch.Generator().manual_seed(seed))
            found = _step(tokenizer, optimizer, batch.to(tokenizer.device), training, step)
            due = (step + 1) % save_every == 0 or step + 1 == training.steps
            try:
                progress(found)
            except BaseException:  # however a host cancels: the step is whole, so it is kept
                due = True
                raise
            finally:
                if checkpoint and due:
                    _save(checkpoint, tokenizer, optimizer, training, step + 1)
    return tokenizer.eval()


def check_pictures(tokenizer: Tokenizer, pictures: Sequence[Tensor], crop: int) -> None:
    """Raise TokenizerError unless these can be trained on in crops of that side."""
    traits = tokenizer.traits
    if tokenizer.decoder is None:
        raise TokenizerError(f"{traits.family} can't be trained: {traits.no_decoder}")
    if crop % traits.factor:
        raise TokenizerError(f"crop must be a multiple of {traits.factor}, got {crop}")
    if traits.size not in (None, crop):
        raise TokenizerError(f"crop must be {traits.size} for {traits.family}, got {crop}")
    if not pictures:
        raise TokenizerError("training needs at least one picture, got none")
    for picture in pictures:
        if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3:
            raise TokenizerError(f"pictures must be uint8 [3, H, W], got {tuple(picture.shape)}")
        if min(picture.shape[1:]) < crop:
            raise TokenizerError(
                f"pictures must have sides of {crop} or more, got {tuple(picture.shape)}"
            )


@torch.no_grad()
def preview(tokenizer: Tokenizer, pictures: Sequence[Tensor], side: int, count: int = 6) -> Tensor:
    """The middles of some pictures above what the tokenizer makes of them.

    Args:
        tokenizer: with a decoder, while training too.
        pictures: ``[3, H, W]`` uint8.
        side: of a crop, a multiple of the factor.
        count: pictures side by side, at most.

    Returns:
        ``[1, 3, 2 * side, count * side]`` in 0 .. 1, on the CPU.
    """
    found = []
    for picture in pictures[:count]:
        y, x = ((n - side) // 2 for n in picture.shape[1:])
        found.append(picture[:, y : y + side, x : x + side].float() / 255)
    batch = torch.stack(found)
    again = tokenizer.decode(tokenizer.encode(batch.to(tokenizer.device))).cpu()
    rows = [torch.cat(list(x), dim=-1) for x in (batch, again)]
    return torch.cat(rows, dim=-2)[None]


def _step(
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    training: Training,
    step: int,
) -> Step:
    with (
        torch.autocast(batch.device.type, torch.bfloat16, enabled=training.bfloat16),
        torch.set_grad_enabled(training.parts == "all"),
    ):
        z = tokenizer.latents(batch)
    _check_finite(z, "latents", step)
    out = tokenizer.quantizer(z.flatten(1, 2))
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=training.bfloat16):
        again = tokenizer.pixels(out.quantized.view(z.shape))
    error = torch.nn.functional.mse_loss(again, batch)
    loss = 4 * error + out.loss  # pictures span 2 in the network's range
    _check_finite(loss, "loss", step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    optimizer.step()
    psnr = -10 * math.log10(max(error.item(), 1e-12))
    return Step(step + 1, psnr, len(out.indices.unique()))


def _check_finite(x: Tensor, name: str, step: int) -> None:
    if not bool(torch.isfinite(x).all()):
        raise TokenizerError(
            f"{name} must stay finite, got NaN in step {step}: lower learning_rate"
        )


def _save(
    path: Path,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    training: Training,
    done: int,
) -> None:
    from safetensors.torch import save

    tensors = {f"model.{name}": x for name, x in tokenizer.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"adam.{index}.{name}": x for name, x in state.items()})
    header = {"step": done, "training": asdict(training), "quantizer": tokenizer.quantizer.settings}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_bytes(path, save(tensors, {"sage_vq_training": json.dumps(header)}))


def _resume(
    path: Path | None, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, training: Training
) -> int:
    """Steps that a checkpoint has done; 0 where there is none."""
    if path is None or not path.exists():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {}).get("sage_vq_training", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, JSONError) as error:
        raise TokenizerError(f"{path} is no checkpoint: {error}") from None
    want = {"training": asdict(training), "quantizer": tokenizer.quantizer.settings}
    if not isinstance(header, dict) or {name: header.get(name) for name in want} != want:
        raise TokenizerError(f"{path} is a checkpoint of other settings; remove it to start anew")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, index, entry = name.split(".")
            state.setdefault(int(index), {})[entry] = tensor
    tokenizer.load_state_dict({n[6:]: x for n, x in tensors.items() if n.startswith("model.")})
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(header["step"])
