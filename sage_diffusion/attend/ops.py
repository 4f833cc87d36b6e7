"""The custom operators: what ``torch.compile`` sees of an attention call.

:func:`attention` computes the spec that it is given, and may be captured in a CUDA graph.
:func:`layer_attention` asks a session, so a compiled graph neither breaks nor recompiles while the
precision changes from step to step.  A captured graph would repeat one step's decision without
asking again: the operator says so by a tag, and inductor runs it between graphs.  The layer is
named by a 0-dim CPU tensor: a Python int would be a constant of the graph and cost one
recompilation per layer.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from sage_diffusion.attend.calls import Call
from sage_diffusion.attend.execution import compute
from sage_diffusion.kernels.rope import Rope
from sage_diffusion.kernels.spec import AttentionSpec


class Attends(Protocol):
    """What a handle stands for: a session's layer."""

    def attend(self, call: Call) -> Tensor:
        """``[B, H, Lq, D]``, as the session decides."""

    def bypass(self, tokens: int, reason: str) -> None:
        """Count a call that the host runs itself."""


# Handles must be looked up from inside the operator, which only tensors and constants reach: the
# one registry of this package.  It keeps nothing alive.
_LAYERS: weakref.WeakValueDictionary[int, Attends] = weakref.WeakValueDictionary()
# A program that was exported and is loaded by another process must find nobody, not somebody else.
_NEXT = itertools.count(secrets.randbelow(1 << 62))


# What ``mode="reduce-overhead"`` makes of an operator that decides in Python: from PyTorch 2.9 on
# inductor captures what stands between such operators, 2.8 captures nothing of their graph, and 2.7
# and older, which know no tag, capture nothing of a graph with a CPU tensor, the layer's handle.
_DECIDES_IN_PYTHON: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _DECIDES_IN_PYTHON["tags"] = (torch.Tag.cudagraph_unsafe,)


def register(layer: Attends) -> Tensor:
    """A handle by which the operator finds ``layer``: a 0-dim int64 CPU tensor."""
    number = next(_NEXT)
    _LAYERS[number] = layer
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _find(handle: Tensor) -> Attends:
    number = int(handle)
    found = _LAYERS.get(number)
    if found is None:
        raise RuntimeError(
            "the session of this attention layer is not here: a compiled or exported model has "
            "outlived it, or was loaded by another process; compile or export it again"
        )
    return found


def by_spec(call: Call, spec: str, backend: str, return_lse: bool) -> tuple[Tensor, Tensor]:
    """:func:`attention` of a call."""
    how = (spec, call.is_causal, call.scale, backend, return_lse)
    tables = (*_tables(call.rope_q), *_tables(call.rope_k))
    return attention(*call[:4], *how, *tables, call.sign_seed)


def by_layer(call: Call, layer: Tensor) -> Tensor:
    """:func:`layer_attention` of a call, by the layer's handle."""
    how = (layer, call.is_causal, call.scale)
    return layer_attention(*call[:4], *how, *_tables(call.rope_q), *_tables(call.rope_k))


def _tables(rope: Rope | None) -> tuple[Tensor | None, Tensor | None, bool]:
    """A rotation for an operator, which takes tensors and constants only."""
    return (None, None, True) if rope is None else (rope.cos, rope.sin, rope.interleaved)


def _rope(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rope | None:
    """The other way round."""
    return None if cos is None or sin is None else Rope(cos, sin, interleaved)


@torch.library.custom_op("sage_diffusion::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    spec: str,
    is_causal: bool,
    scale: float | None,
    backend: str,
    return_lse: bool,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    q_interleaved: bool = True,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    k_interleaved: bool = True,
    sign_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`sage_diffusion.attention`; without ``return_lse`` the second result is empty.

    The tables of both rotations come one by one.
    """
    ropes = _rope(q_cos, q_sin, q_interleaved), _rope(k_cos, k_sin, k_interleaved)
    call = Call(q, k, v, mask, is_causal, scale, *ropes, sign_seed)
    out, lse = compute(call, AttentionSpec.parse(spec), backend, return_lse)
    if lse is None or not return_lse:
        lse = q.new_empty(0, dtype=torch.float32)
    return out.contiguous(), lse.contiguous()


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    spec: str,
    is_causal: bool,
    scale: float | None,
    backend: str,
    return_lse: bool,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    q_interleaved: bool = True,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    k_interleaved: bool = True,
    sign_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return out, lse


@torch.library.custom_op("sage_diffusion::layer_attention", mutates_args=(), **_DECIDES_IN_PYTHON)
def layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    is_causal: bool,
    scale: float | None,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    q_interleaved: bool = True,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    k_interleaved: bool = True,
) -> Tensor:
    """:meth:`Layer.attend` of the layer with this handle."""
    ropes = _rope(q_cos, q_sin, q_interleaved), _rope(k_cos, k_sin, k_interleaved)
    out = _find(layer).attend(Call(q, k, v, mask, is_causal, scale, *ropes))
    return out.contiguous()


@layer_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    is_causal: bool,
    scale: float | None,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    q_interleaved: bool = True,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    k_interleaved: bool = True,
) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


# It changes nothing of the handle; saying so is what keeps a call without a result in the graph.
@torch.library.custom_op("sage_diffusion::bypass", mutates_args=("layer",), **_DECIDES_IN_PYTHON)
def bypass(layer: Tensor, tokens: int, reason: str) -> None:
    """:meth:`Attends.bypass` from compiled code."""
    _find(layer).bypass(tokens, reason)


@bypass.register_fake
def _(layer: Tensor, tokens: int, reason: str) -> None:
    return None
