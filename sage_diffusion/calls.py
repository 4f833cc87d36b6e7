"""One attention call: as a host hands it over, and as its own attention and observers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sage_diffusion.kernels.rope import Rope, rotated
from sage_diffusion.kernels.spec import AttentionSpec

#: The host's own attention: ``native(q, k, v, mask, is_causal, scale)`` with ``[B, H, L, D]``.
Native = Callable[[Tensor, Tensor, Tensor, Any, bool, "float | None"], Tensor]


class Call(NamedTuple):
    """One call: what a :data:`Native` takes, and what q and k are still to be rotated by."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    is_causal: bool
    scale: float | None
    rope_q: Rope | None = None
    rope_k: Rope | None = None

    def part(self, i: int, count: int) -> Call:
        """The i-th of ``count`` equal parts of the batch; what all rows share stays whole."""
        size = self.q.shape[0] // count
        own = [
            r if r is None else r.rows(i * size, (i + 1) * size) for r in (self.rope_q, self.rope_k)
        ]
        mask = self.mask
        return self._replace(
            q=rows(self.q, i, size),
            k=rows(self.k, i, size),
            v=rows(self.v, i, size),
            mask=mask if mask is None or mask.ndim < 4 else rows(mask, i, size),
            rope_q=own[0],
            rope_k=own[1],
        )

    def plain(self) -> tuple[Tensor, Tensor, Tensor, Any, bool, float | None]:
        """What a :data:`Native` takes, q and k rotated by Torch."""
        q, k = rotated(self.q, self.rope_q), rotated(self.k, self.rope_k)
        return q, k, self.v, self.mask, self.is_causal, self.scale


def rows(x: Tensor, i: int, size: int) -> Tensor:
    """The i-th ``size`` rows of a batch; the only row where one serves all."""
    return x if x.shape[0] == 1 else x[i * size : (i + 1) * size]


def torch_native(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float | None
) -> Tensor:
    """PyTorch's attention on ``[B, H, L, D]``: what a layer runs where its host names nothing."""
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


@dataclass(frozen=True)
class AttentionEvent:
    """One call as an observer sees it, right after it ran.  Read the tensors, don't keep them.

    Attributes:
        layer: name of the layer.
        step: index of the sampling step, -1 outside sampling.
        progress: position in the schedule, 0 .. 1.
        branch: "cond", "uncond" or None where the host doesn't say; a batch that holds both is
            shown in parts.
        spec: what ran; ``fp16`` also where the plan's spec was declined.
        q, k, v, mask, is_causal, scale: the call, ``[B, H, L, D]``; q and k rotated, also where
            that was left to the kernels.
        out: ``[B, H, Lq, D]``.
    """

    layer: str
    step: int
    progress: float
    branch: str | None
    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    out: Tensor


class Observer(Protocol):
    """Watches the calls of a session."""

    def observe(self, event: AttentionEvent) -> None:
        """Called after every call that the session served, fp16 ones included."""
