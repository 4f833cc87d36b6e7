"""Ids and codebooks as pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError

#: Turn of the colour circle between neighbouring ids, after which no two are alike for long.
_GOLDEN = (math.sqrt(5) - 1) / 2


def token_map(ids: Tensor, scale: int = 8) -> Tensor:
    """A colour for each id, ``[B, 3, h * scale, w * scale]`` in 0 .. 1; of levels the first."""
    first = ids if ids.ndim == 3 else ids[..., 0]
    hue = (first.double() * _GOLDEN) % 1
    level = 0.55 + 0.45 * ((first.double() * _GOLDEN**2) % 1)
    thirds = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=torch.float64, device=ids.device)
    waves = 0.5 + 0.5 * torch.cos(2 * math.pi * (hue[:, None] - thirds[:, None, None]))
    return _larger((waves * level[:, None]).float(), scale)


def usage_map(ids: Tensor, codes: int, scale: int = 4) -> Tensor:
    """A square of all codes in their order, brighter where used more, ``[1, 3, S, S]``.

    Args:
        ids: any shape; levels count alike.
        codes: K; the square's last places may stand for none.
    """
    side = math.isqrt(codes - 1) + 1
    counts = torch.zeros(side * side, dtype=torch.float64)
    counts[:codes] = torch.bincount(ids.flatten().cpu(), minlength=codes)[:codes].double()
    share = (counts.log1p() / counts.max().log1p().clamp(min=1e-9)).float().view(1, side, side)
    # Dark blue for none, over red to yellow.
    stops = torch.tensor([[0.05, 0.05, 0.2], [0.8, 0.15, 0.25], [1.0, 0.95, 0.4]])
    at = share[..., None] * (len(stops) - 1)
    low = at.floor().long().clamp(max=len(stops) - 2)
    part = at - low
    colours = stops[low[..., 0]] * (1 - part) + stops[low[..., 0] + 1] * part
    return _larger(colours.permute(0, 3, 1, 2), scale)


@torch.no_grad()
def code_sheet(tokenizer: Tokenizer, ids: Tensor, columns: int = 8) -> Tensor:
    """What single codes look like: each decoded as a small patch of nothing else.

    Args:
        tokenizer: with a decoder.
        ids: ``[N]``, or ``[N, Q]`` of levels.
        columns: patches side by side.

    Returns:
        ``[1, 3, H, W]`` in 0 .. 1, patches with a thin line between.

    Raises:
        TokenizerError: the family can't decode, or an id is out of range.
    """
    if not len(ids):
        raise TokenizerError("a sheet needs at least one id, got none")
    side = 4  # tokens: the middle ones see no border
    grid = ids.view(len(ids), 1, 1, *ids.shape[1:])
    patches = tokenizer.decode(grid.expand(-1, side, side, *ids.shape[1:]).contiguous())
    factor = tokenizer.traits.factor
    patches = patches[:, :, factor : 3 * factor, factor : 3 * factor].cpu()
    rows, size = -(-len(patches) // columns), 2 * factor + 1
    sheet = torch.ones(1, 3, rows * size + 1, columns * size + 1)
    for i, patch in enumerate(patches):
        y, x = i // columns * size + 1, i % columns * size + 1
        sheet[0, :, y : y + size - 1, x : x + size - 1] = patch
    return sheet


def _larger(x: Tensor, scale: int) -> Tensor:
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
