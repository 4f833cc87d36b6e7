"""The search inside ``vector_quantize_pytorch``'s codebooks, which return all distances too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sage_diffusion.vq.codes import nearest_code

#: Options of a call that ask for more than the nearest code.
_SPECIAL = ("topk", "codebook_transform_fn")


class Later(Tensor):
    """A tensor that is computed when an operator is given it."""

    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, compute: Callable[[], Tensor]) -> Later:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.compute = compute
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def computed(x: Any) -> Any:
            return x.compute() if isinstance(x, Later) else x

        return func(*tree_map(computed, args), **tree_map(computed, kwargs or {}))


def searching(codebook: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a codebook: codes, ids, and distances that nobody may want.

    While training, with several codebooks, or where more than the nearest code is asked for, it is
    the library's own: its averages write latents x codes anyway.
    """

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _usual(codebook, x, args, kwargs):
            return original(x, *args, **kwargs)
        latents = x.float()
        embed = codebook.embed if codebook.learnable_codebook else codebook.embed.detach()
        table = embed[0].float()
        metric = "dot" if codebook.use_cosine_sim else "l2"
        ids = nearest_code(latents.reshape(-1, x.shape[-1]), table, metric).view(x.shape[:-1])
        shape = (1, *x.shape[:-1], len(table))
        distances = Later(shape, latents, lambda: original(x, **kwargs)[2])
        return nn.functional.embedding(ids, table), ids, distances

    return forward


def _usual(codebook: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call wants the nearest code of a plain codebook."""
    plain = codebook.num_codebooks == 1 and not codebook.affine_param
    plain = plain and codebook.vq_bridge is None and bool(codebook.initted)
    special = any(kwargs.get(name) is not None for name in _SPECIAL)
    return plain and not (codebook.training or special or args) and x.ndim < 4


def picking(quantizer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """The ``vq`` of Stable Cascade's stage A in ComfyUI: codes and ids of ``[N, D]``."""

    def vq(x: Tensor, codebook: Tensor) -> Any:
        if torch.is_grad_enabled() and x.requires_grad:
            return original(x, codebook)
        ids = nearest_code(x.float(), codebook.float())
        return codebook.index_select(0, ids), ids

    return vq
