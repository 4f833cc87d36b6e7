"""Attention over parts of the past, joined by their log-sum-exp.

An exact sink, a packed body and an exact window are three sets of tokens that nobody wants in one
tensor: each gives its own softmax with the log of its normalizer, and the parts are weighted by
these (Milakov and Gimelshein, 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_FLOAT = torch.finfo(torch.float32)


class Part(NamedTuple):
    """Attention over some tokens.

    Attributes:
        out: ``[B, Hq, L, D]`` float32, zero where no token may be attended to.
        lse: ``[B, Hq, L]`` float32, natural log; minus infinity there.
    """

    out: Tensor
    lse: Tensor


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """Queries ``[B, Hq, L, D]`` -> float32 ``[B, H, R, D]``: the R = Hq / H L rows of a KV head."""
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[3]).float()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Part:
    """Attention of ``q [B, Hq, L, D]`` over ``k, v [B, H, T, D]``; Hq is a multiple of H.

    Args:
        mask: ``[B or 1, Hq or 1, L or 1, T]``, bool (true: may attend) or added to the scores.
    """
    scores = (grouped(q, k.shape[1]) * scale) @ k.float().transpose(2, 3)
    return weigh(scores, mask, q.shape[1], lambda p: p @ v.float())


def weigh(
    scores: Tensor, mask: Tensor | None, heads: int, values: Callable[[Tensor], Tensor]
) -> Part:
    """Softmax of ``scores [B, H, R, T]``, which are changed, and what it makes of the values.

    Args:
        mask: as in :func:`attend`.
        heads: Hq.
        values: ``[B, H, R, T]`` float32 weights -> ``[B, H, R, D]``.
    """
    rows = scores.shape[1] * scores.shape[2] // heads
    shape = (scores.shape[0], heads, rows, scores.shape[3])
    if mask is not None:
        scores = (scores.view(shape) + as_bias(mask)).view(scores.shape)
    top = scores.amax(-1, keepdim=True).clamp(min=_FLOAT.min)
    weights = scores.sub_(top).exp_()
    norm = weights.sum(-1, keepdim=True)
    out = values(weights) / norm.clamp(min=_FLOAT.tiny)
    lse = (top + norm.log()).view(shape[:3])
    return Part(out.view(*shape[:3], -1), lse)


def merge(parts: Sequence[Part]) -> Part:
    """Attention over the tokens of all parts, which must not overlap."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    total = lse.logsumexp(0)
    weights = (lse - total.clamp(min=_FLOAT.min)).exp()
    out = parts[0].out * weights[0, ..., None]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out.addcmul_(part.out, weight[..., None])
    return Part(out, total)


def as_bias(mask: Tensor) -> Tensor:
    """What is added to the scores: of a bool mask 0 or minus infinity, float32."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def columns(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    """A mask's tokens ``start`` to ``stop``."""
    return None if mask is None else mask[..., start:stop]


def chosen(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """A mask's tokens ``index [B, n]`` (int64), of each sequence its own; ``[B, .., .., n]``."""
    if mask is None:
        return None
    mask = mask.expand(len(index), -1, -1, -1)
    return mask.gather(3, index[:, None, None].expand(*mask.shape[:3], -1))
