"""Changes of ids that need no generator: paint, swap, shuffle, fewer codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError

#: Differences of codes that are held at a time.
_PAIRS = 1 << 22


def touched(mask: Tensor, height: int, width: int) -> Tensor:
    """Tokens that a painted mask touches, ``[B, h, w]`` bool.

    Args:
        mask: ``[B, H, W]`` or ``[H, W]``, above 0.5 where painted, of any size.
    """
    mask = mask if mask.ndim == 3 else mask[None]
    return F.adaptive_max_pool2d(mask.float()[:, None], (height, width))[:, 0] > 0.5


def paint(ids: Tensor, where: Tensor, code: int, codes: int) -> Tensor:
    """``ids`` with one id where ``where`` is true.

    Args:
        ids: ``[B, h, w]`` or ``[B, h, w, Q]``.
        where: broadcastable to ``[B, h, w]``, bool.
        code: 0 .. ``codes`` - 1.

    Raises:
        TokenizerError: the id is out of range.
    """
    _check(code, codes)
    return ids.masked_fill(_wide(where, ids), code)


def swap(ids: Tensor, where: Tensor, first: int, second: int, codes: int) -> Tensor:
    """Two ids in each other's place.  Raises TokenizerError where one is out of range."""
    _check(first, codes)
    _check(second, codes)
    other = torch.where(ids == first, second, torch.where(ids == second, first, ids))
    return torch.where(_wide(where, ids), other, ids)


def shuffle(ids: Tensor, where: Tensor, seed: int) -> Tensor:
    """The tokens where ``where`` is true in another order, picture by picture."""
    out, generator = ids.clone(), torch.Generator().manual_seed(seed)
    chosen = where.expand(ids.shape[:3])
    for picture, mask in zip(out, chosen, strict=True):
        found = picture[mask]
        picture[mask] = found[torch.randperm(len(found), generator=generator).to(found.device)]
    return out


@torch.no_grad()
def palette(tokenizer: Tokenizer, ids: Tensor, where: Tensor, count: int) -> Tensor:
    """Each token as the nearest of the ``count`` that the pictures use most.

    Args:
        tokenizer: whose codes say what is near.
        ids: ``[B, h, w]``, or ``[B, h, w, Q]``: then a token is all its levels.
        where: tokens that may change.
        count: tokens that are left, at least 1.

    Raises:
        TokenizerError: ``count`` is below 1, or ids are out of range.
    """
    if count < 1:
        raise TokenizerError(f"a palette must keep at least 1 token, got {count}")
    flat = ids.reshape(-1, *ids.shape[3:])
    kinds, inverse, counts = flat.unique(dim=0, return_inverse=True, return_counts=True)
    kept = counts.argsort(descending=True, stable=True)[:count]
    try:
        vectors = tokenizer.quantizer.decode(kinds[None].to(tokenizer.device))[0].float()
    except ValueError as error:
        raise TokenizerError(str(error)) from None
    nearest = torch.empty(len(kinds), dtype=torch.int64)
    step = max(1, _PAIRS // max(1, len(kept)))
    for start in range(0, len(kinds), step):
        some, left = vectors[start : start + step], vectors[kept.to(vectors.device)]
        # Not by a product, whose rounding keeps a code from being nearest to itself.
        distances = torch.cdist(some, left, compute_mode="donot_use_mm_for_euclid_dist")
        nearest[start : start + step] = distances.argmin(1).cpu()
    out = kinds[kept][nearest.to(kinds.device)][inverse].view(ids.shape)
    return torch.where(_wide(where, ids), out, ids)


def _wide(where: Tensor, ids: Tensor) -> Tensor:
    """A mask of tokens for ids that may have levels."""
    where = where.to(ids.device)
    return where if ids.ndim == 3 else where[..., None]


def _check(code: int, codes: int) -> None:
    if not 0 <= code < codes:
        raise TokenizerError(f"an id must be 0 .. {codes - 1}, got {code}")
