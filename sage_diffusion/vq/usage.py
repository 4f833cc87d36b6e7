"""What a codebook is used for: how many codes, how evenly, and in how many dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError, token_bits

#: Tokens that usage is counted over, so that figures of different tokenizers compare.
TOKENS = 25_600


@dataclass(frozen=True)
class Usage:
    """Use of a codebook over a fixed number of tokens.

    Attributes:
        tokens: that were counted.
        codes: K, or K^Q of levels, whose ids count as one.
        used: different ids among them.
        even: ids that an even use of all codes would show in so many tokens.
        entropy_bits: of the ids as they are used; ``log2(codes)`` at most.
        perplexity: ``2 ** entropy_bits``, as many codes used evenly.
        effective_rank: dimensions of the latents: the exponential of the entropy of their
            covariance's eigenvalues (Roy and Vetterli, 2007); D at most.
        dim: D.
        most: the ids used most, with their counts.
    """

    tokens: int
    codes: int
    used: int
    even: float
    entropy_bits: float
    perplexity: float
    effective_rank: float
    dim: int
    most: tuple[tuple[int, int], ...]

    @property
    def dead(self) -> int:
        """Codes that no token has."""
        return self.codes - self.used

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "dead": self.dead, "most": [list(pair) for pair in self.most]}


def effective_rank(latents: Tensor) -> float:
    """Of ``[N, D]``; 0 if they are all the same."""
    centred = latents.double() - latents.double().mean(0)
    values = torch.linalg.eigvalsh(centred.t() @ centred).clamp(min=0)
    if not values.sum() > 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * shares.log()).sum().item())


@torch.no_grad()
def usage(tokenizer: Tokenizer, images: Iterable[Tensor], tokens: int = TOKENS) -> Usage:
    """Count the codes of pictures.

    Args:
        tokenizer: any.
        images: as :meth:`Tokenizer.encode` takes them.  If they have more tokens than are counted,
            tokens are drawn from all of them with a fixed seed; if fewer, all count.  The rank is
            that of all latents.
        tokens: that are counted at most.

    Raises:
        TokenizerError: no pictures, or one that does not fit.
    """
    latents, ids = [], []
    for image in images:
        z = tokenizer.latents(image).flatten(1, 2)
        latents.append(z.flatten(0, 1))
        found = tokenizer.quantizer.encode(z)
        ids.append(found.flatten(0, 1))
    if not ids:
        raise TokenizerError("usage needs at least one picture, got none")
    return usage_of(tokenizer, torch.cat(latents), torch.cat(ids), tokens)


def usage_of(tokenizer: Tokenizer, latents: Tensor, ids: Tensor, tokens: int = TOKENS) -> Usage:
    """The same of latents ``[N, D]`` and their ids, ``[N]`` or ``[N, Q]``."""
    all_ids = _one_id(ids[None], tokenizer.codebook_size)
    if len(all_ids) > tokens:
        drawn = torch.randperm(len(all_ids), generator=torch.Generator().manual_seed(0))[:tokens]
        all_ids = all_ids[drawn]
    codes = tokenizer.codebook_size**tokenizer.quantizer.levels
    values, counts = all_ids.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:8]
    bits = token_bits(all_ids)
    return Usage(
        tokens=len(all_ids),
        codes=codes,
        used=len(values),
        even=codes * -math.expm1(len(all_ids) * math.log1p(-1 / codes)),
        entropy_bits=bits,
        perplexity=2**bits,
        effective_rank=effective_rank(latents),
        dim=latents.shape[1],
        most=tuple((int(values[i]), int(counts[i])) for i in order),
    )


def _one_id(ids: Tensor, size: int) -> Tensor:
    """Levels combined into one id, first level lowest."""
    if ids.ndim == 2:
        return ids.flatten().cpu()
    if size ** ids.shape[2] >= 2**63:  # too many for one number: count rows instead
        return torch.unique(ids.flatten(0, 1).cpu(), dim=0, return_inverse=True)[1]
    places = torch.tensor([size**i for i in range(ids.shape[2])], device=ids.device)
    return (ids * places).sum(-1).flatten().cpu()


def rarity(ids: Tensor) -> Tensor:
    """Bits of every token: ``-log2`` of its id's share among all, in the shape of ``ids``."""
    _, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
    return -(counts.double() / ids.numel()).log2()[inverse].float()
