"""What a model's attention is given: Q, K and V of every layer, as the layers call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SDPA = torch.nn.functional.scaled_dot_product_attention

#: Of layer's number, q ``[B, Hq, n, D]``, k and v ``[B, H, T, D]`` after RoPE -> other k and v.
Seen = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Tap(TorchFunctionMode):
    """Show every ``scaled_dot_product_attention`` inside to a function, which may change K and V.

    Args:
        seen: is given K and V of the KV heads alone.
        kv_heads: of each layer, in the order of the calls.
    """

    def __init__(self, seen: Seen, kv_heads: int):
        super().__init__()
        self._seen, self._heads, self.calls = seen, kv_heads, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        q, k, v = (args[i] if i < len(args) else kwargs.pop(n) for i, n in enumerate(names))
        groups = k.shape[1] // self._heads  # where the model repeats the heads itself
        k, v = self._seen(self.calls, q, k[:, ::groups], v[:, ::groups])
        self.calls += 1
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return func(q, k, v, *args[3:], **kwargs)
