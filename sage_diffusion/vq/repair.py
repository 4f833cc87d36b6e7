"""Repair of a codebook of which hardly anything is used: new codes, then training with them.

New codes alone make pictures worse, because the decoder knows only the few old ones; the training
afterwards is part of the repair.  Codes that died lie together, and no map moves them apart: the
basis of a SimVQ must be a fresh one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sage_diffusion.vq.quantizers import Groups, Quantizer, Residual, SimVQ, VectorQuantizer
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError
from sage_diffusion.vq.training import Step, Training, check_pictures, crops, scales, train
from sage_diffusion.vq.usage import TOKENS, Usage, usage_of

#: How new codes are found.
METHODS = ("kmeans", "simvq")

#: Latents that new codes are fitted to: so many a code, and never fewer than are counted.
_LATENTS_PER_CODE = 4

#: Crops that are encoded at a time.
_BATCH = 16


@dataclass(frozen=True)
class Health:
    """How a tokenizer does on some pictures.

    Attributes:
        usage: of its codes.
        psnr: of all crops pooled, dB.
    """

    usage: Usage
    psnr: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"usage": self.usage.as_dict(), "psnr": self.psnr}

    def __str__(self) -> str:
        found = self.usage
        return (
            f"{found.used} of {found.codes} codes in {found.tokens} tokens, "
            f"{found.entropy_bits:.2f} bits, {self.psnr:.2f} dB"
        )


class Repaired(NamedTuple):
    """A repair.

    Attributes:
        tokenizer: the new one, in evaluation mode.
        before, refitted, after: with the old codes, with new ones, and trained.
    """

    tokenizer: Tokenizer
    before: Health
    refitted: Health
    after: Health

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {name: getattr(self, name).as_dict() for name in ("before", "refitted", "after")}

    def __str__(self) -> str:
        rows = (("before", self.before), ("new codes", self.refitted), ("trained", self.after))
        rank = self.before.usage.effective_rank, self.after.usage.effective_rank
        lines = [f"{name}: {health}" for name, health in rows]
        dims = self.before.usage.dim
        return "\n".join(
            [*lines, f"effective rank of the latents: {rank[0]:.1f}, then {rank[1]:.1f} of {dims}"]
        )


def repair(
    tokenizer: Tokenizer,
    pictures: Sequence[Tensor],
    training: Training,
    *,
    method: str = "kmeans",
    held_out: Sequence[Tensor] = (),
    checkpoint: Path | None = None,
    progress: Callable[[Step], None] = lambda step: None,
    tokens: int = TOKENS,
) -> Repaired:
    """A tokenizer with new codes, trained with them; the given one is not changed.

    Its ids mean something else afterwards, and so does its fingerprint.

    Args:
        tokenizer: one with a decoder and codebooks, alone, in groups or levels.
        pictures: ``[3, H, W]`` uint8.
        training: of the decoder and the codes at least (``parts``).
        method: "kmeans" (Lloyd's algorithm on the latents), or "simvq": ``C W' + b`` of a fresh
            Gaussian C with the mean and covariance of the latents, trained as :class:`SimVQ`.
        held_out: pictures for the figures; without any those of the training.
        checkpoint, progress: as of :func:`sage_diffusion.vq.training.train`.
        tokens: that are counted for the figures.

    Raises:
        TokenizerError: it has no decoder or no codebook, or the pictures or settings won't do.
    """
    if method not in METHODS:
        raise TokenizerError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_pictures(tokenizer, pictures, training.crop)
    judged = list(held_out) or pictures
    check_pictures(tokenizer, judged, training.crop)
    check_codebook(tokenizer.quantizer)
    before = health(tokenizer, judged, training.crop, tokens)
    made = copy.deepcopy(tokenizer).eval()
    count = max(tokens, _LATENTS_PER_CODE * tokenizer.codebook_size)
    latents = torch.cat([z.flatten(0, 2) for z, _ in _latents(made, pictures, training, count)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        made.quantizer = refit(tokenizer.quantizer, latents, method).to(made.device).eval()
    refitted = health(made, judged, training.crop, tokens)
    train(made, pictures, training, checkpoint=checkpoint, progress=progress)
    return Repaired(made, before, refitted, health(made, judged, training.crop, tokens))


def check_codebook(quantizer: Quantizer) -> None:
    """Raise TokenizerError unless a quantizer has codebooks that can be fitted anew."""
    if isinstance(quantizer, (Groups, Residual)):
        for part in quantizer.parts:
            check_codebook(part)
    elif quantizer.levels != 1 or quantizer.grid or not hasattr(quantizer, "table"):
        raise TokenizerError(
            "repair needs a codebook, alone, in groups or in levels; "
            f"{quantizer.kind} has none that can be fitted anew"
        )


def refit(quantizer: Quantizer, latents: Tensor, method: str) -> Quantizer:
    """A quantizer of new codes for latents ``[N, D]``, of the same sizes.

    Codes that were chosen by their angle stay so; all others are the nearest afterwards.
    """
    if isinstance(quantizer, Groups):
        own = latents.split([part.dim for part in quantizer.parts], dim=-1)
        pairs = zip(quantizer.parts, own, strict=True)
        return Groups([refit(part, some, method) for part, some in pairs])
    if isinstance(quantizer, Residual):
        parts = []
        for part in quantizer.parts:
            parts.append(refit(part, latents, method))
            latents = latents - parts[-1].decode(parts[-1].encode(latents[None]))[0]
        return Residual(parts)
    dim, codes = quantizer.dim, quantizer.codebook_size
    if method == "simvq":
        return _fresh_simvq(dim, codes, latents)
    metric = "cosine" if getattr(quantizer, "metric", "") == "cosine" else "l2"
    made = VectorQuantizer(dim, codes, metric=metric).to(latents.device)
    made.start(nn.functional.normalize(latents, dim=-1) if metric == "cosine" else latents)
    return made


@torch.no_grad()
def _fresh_simvq(dim: int, codes: int, latents: Tensor) -> SimVQ:
    """Codes with the latents' mean and covariance S: ``W = S^(1/2) D^(1/2)``, as C has 1 / D."""
    made = SimVQ(dim, codes).to(latents.device)
    centred = latents.double() - latents.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.t() @ centred / max(len(latents) - 1, 1))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    made.projection.weight.copy_(root * dim**0.5)
    made.projection.bias.copy_(latents.double().mean(0))
    return made


