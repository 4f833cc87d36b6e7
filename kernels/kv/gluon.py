"""Host side of the decode kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import LOG2E
from ..vq.tuning import processors
from .gluon_kernel import decode_kernel
from .sides import Side, expanded, of_heads
from .tuning import Launch, launch, shorter, splits, tiles


def decode(
    q: Tensor,
    k: Side,
    v: Side,
    scale: float,
    mask: Tensor | None = None,
    *,
    config: Launch | None = None,
    split: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial results of splits of the tokens, to be merged.

    Args:
        q: ``[B, Hq, L, D]``.
        k: per channel.
        v: per token.
        scale: of the scores.
        mask: boolean or additive, broadcastable to ``[B, Hq, L, tokens]``, or None.
        config, split: instead of the built-in choice.

    Returns:
        ``[S, B, Hq, L, D]`` float32 and the log-sum-exp in base 2, ``[S, B, Hq, L]`` float32.
    """
    batch, q_heads, queries, dim = q.shape
    heads = k.words.shape[1]
    rows = q_heads // heads * queries
    gains, sms = dim // v.group, processors(q.device)
    if config is None:
        config = launch(dim, k.width, v.width, rows, k.group, gains)
        config = shorter(config, k.tokens, batch * heads * -(-rows // config.rows), sms)
    blocks = -(-rows // config.rows)
    count = tiles(k.tokens, k.group, config.tile)
    split = split or splits(count, batch * heads * blocks, sms, config.num_warps)
    span = -(-count // (split * config.num_warps)) * config.num_warps
    split = -(-count // span)
    out = torch.empty(split, batch, q_heads, queries, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(split, batch, q_heads, queries, dtype=torch.float32, device=q.device)
    mask, kind, strides = expanded(mask, (batch, q_heads, queries, k.tokens))
    k_words, v_words = of_heads(k.words), of_heads(v.words)
    k_steps, v_steps = _steps(k, torch.int32, torch.int16), _steps(v, torch.int16, torch.int8)
    with torch.cuda.device_of(q):
        decode_kernel[(split, batch * heads, blocks)](
            q.contiguous(),
            k_words,
            *k_steps,
            v_words,
            *v_steps,
            mask,
            out,
            lse,
            scale * LOG2E,
            heads,
            rows,
            queries,
            k.tokens,
            count,
            span,
            k_words.stride(1),
            k_steps[0].stride(1),
            v_words.stride(1),
            v_steps[0].stride(1),
            *strides,
            D=dim,
            K=k.width,
            V=v.width,
            TILE=config.tile,
            GROUP=k.group,
            GAINS=gains,
            ROWS=config.rows,
            MASK=kind,
            CLAMP=k.tokens % k.group != 0 or k.group % config.tile != 0,
            K_EIGHT=k.step.dtype == torch.uint8,
            V_EIGHT=v.step.dtype == torch.uint8,
            num_warps=config.num_warps,
        )
    return out, lse


def _steps(side: Side, full: torch.dtype, eight: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Steps and zeros as integers of a type for 16 bits and one for 8."""
    step = of_heads(side.step)
    dtype = eight if step.dtype == torch.uint8 else full
    return step.view(dtype), None if side.zero is None else of_heads(side.zero).view(dtype)
