"""Attention over parts of the past, joined by their log-sum-exp.

An exact sink, a packed body and an exact window are three sets of tokens that nobody wants in one
tensor: each gives its own softmax with the log of its normalizer, and the parts are weighted by
these (Milakov and Gimelshein, 1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Attention over some tokens.

    Attributes:
        out: ``[B, Hq, L, D]`` float32, zero where no token may be attended to.
        lse: ``[B, Hq, L]`` float32, natural log; minus infinity there.
    """

    out: Tensor
    lse: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Part:
    """Attention of ``q [B, Hq, L, D]`` over ``k, v [B, H, T, D]``; Hq is a multiple of H.

    Args:
        mask: ``[B or 1, Hq or 1, L or 1, T]``, bool (true: may attend) or added to the scores.
    """
    batch, heads, rows, _ = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, -1, q.shape[3]).float()  # [B, H, G L, D]
    scores = (grouped * scale) @ k.float().transpose(2, 3)
    scores = scores.view(batch, heads, rows, -1)
    if mask is not None:
        bias = mask if mask.is_floating_point() else as_bias(mask)
        scores = scores + bias
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - top).exp_()
    norm = weights.sum(-1, keepdim=True)
    out = weights.view(batch, kv_heads, grouped.shape[2], -1) @ v.float()
    out = out.view(batch, heads, rows, -1) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    return Part(out, (top + norm.log()).squeeze(-1))


def merge(parts: Sequence[Part]) -> Part:
    """Attention over the tokens of all parts, which must not overlap."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    total = lse.logsumexp(0)
    weights = (lse - total.clamp(min=torch.finfo(torch.float32).min)).exp()
    out = sum(part.out * weight[..., None] for part, weight in zip(parts, weights, strict=True))
    assert isinstance(out, Tensor)
    return Part(out, total)


def as_bias(mask: Tensor) -> Tensor:
    """A bool mask as what is added to the scores: 0 or minus infinity, float32."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def columns(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    """A mask's tokens ``start`` to ``stop``."""
    return None if mask is None else mask[..., start:stop]
