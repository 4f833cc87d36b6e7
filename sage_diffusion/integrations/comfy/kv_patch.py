"""Compressed KV caches on ComfyUI's MODEL and CLIP objects; the ones given stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sage_diffusion.integrations.comfy.kv import (
    Memory,
    References,
    Settings,
    text_cache,
    video_caches,
)


@dataclass(frozen=True)
class Compressed:
    """A patched copy, and what its caches take.

    Attributes:
        host: the MODEL or CLIP.
        kind: ``"video"``, ``"references"`` or ``"text"``.
        settings: that it was made with.
        memory: of its latest run; all zero before the first.
    """

    host: Any
    kind: str
    settings: Settings
    memory: Memory


def compress_model(model: Any, settings: Settings) -> Compressed:
    """A copy of a MODEL whose KV cache is compressed.

    Raises:
        ValueError: it has none: neither is it a causal Wan nor did Flux KV Cache patch it.
    """
    network = model.get_model_object("diffusion_model")
    memory = Memory()
    if hasattr(network, "init_kv_caches"):
        patched = model.clone()
        caches = video_caches(
            settings,
            memory,
            layers=network.num_layers,
            heads=network.num_heads,
            head_dim=network.head_dim,
        )
        patched.add_object_patch("diffusion_model.init_kv_caches", caches)
        return Compressed(patched, "video", settings, memory)
    for patch in _patches(model, "attn1_patch"):
        if type(patch).__name__ == "KV_Attn_Input":
            return _with_references(model, patch, settings, memory)
    raise ValueError(
        f"{type(model.model).__name__} keeps no KV cache: it must be an autoregressive video model "
        "(causal Wan), or have passed Flux KV Cache before"
    )


def _patches(model: Any, name: str) -> list[Any]:
    options = model.model_options.get("transformer_options", {})
    return options.get("patches", {}).get(name, [])


def _with_references(model: Any, patch: Any, settings: Settings, memory: Memory) -> Compressed:
    """ComfyUI's two patches of Flux KV Cache once more, around a cache of ours."""
    patched = model.clone()
    mine = _reference_patch(type(patch), settings, memory)

    def without_references(inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave the reference tokens out of the picture once their K and V are there."""
        counts = inputs["transformer_options"].get("reference_image_num_tokens", [])
        if len(mine.cache) > 0 and sum(counts) > 0:
            inputs["img"] = inputs["img"][:, : -sum(counts)]
        return inputs

    patches = patched.model_options["transformer_options"]["patches"]
    for name, own in (("attn1_patch", mine), ("post_input", without_references)):
        patches[name] = [own if _belongs(other, patch) else other for other in patches[name]]
    return Compressed(patched, "references", settings, memory)


def _reference_patch(base: type, settings: Settings, memory: Memory) -> Any:
    class CompressedReferences(base):  # type: ignore[misc]
        """ComfyUI's patch of attention inputs, with another dict."""

        def __init__(self) -> None:
            super().__init__()
            self.cleanup()

        def cleanup(self) -> None:
            self.cache = References(settings, memory)

    return CompressedReferences()


def _belongs(other: Any, patch: Any) -> bool:
    """Whether a patch is this one, or a closure over it."""
    cells = getattr(other, "__closure__", None) or ()
    return other is patch or any(cell.cell_contents is patch for cell in cells)


def compress_clip(clip: Any, settings: Settings) -> Compressed:
    """A copy of a CLIP whose text generation uses a compressed cache.

    Raises:
        ValueError: its text encoder generates no text: there is no cache to compress.
    """
    patched, memory = clip.clone(), Memory()
    found = list(_generators(clip.cond_stage_model))
    if not found:
        raise ValueError(
            f"{type(clip.cond_stage_model).__name__} generates no text: an encoder reads its "
            "prompt in one pass and keeps no KV cache"
        )
    for path, module in found:
        cache = text_cache(module.init_kv_cache, settings, memory, _sliding(module))
        patched.patcher.add_object_patch(f"{path}.init_kv_cache", cache)
    return Compressed(patched, "text", settings, memory)


def _generators(model: Any) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if hasattr(module, "init_kv_cache") and hasattr(module, "generate"):
            yield path, module


def _sliding(module: Any) -> list[int]:
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
