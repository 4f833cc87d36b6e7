"""The Torch twin of the decode kernels: attention tile by tile, and the merging of its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .sides import Side, Turn

#: Tokens that are decoded at a time, in whole groups.
TILE = 256


def decode(
    q: Tensor,
    k: Side,
    v: Side,
    scale: float,
    mask: Tensor | None = None,
    turn: Turn | None = None,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """Attention of q on packed keys and values, of which one tile is unpacked at a time.

    Args:
        q: ``[B, Hq, L, D]``, floating; Hq a multiple of the heads of K and V.
        k, v: of the same number of tokens; per channel or per token.
        scale: of the scores.
        mask: boolean (true: seen) or additive, broadcastable to ``[B, Hq, L, tokens]``, or None.
        turn: RoPE of k, where k was stored before it.
        tile: tokens at a time, rounded to whole groups.

    Returns:
        ``[B, Hq, L, D]`` float32, zeros where nothing is seen, and the log-sum-exp of the scaled
        scores ``[B, Hq, L]`` float32, there -inf.
    """
    batch, q_heads, queries, dim = q.shape
    heads, tokens = k.words.shape[1], k.tokens
    rows = q.float().reshape(batch, heads, -1, dim) * scale
    unit = _unit(k, v)
    step = max(1, tile // unit) * unit
    out = rows.new_zeros(rows.shape)
    total, top = rows.new_zeros(rows.shape[:3]), rows.new_full(rows.shape[:3], -torch.inf)
    if mask is not None:
        mask = mask.expand(batch, q_heads, queries, tokens)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        keys = k.read(start, stop)
        keys = keys if turn is None else turn.keys(keys, start)
        scores = rows @ keys.transpose(2, 3)  # [B, H, rows, tile]
        if mask is not None:
            part = mask[..., start:stop].reshape(batch, heads, -1, stop - start)
            if part.dtype == torch.bool:
                scores = scores.masked_fill(~part, -torch.inf)
            else:
                scores = scores + part
        highest = torch.maximum(top, scores.amax(-1))
        # Where nothing was seen yet, differences of infinities would be NaN.
        base = highest.masked_fill(highest == -torch.inf, 0.0)
        p, shrink = (scores - base[..., None]).exp(), (top - base).exp()
        out = out * shrink[..., None] + p @ v.read(start, stop)
        total, top = total * shrink + p.sum(-1), highest
    lse = (top + total.log()).reshape(batch, q_heads, queries)
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    return out.reshape(batch, q_heads, queries, dim), lse


def _unit(k: Side, v: Side) -> int:
    """Tokens of which both sides have whole groups."""
    return math.lcm(*(side.group for side in (k, v) if side.axis == "channel"))


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all tokens from that over disjoint parts of them.

    Args:
        parts: outputs ``[.., D]`` and log-sum-exps ``[..]``, as :func:`decode` gives them.

    Returns:
        The same pair, float32.
    """
    lse = torch.stack([one.float() for _, one in parts])
    total = lse.logsumexp(0)
    weight = (lse - total.masked_fill(total == -torch.inf, 0.0)).exp()
    out = sum(part.float() * w[..., None] for (part, _), w in zip(parts, weight, strict=True))
    assert isinstance(out, Tensor)
    return out, total
