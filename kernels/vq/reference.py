"""The Torch twin of the nearest-code kernel: the same tiles, splits and order of comparisons."""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import Terms


def nearest_code(
    z: Tensor,
    table: Tensor,
    terms: Terms,
    *,
    block_k: int = 128,
    splits: int = 1,
    rounded: bool = False,
) -> Tensor:
    """Ids ``[N]``, int64, of the codes with the largest score.

    Args:
        z, table: ``[N, D]`` and ``[K, D]``, floating and finite.
        terms: scale and bias of the codes.
        block_k: codes of a tile.
        splits: parts of the codes that are searched apart.
        rounded: score tiles with operands rounded to BF16; each split's best tile is scored again
            exactly.
    """
    a, b = (x.bfloat16().float() if rounded else x.float() for x in (z, table))
    count = len(table)
    span = -(-count // (splits * block_k)) * block_k
    best = torch.full((len(z),), -torch.inf, device=z.device)
    found = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    value, tile = [], []
    for low in range(0, count, span):
        top, where = torch.full_like(best, -torch.inf), torch.zeros_like(found)
        for start in range(low, min(low + span, count), block_k):
            stop = min(start + block_k, count)
            maximum = _scores(a, b, terms, start, stop).amax(1)
            better = maximum > top  # strict: the first of equal tiles stays
            top = torch.where(better, maximum, top)
            where = torch.where(better, start, where)
        value.append(top)
        tile.append(where)
    first = torch.stack(value).argmax(0)
    for split, where in enumerate(tile):
        for start in where.unique().tolist():
            scores = _scores(z.float(), table.float(), terms, start, min(start + block_k, count))
            maximum, code = scores.max(1)
            wanted = (where == start) & ((maximum > best) if rounded else (first == split))
            best = torch.where(wanted, maximum, best)
            found = torch.where(wanted, start + code, found)
    return found


def _scores(z: Tensor, table: Tensor, terms: Terms, start: int, stop: int) -> Tensor:
    """Scores of codes ``start`` to ``stop``, ``[N, stop - start]`` float32.

    By way of float64: a CPU's float32 product rounds equal codes differently from place to place.
    """
    scores = (z.double() @ table[start:stop].double().t()).float()
    if terms.scale is not None:
        scores = scores * terms.scale[start:stop]
    return scores if terms.bias is None else scores + terms.bias[start:stop]
