"""Rotations that a processor of diffusers applies right before attention, put off until then.

In place of the rotated Q or K the processor gets :class:`Unrotated`.  Attention that is quantized
takes its tensor and its tables; whatever else looks at its values finds them rotated, by the
processor's own function.  So it does not matter what else a processor does with Q and K.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.utils._pytree import tree_map

from sage_diffusion.kernels.rope import Rope, check_rope

#: diffusers' own function, which the modules of the Flux family call by this name.
ROTARY = apply_rotary_emb

#: By this name processors of the Wan family find what replaces their inner function.
PAIRS = "_sage_rotate_pairs"


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


#: What a tensor and its rotation have in common.
_SAME = frozenset(
    (
        *map(_getter, ("dtype", "shape", "device", "ndim", "layout", "requires_grad", "is_cuda")),
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
    )
)


class Unrotated(Tensor):
    """Q or K in place of its rotation; any use but attention rotates first.

    Attributes:
        plain: the same, an ordinary tensor.
        rope: the tables.
        heads_dim: 1 if the shape is ``[B, H, L, D]``, 2 if it is ``[B, L, H, D]``.
    """

    plain: Tensor
    rope: Rope
    heads_dim: int
    _rotate: Callable[[], Tensor]
    _done: Tensor | None

    @classmethod
    def of(cls, x: Tensor, rope: Rope, heads_dim: int, rotate: Callable[[], Tensor]) -> Unrotated:
        """``x``, which ``rotate()`` rotates as its host does; ``x`` must not change any more."""
        new = x.as_subclass(cls)
        new.plain, new.rope, new.heads_dim = x, rope, heads_dim
        new._rotate, new._done = rotate, None
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAME:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.type_as and not isinstance(args[0], Unrotated):
            return args[0].to(args[1].dtype)  # of the second it reads no value
        args, kwargs = tree_map(as_rotated, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def as_rotated(x: Any) -> Any:
    """Anything, but of an :class:`Unrotated` the rotation, which is computed once."""
    if not isinstance(x, Unrotated):
        return x
    if x._done is None:
        x._done = x._rotate()
    return x._done


def taken_apart(x: Tensor, heads_dim: int) -> tuple[Tensor, Rope | None]:
    """A tensor and what attention over this layout still has to rotate it by."""
    if not isinstance(x, Unrotated):
        return x, None
    if x._done is not None or x.heads_dim != heads_dim:
        return as_rotated(x), None
    return x.plain, x.rope


def with_tables(
    x: Tensor, rope: Rope, heads_dim: int, rotate: Callable[[], Tensor]
) -> Unrotated | None:
    """``x`` with its tables, None if they are of a kind that the kernels don't take."""
    try:
        check_rope(rope, x if heads_dim == 1 else x.transpose(1, 2), "x")
    except (TypeError, ValueError):
        return None
    return Unrotated.of(x, rope, heads_dim, rotate)


# ---------------------------------------------------------------------- the Wan family
def rotate_pairs(hidden_states: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """The function that processors of the Wan family define inside of themselves, word for word."""
    return _template()(hidden_states, freqs_cos, freqs_sin)


def _template() -> Any:
    def apply_rotary_emb(
        hidden_states: torch.Tensor,
        freqs_cos: torch.Tensor,
        freqs_sin: torch.Tensor,
    ):
        x1, x2 = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
        cos = freqs_cos[..., 0::2]
        sin = freqs_sin[..., 1::2]
        out = torch.empty_like(hidden_states)
        out[..., 0::2] = x1 * cos - x2 * sin
        out[..., 1::2] = x1 * sin + x2 * cos
        return out.type_as(hidden_states)

    return apply_rotary_emb


def pair_tables(freqs_cos: Tensor, freqs_sin: Tensor) -> Rope | None:
    """Its tables ``[1, L, 1, D]`` as ``[1, L, D / 2]``, None if they have another shape."""
    if freqs_cos.ndim != 4 or freqs_cos.shape[2] != 1 or freqs_cos.shape != freqs_sin.shape:
        return None
    return Rope(freqs_cos[:, :, 0, 0::2], freqs_sin[:, :, 0, 1::2])


def _forwarding() -> types.CodeType:
    source = f"def apply_rotary_emb(x, cos, sin): return {PAIRS}(x, cos, sin)"
    return compile(source, __file__, "exec").co_consts[0]


def _alike(code: types.CodeType) -> tuple[Any, ...]:
    return (
        code.co_code,
        code.co_consts,
        code.co_names,
        code.co_varnames,
        code.co_argcount,
        code.co_freevars,
    )


_PAIRS_CODE, _FORWARDING = _alike(_template().__code__), _forwarding()


def with_pairs_routed(code: types.CodeType) -> types.CodeType:
    """A processor's code whose inner :func:`rotate_pairs` calls the global :data:`PAIRS`.

    Only a function that consists of the very same instructions is replaced.
    """
    consts = tuple(
        _FORWARDING if isinstance(c, types.CodeType) and _alike(c) == _PAIRS_CODE else c
        for c in code.co_consts
    )
    return code if consts == code.co_consts else code.replace(co_consts=consts)
