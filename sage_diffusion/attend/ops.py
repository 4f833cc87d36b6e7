"""The one custom operator: what ``torch.compile`` sees of an attention call.

The precision is decided inside the operator, so a compiled graph neither breaks nor recompiles
while it changes from step to step.  The layer is named by a 0-dim CPU tensor: a Python int would be
a constant of the graph and cost one recompilation per layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

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
_NEXT = itertools.count(1)


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
            f"attention layer {number} no longer exists: the compiled model outlived its "
            "session, compile it again"
        )
    return found


def by_spec(call: Call, spec: str, backend: str, return_lse: bool) -> tuple[Tensor, Tensor]:
    """The operator on a call that names its spec."""
    where = (None, spec, call.is_causal, call.scale, backend, return_lse)
    return attention(*call[:4], *where, *_tables(call))


def by_layer(call: Call, layer: Tensor) -> Tensor:
    """The operator on a call of a layer, by its handle."""
    where = (layer, "", call.is_causal, call.scale, "auto", False)
    return attention(*call[:4], *where, *_tables(call))[0]


def _tables(
    call: Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, bool]:
    """The last arguments of :func:`attention`: an operator takes tensors and constants only."""
    q, k = call.rope_q, call.rope_k
    return (
        None if q is None else q.cos,
        None if q is None else q.sin,
        None if k is None else k.cos,
        None if k is None else k.sin,
        q is None or q.interleaved,
        k is None or k.interleaved,
    )


@torch.library.custom_op("sage_diffusion::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor | None,
    spec: str,
    is_causal: bool,
    scale: float | None,
    backend: str,
    return_lse: bool,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    q_interleaved: bool = True,
    k_interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention by spec, or, where ``layer`` is given, as its session decides.

    Shapes as in :func:`sage_diffusion.attention`; without ``return_lse`` the second result is
    empty.  The tables of both rotations come one by one.
    """
    lse: Tensor | None = None
    rope_q = None if q_cos is None or q_sin is None else Rope(q_cos, q_sin, q_interleaved)
    rope_k = None if k_cos is None or k_sin is None else Rope(k_cos, k_sin, k_interleaved)
    call = Call(q, k, v, mask, is_causal, scale, rope_q, rope_k)
    if layer is not None:
        out = _find(layer).attend(call)
    else:
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
    layer: Tensor | None,
    spec: str,
    is_causal: bool,
    scale: float | None,
    backend: str,
    return_lse: bool,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    q_interleaved: bool = True,
    k_interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return out, lse


# It changes nothing of the handle; saying so is what keeps a call without a result in the graph.
@torch.library.custom_op("sage_diffusion::bypass", mutates_args=("layer",))
def bypass(layer: Tensor, tokens: int, reason: str) -> None:
    """:meth:`Attends.bypass` from compiled code."""
    _find(layer).bypass(tokens, reason)


@bypass.register_fake
def _(layer: Tensor, tokens: int, reason: str) -> None:
    return None
