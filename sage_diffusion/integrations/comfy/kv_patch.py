"""Compressed KV caches on ComfyUI's MODEL and CLIP objects; the ones given stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sage_diffusion.integrations.comfy.kv import (
    Memory,
    References,
    Settings,
    text_cache,
    video_caches,
)
from sage_diffusion.integrations.comfy.kv_inside import generators, rope_of, sliding
from sage_diffusion.kv.calibration import fingerprint
from sage_diffusion.kv.method import Rope
from sage_diffusion.kv.methods.calibrated import Calibrated
from sage_diffusion.kv.presets import method as method_of


@dataclass(frozen=True)
class Compressed:
    """A patched copy, and what its caches take.

    Attributes:
        given: the MODEL or CLIP as it was given.
        host: the patched copy.
        kind: ``"video"``, ``"references"`` or ``"text"``.
        settings: that it was made with.
        memory: of its latest run; all zero before the first.
    """

    given: Any
    host: Any
    kind: str
    settings: Settings
    memory: Memory


def compress_model(model: Any, settings: Settings) -> Compressed:
    """A copy of a MODEL whose KV cache is compressed.

    Raises:
        ValueError: it has none: neither is it a causal Wan nor did Flux KV Cache patch it; or the
            preset is for language models.
    """
    if isinstance(method_of(settings.method), Calibrated):
        raise ValueError(
            f"{settings.method} is of a language model's calibration: a model's cache takes a "
            "preset without one, as k4v4"
        )
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
        return Compressed(model, patched, "video", settings, memory)
    for patch in _patches(model, "attn1_patch"):
        if any(kind.__name__ == "KV_Attn_Input" for kind in type(patch).__mro__):
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
        mine.cache.begin()
        counts = inputs["transformer_options"].get("reference_image_num_tokens", [])
        if len(mine.cache) > 0 and sum(counts) > 0:
            inputs["img"] = inputs["img"][:, : -sum(counts)]
        return inputs

    patches = patched.model_options["transformer_options"]["patches"]
    for name, own in (("attn1_patch", mine), ("post_input", without_references)):
        patches[name] = [own if _belongs(other, patch) else other for other in patches[name]]
    return Compressed(model, patched, "references", settings, memory)


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
        ValueError: its text encoder generates no text: there is no cache to compress; or the preset
            needs what there is not: a calibration, the model's RoPE, or queries.
        CalibrationError: the calibration is of another model.
    """
    patched, memory = clip.clone(), Memory()
    for path, module in generators(clip):
        name = f"{path}.init_kv_cache"
        rope = _needed(settings, module)
        # The module's own: while another copy is loaded, its patch stands there.
        found = patched.patcher.get_model_object(name)
        original = getattr(found, "replaced", found)  # one compression takes another's place
        cache = text_cache(original, settings, memory, sliding(module), rope)
        patched.patcher.add_object_patch(name, cache)
    return Compressed(clip, patched, "text", settings, memory)


def _needed(settings: Settings, module: Any) -> Rope | None:
    """Check what a method asks of a language model; its RoPE."""
    method, rope = method_of(settings.method), rope_of(module)
    if isinstance(method, Calibrated) and settings.calibration is None:
        raise ValueError(f"{settings.method} needs a calibration of this language model")
    if method.heavy:
        raise ValueError(
            f"{settings.method} keeps the tokens that queries attend to most, and ComfyUI's cache "
            "sees no queries: take a preset without, as calibrated-2.25"
        )
    if method.pre_rope and rope is None:
        raise ValueError(f"{settings.method} needs the RoPE of {type(module).__name__}, unknown")
    if settings.calibration is not None:
        settings.calibration.check(fingerprint(module))
    return rope
