"""One attention call: as a host hands it over, as backends are asked, and as observers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sage_diffusion.kernels.rope import Rope, rotated
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.machine import card_name, device_arch, parse_arch

#: The host's own attention: ``native(q, k, v, mask, is_causal, scale)`` with ``[B, H, L, D]``.
Native = Callable[[Tensor, Tensor, Tensor, Any, bool, "float | None"], Tensor]


def part_of(x: Tensor, i: int, count: int) -> Tensor:
    """The i-th of ``count`` equal parts along the batch; a batch of one belongs to all."""
    size = x.shape[0] // count
    return x if x.shape[0] == 1 else x[i * size : (i + 1) * size]


class Call(NamedTuple):
    """One call, built where it comes in and handed down whole.

    Attributes:
        q: ``[B, H, Lq, D]``; k, v: ``[B, Hkv, Lk, D]``.
        mask: boolean (True: attend) or additive, broadcastable to ``[B, H, Lq, Lk]``, or None; of
            a host's own kind where only its :data:`Native` reads it.
        is_causal: query i sees keys 0 .. i.
        scale: softmax scale, ``1 / sqrt(D)`` if None.
        rope_q, rope_k: what q and k are still to be rotated by.
        sign_seed: one int32 on q's device, of the signs of a spec's Hadamard rotation; None is 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any = None
    is_causal: bool = False
    scale: float | None = None
    rope_q: Rope | None = None
    rope_k: Rope | None = None
    sign_seed: Tensor | None = None

    @property
    def rope(self) -> bool:
        """Is q or k still to be rotated?"""
        return self.rope_q is not None or self.rope_k is not None

    @property
    def wants_grad(self) -> bool:
        """Will somebody ask for gradients of this call?"""
        return torch.is_grad_enabled() and (
            self.q.requires_grad or self.k.requires_grad or self.v.requires_grad
        )

    def rotated(self) -> Call:
        """The same call with q and k rotated by Torch."""
        if not self.rope:
            return self
        q, k = rotated(self.q, self.rope_q), rotated(self.k, self.rope_k)
        return self._replace(q=q, k=k, rope_q=None, rope_k=None)

    def part(self, i: int, count: int) -> Call:
        """The i-th of ``count`` equal parts of the batch, as views."""
        size, mask = self.q.shape[0] // count, self.mask
        ropes = [
            rope if rope is None else rope.rows(i * size, (i + 1) * size)
            for rope in (self.rope_q, self.rope_k)
        ]
        return self._replace(
            q=part_of(self.q, i, count),
            k=part_of(self.k, i, count),
            v=part_of(self.v, i, count),
            mask=mask if mask is None or mask.ndim < 4 else part_of(mask, i, count),
            rope_q=ropes[0],
            rope_k=ropes[1],
        )

    def plain(self) -> tuple[Tensor, Tensor, Tensor, Any, bool, float | None]:
        """What a :data:`Native` takes, q and k rotated by Torch."""
        return self.rotated()[:6]


#: ``run(call, spec, return_lse)`` -> output and log-sum-exp or None; the mask has four dims.
Run = Callable[[Call, AttentionSpec, bool], "tuple[Tensor, Tensor | None]"]


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
class AttentionCall:
    """Everything that the choice of a backend may look at.  No tensors inside.

    Attributes:
        q_shape, kv_shape: ``(B, H, Lq, D)`` and ``(B, Hkv, Lk, D)``.
        dtype: of q, k and v.
        device: device type, "cuda" for ROCm too.
        capability: CUDA compute capability, None elsewhere.
        hip_arch: e.g. "gfx1201" on ROCm, None elsewhere.
        mask: None, "bool" or "additive".
        is_causal, return_lse: as in :func:`sage_diffusion.attention`.
        spec: what must be computed.
        rope: q or k is still to be rotated.
        card: PyTorch's name of the GPU, None elsewhere and where it doesn't matter.
    """

    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None
    hip_arch: str | None
    mask: str | None
    is_causal: bool
    return_lse: bool
    spec: AttentionSpec
    rope: bool = False
    card: str | None = None

    @classmethod
    def of(cls, call: Call, spec: AttentionSpec, return_lse: bool = False) -> AttentionCall:
        """Describe a call."""
        q, k, mask = call.q, call.k, call.mask
        capability, hip_arch = device_arch(q.device)
        kind = None if mask is None else "bool" if mask.dtype == torch.bool else "additive"
        return cls(
            tuple(q.shape),
            tuple(k.shape),
            q.dtype,
            q.device.type,
            capability,
            hip_arch,
            kind,
            call.is_causal,
            return_lse,
            spec,
            call.rope,
            card_name(q.device),
        )

    @classmethod
    def typical(
        cls,
        spec: AttentionSpec,
        on: torch.device | str,
        head_dim: int = 128,
        tokens: int = 4096,
        *,
        dtype: torch.dtype = torch.bfloat16,
        mask: str | None = None,
        is_causal: bool = False,
    ) -> AttentionCall:
        """Self-attention of an image model: for asking what a machine, or a card, can run.

        Args:
            spec: what must be computed.
            on: a device of this machine, or any GPU by its architecture ("sm_89", "gfx942").
            head_dim, tokens: of q, k and v, which have one batch of 24 heads.
            dtype, mask, is_causal: as the attributes.
        """
        shape = (1, 24, tokens, head_dim)
        device, card = "cuda", None
        if isinstance(on, str) and on.startswith(("sm_", "gfx")):
            capability, hip_arch = parse_arch(on)
        else:
            device = torch.device(on).type
            capability, hip_arch = device_arch(torch.device(on))
            card = card_name(torch.device(on))
        arch = (device, capability, hip_arch)
        return cls(shape, shape, dtype, *arch, mask, is_causal, False, spec, card=card)


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
        sign_seed: of the call, whatever spec ran: candidates are to be measured with it.
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
    sign_seed: Tensor | None = None


class Observer(Protocol):
    """Watches the calls of a session."""

    def observe(self, event: AttentionEvent) -> None:
        """Called after every call that the session served, fp16 ones included."""