def health(
    tokenizer: Tokenizer, pictures: Sequence[Tensor], crop: int, tokens: int = TOKENS
) -> Health:
    """Figures on crops of pictures that are always the same.

    Args:
        tokenizer: with a decoder.
        pictures: ``[3, H, W]`` uint8.
        crop: side of the crops.
        tokens: that are counted, as of :func:`sage_diffusion.vq.usage.usage`.
    """
    ids, latents, errors = [], [], []
    with torch.no_grad():
        for z, batch in _latents(tokenizer, pictures, Training(crop=crop, seed=1), tokens):
            found = tokenizer.quantizer.encode(z.flatten(1, 2))
            again = tokenizer.pixels(tokenizer.quantizer.decode(found).view(z.shape)).clamp(0, 1)
            errors.append((again.cpu() - batch).double().square().mean())
            ids.append(found.flatten(0, 1))
            latents.append(z.flatten(0, 2))
    error = torch.stack(errors).mean().clamp(min=1e-12)
    found_usage = usage_of(tokenizer, torch.cat(latents), torch.cat(ids), tokens)
    return Health(found_usage, -10 * error.log10().item())


@torch.no_grad()
def _latents(
    tokenizer: Tokenizer, pictures: Sequence[Tensor], training: Training, count: int
) -> list[tuple[Tensor, Tensor]]:
    """Latents ``[B, h, w, D]`` of random crops and the crops, with so many tokens or a few more."""
    generator = torch.Generator().manual_seed(training.seed)
    sizes = [scales(picture) for picture in pictures]
    found, done = [], 0
    while done < count:
        batch = crops(sizes, _BATCH, training.crop, generator)
        z = tokenizer.latents(batch.to(tokenizer.device))
        found.append((z, batch))
        done += z.shape[:3].numel()
    return found
