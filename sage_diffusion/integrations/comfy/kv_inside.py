"""ComfyUI's language models seen from inside: their RoPE, their attention, their predictions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Of layer's number, q ``[1, Hq, n, D]``, k and v ``[1, H, n, D]`` after RoPE.
Seen = Callable[[int, Tensor, Tensor, Tensor], None]


def generators(clip: Any) -> list[tuple[str, Any]]:
    """The language models of a CLIP that generate text, by their paths.

    Raises:
        ValueError: there is none.
    """
    found = [
        (path, module)
        for path, module in clip.cond_stage_model.named_modules()
        if hasattr(module, "init_kv_cache") and hasattr(module, "generate")
    ]
    if not found:
        raise ValueError(
            f"{type(clip.cond_stage_model).__name__} generates no text: an encoder reads its "
            "prompt in one pass and keeps no KV cache"
        )
    return found


class ComfyRope:
    """Rotates K as the layers that see everything do, see :class:`sage_diffusion.kv.method.Rope`.

    Args:
        network: gives cosines and two halves of sines of positions, a list of them where layers
            that slide have their own.
        apply: rotates ``(q, k)`` by them.
    """

    def __init__(self, network: Any, apply: Callable[..., Any]):
        self._network, self._apply = network, apply

    def rotate(self, x: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        """``x [B, H, n, D]`` at ``positions [B, n]``, the same for all of B, or back; float32."""
        found = self._network.compute_freqs_cis(positions[:1], x.device)
        cos, *sines = found[0] if isinstance(found, list) else found
        sines = [-sin for sin in sines] if inverse else sines
        x = x.float()
        rotated: Tensor = self._apply(x, x, (cos, *sines))[1]
        return rotated


def rope_of(module: Any) -> ComfyRope | None:
    """How a language model rotates its K, or None where it is done in a way not known here."""
    network: Any = getattr(module, "model", None)
    apply = getattr(sys.modules[type(network).__module__], "apply_rope", None)
    if apply is None or not hasattr(network, "compute_freqs_cis"):
        return None
    rope = ComfyRope(network, apply)
    dim = network.config.head_dim
    probe = torch.linspace(-1, 1, 3 * dim).view(1, 1, 3, dim)
    positions = torch.tensor([[1, 7, 300]])
    try:
        again = rope.rotate(rope.rotate(probe, positions), positions, inverse=True)
    except (TypeError, ValueError, RuntimeError):
        return None
    return rope if torch.allclose(again, probe, atol=1e-4) else None


def sliding(module: Any) -> list[int]:
    """Tokens of each layer's sliding window, 0 where it sees everything.

    ComfyUI slides Gemma 3's layers only; Gemma 2's know their windows and do without.
    """
    layers = getattr(getattr(module, "model", None), "layers", [])
    return [
        int(getattr(layer, "sliding_attention", 0) or 0)
        if getattr(layer, "transformer_type", None) == "gemma3"
        else 0
        for layer in layers
    ]


@contextmanager
def watched(module: Any, seen: Seen) -> Iterator[None]:
    """Show ``seen`` what each layer's attention is given.

    Raises:
        ValueError: its layers are not called as ComfyUI's language models call theirs.
    """

    def hook(number: int) -> Callable[..., Any]:
        def before(attention: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            inner = kwargs.get("optimized_attention")
            if inner is None:
                raise ValueError(f"the attention of {type(module).__name__} can't be watched")

            def shown(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
                seen(number, q, k, v)
                return inner(q, k, v, *rest, **more)

            return args, {**kwargs, "optimized_attention": shown}

        return before

    layers = getattr(module.model, "layers", [])
    if not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(f"the attention of {type(module).__name__} can't be watched")
    handles = [
        layer.self_attn.register_forward_pre_hook(hook(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inside(clip: Any, text: str, run: Callable[[Any, Tensor], T]) -> T:
    """``run(module, embeds [1, n, d])`` in the place of a text's generation, everything loaded.

    The CLIP's patches are in force, those of a compressed cache included.
    """
    path, module = generators(clip)[0]
    # ComfyUI leaves a patch on its module until another copy of the CLIP is loaded: what is in
    # these lists is taken out of them, so that it keeps nothing of the run.
    waiting, found = [(run, module)], []

    def generate(embeds: Tensor, *args: Any, **kwargs: Any) -> list[int]:
        import comfy.model_management as management

        half = management.should_use_bf16(embeds.device)  # as ComfyUI's own generate chooses
        embeds = embeds.to(torch.bfloat16 if half else torch.float32)
        run, module = waiting.pop()
        found.append(run(module, embeds if embeds.ndim == 3 else embeds[None]))
        return []

    patched = clip.clone()
    patched.patcher.add_object_patch(f"{path}.generate", generate)
    patched.generate(patched.tokenize(text), do_sample=False, max_length=1)
    return found.pop()


def states(module: Any, embeds: Tensor, past: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
    """Last hidden states ``[1, n, d]`` after embeddings, and the cache that holds them then."""
    found = module.model.forward(None, embeds=embeds, attention_mask=None, past_key_values=past)
    return found[0], found[2] if len(found) > 2 else []


def logits(module: Any, hidden: Tensor) -> Tensor:
    """``[n, vocabulary]`` of states ``[1, n, d]``."""
    found: Tensor = module.logits(hidden.transpose(0, 1))[:, -1]  # it looks at the last of a row
    return found
