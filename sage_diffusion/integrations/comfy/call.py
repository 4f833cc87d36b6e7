"""One attention call as ComfyUI makes it, and as the library wants it.

ComfyUI calls ``optimized_attention(q, k, v, heads, mask, attn_precision, skip_reshape,
skip_output_reshape, scale=, enable_gqa=, low_precision_attention=, transformer_options=)`` with
q, k, v either ``[B, L, H * D]`` or, after ``skip_reshape``, ``[B, H, L, D]``.  Everything here is
plain tensors: no ComfyUI is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: ``optimized_attention``'s positional parameters, in order.
POSITIONAL = (
    "q",
    "k",
    "v",
    "heads",
    "mask",
    "attn_precision",
    "skip_reshape",
    "skip_output_reshape",
)


class UnknownCall(ValueError):
    """The call is not of a form that this version of the pack knows."""


@dataclass(frozen=True, slots=True)
class HostCall:
    """A parsed call.

    Attributes:
        q: ``[B, H, Lq, D]``, a view of what the host passed, in the host's dtype.
        k, v: ``[B, Hkv, Lk, D]``.
        mask: boolean or additive, broadcastable to ``[B, H, Lq, Lk]``, or None.
        scale: of the softmax, None for ``1 / sqrt(D)``.
        heads: H.
        skip_output_reshape: the host wants ``[B, H, Lq, D]``, not ``[B, Lq, H * D]``.
        full_precision: the model asks that this call is not quantized.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    heads: int
    skip_output_reshape: bool
    full_precision: bool

    def cross(self, context: int | None) -> bool:
        """Are the keys other tokens than the queries?  As far as lengths tell.

        More keys than queries are the queries' own and those of a cached or earlier part, unless
        they are as many as the tokens of the prompt.

        Args:
            context: tokens of the prompt that the model was called with, None if unknown.
        """
        queries, keys = self.q.shape[2], self.k.shape[2]
        if context is None:
            return queries != keys
        return keys < queries or (keys == context and keys != queries)

    def to_host(self, out: Tensor) -> Tensor:
        """``[B, H, Lq, D]`` in the layout that the host asked for."""
        if self.skip_output_reshape:
            return out
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)

    def from_host(self, out: Tensor) -> Tensor:
        """The host's own result as ``[B, H, Lq, D]``, a view."""
        if self.skip_output_reshape:
            return out
        return out.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _value(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, default: Any) -> Any:
    if len(args) > position:
        return args[position]
    return kwargs.get(POSITIONAL[position], default)


def parse_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> HostCall:
    """Read the arguments of ``optimized_attention``.

    Args:
        args: positional arguments, q first.
        kwargs: named ones; names that this version does not know are the host's own business.

    Raises:
        UnknownCall: shapes or types that can't be understood; says which.
    """
    q, k, v = (_value(args, kwargs, i, None) for i in range(3))
    for x in (q, k, v):
        # Newer versions wrap tensors in containers, and unpack them for overrides that do not say
        # they take containers; whatever else may come is left to the host.
        if not isinstance(x, Tensor):
            raise UnknownCall(f"q, k and v must be tensors, got {type(x).__name__}")
    heads = _value(args, kwargs, 3, None)
    if not isinstance(heads, int) or heads < 1:
        raise UnknownCall(f"heads must be a positive int, got {heads!r}")
    split = not _value(args, kwargs, 6, False)
    gqa = bool(kwargs.get("enable_gqa", False))
    q, k, v = _heads_first(q, k, v, heads) if split else (q, k, v)
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise UnknownCall(
            f"q, k and v must have 4 dims with skip_reshape, got {q.ndim}, {k.ndim} and {v.ndim}"
        )
    if k.shape[1] != q.shape[1] and not gqa:
        raise UnknownCall(
            f"k must have q's {q.shape[1]} heads without enable_gqa, got {k.shape[1]}"
        )
    return HostCall(
        q,
        k,
        v,
        _mask(_value(args, kwargs, 4, None)),
        kwargs.get("scale"),
        heads,
        bool(_value(args, kwargs, 7, False)),
        kwargs.get("low_precision_attention", True) is False,
    )


def _heads_first(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, L, H * D]`` -> ``[B, H, L, D]``, views; SD3's v comes as ``[B, L, H, D]``."""
    if q.ndim != 3 or k.ndim not in (3, 4) or v.ndim not in (3, 4):
        raise UnknownCall(
            f"q, k and v must have shape [B, L, H * D], got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    batch, width = q.shape[0], q.shape[-1]
    if width % heads:
        raise UnknownCall(f"q's width must be a multiple of its {heads} heads, got {width}")
    dim = width // heads
    parts = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim == 3:
            if x.shape[-1] % dim:
                raise UnknownCall(f"{name}'s width must be heads of {dim}, got {x.shape[-1]}")
            x = x.unflatten(-1, (-1, dim))
        if x.shape[0] != batch and x.shape[0] * x.shape[1] % batch == 0:
            # The host takes q's batch for all three: HyperTile cuts the queries only.
            x = x.reshape(batch, -1, *x.shape[2:])
        parts.append(x.transpose(1, 2))
    return parts[0], parts[1], parts[2]


def _mask(mask: Any) -> Tensor | None:
    """``[B|1, H|1, Lq|1, Lk]`` of what ComfyUI passes: ``[Lq, Lk]``, ``[B, Lq, Lk]`` or 4 dims."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise UnknownCall(f"mask must be a tensor or None, got {type(mask).__name__}")
    if mask.ndim == 3:
        return mask.unsqueeze(1)
    return mask


def native_of(call: HostCall, run: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """A session's ``native`` that runs the host's own call with the host's own arguments."""

    def native(
        q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float | None
    ) -> Tensor:
        return call.from_host(run())

    return native
