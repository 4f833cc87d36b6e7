"""K and V that are never written out: what a compressed layer gives to a model's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_SDPA = torch.nn.functional.scaled_dot_product_attention

#: Questions that need no values.
_QUESTIONS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout")
    ),
}


class LazyPast(Tensor):
    """One side of a layer's past, ``[B, H, T, D]``, as a tensor without memory.

    ``scaled_dot_product_attention`` of a K and a V of the same layer goes to ``past.attend``; any
    other operator gets the values from ``past.read``, so a model that does something else with its
    K and V is slower, never wrong.  ``repeat_kv`` of transformers (an index, an expand, a reshape)
    is followed without reading.

    Attributes:
        past: of the layer: has ``read()`` and ``attend(q, scale, mask, causal)``.
        side: 0 for K, 1 for V.
        groups: how often each head is repeated.
        state: None, or "indexed" / "expanded" inside ``repeat_kv``.
    """

    past: Any
    side: int
    groups: int
    state: str | None

    @staticmethod
    def __new__(
        cls,
        past: Any,
        side: int,
        shape: tuple[int, ...],
        like: Tensor,
        groups: int = 1,
        state: str | None = None,
    ) -> LazyPast:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made.past, made.side, made.groups, made.state = past, side, groups, state
        return made

    def values(self) -> Tensor:
        """What the tensor stands for."""
        x = self.past.read()[self.side]
        if self.state == "indexed":
            return x[:, :, None]
        if self.state == "expanded":
            return x[:, :, None].expand(-1, -1, self.groups, -1, -1)
        return x.repeat_interleave(self.groups, 1) if self.groups > 1 else x

    def _like(self, shape: tuple[int, ...], groups: int, state: str | None) -> LazyPast:
        return LazyPast(self.past, self.side, shape, self, groups, state)

    def _repeated(self, func: Any, args: tuple[Any, ...]) -> LazyPast | None:
        """The next step of ``repeat_kv``, if this is one."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
        every = slice(None)
        if func is Tensor.__getitem__ and self.state is None and self.groups == 1:
            if args == ((every, every, None, every, every),):
                return self._like((*shape[:2], 1, *shape[2:]), 1, "indexed")
        elif func is Tensor.expand and self.state == "indexed" and len(args) == 5:
            if args[:2] == shape[:2] and args[3:] == shape[3:]:
                return self._like(args, args[2], "expanded")
        elif func is Tensor.reshape and self.state == "expanded":
            want = (shape[0], shape[1] * shape[2], *shape[3:])
            if args == want or args == (want,):
                return self._like(want, self.groups, None)
        return None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is _SDPA:
            found = _attention(*args, **kwargs)
            if found is not None:
                return found
        elif args and isinstance(args[0], LazyPast) and not kwargs:
            repeated = args[0]._repeated(func, args[1:])
            if repeated is not None:
                return repeated
        args, kwargs = tree_map_only(LazyPast, LazyPast.values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyPast, LazyPast.values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention on the packed past, or None where the call is another than a model's on it."""
    if not (isinstance(key, LazyPast) and isinstance(value, LazyPast)):
        return None
    if key.past is not value.past or (key.side, value.side) != (0, 1) or query.ndim != 4:
        return None
    if key.state or value.state or key.groups != value.groups or dropout_p:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return key.past.attend(query, scale, attn_mask, is_causal)
