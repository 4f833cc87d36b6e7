"""KV caches: compress those of video and text models, and show what that saved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from sage_diffusion.nodes.host import CATEGORY, show
from sage_diffusion.nodes.kv_calibration import KVCalibration

if TYPE_CHECKING:
    from sage_diffusion.integrations.comfy.kv import Settings
    from sage_diffusion.integrations.comfy.kv_patch import Compressed
    from sage_diffusion.kv.calibration import Calibration
    from sage_diffusion.kv.evaluate import Agreement

KVCache = io.Custom("KV_CACHE")

#: Presets that need nothing but K and V, those that keep most first; then those of a calibration.
PRESETS = ("lossless", "k8v8", "k4v4", "k3v2", "k2v2")
CALIBRATED = ("calibrated-3.9", "calibrated-2.9", "calibrated-2.25")


class KVCacheCompression(io.ComfyNode):
    """A MODEL or CLIP whose KV cache is kept in few bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionKVCache",
            display_name="KV Cache Compression",
            category=CATEGORY,
            description="Keeps the KV cache of an autoregressive video model, of Flux KV Cache's "
            "reference pictures or of text generation in 2 to 8 bits. The beginning and the newest "
            "tokens stay exact.",
            search_aliases=["kv cache", "less memory", "long video", "long prompt", "quantize kv"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, *CALIBRATED],
                    default="k4v4",
                    tooltip="Bits of keys and values. k4v4 is hard to tell from exact, k2v2 is the "
                    "smallest; lossless only spares what ComfyUI allocates in advance. Calibrated "
                    "ones keep more in fewer bits, of a clip with a calibration.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A causal Wan for Sampler AR Video, or a model behind Flux KV Cache.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="A language model for Generate Text."),
                io.Int.Input(
                    "sink",
                    default=-1,
                    min=-1,
                    max=1_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="First tokens that stay exact. -1: a video's first block, 32 of text.",
                ),
                io.Int.Input(
                    "recent",
                    default=-1,
                    min=-1,
                    max=1_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="Newest tokens that stay exact. -1: a video's newest block, 128 of "
                    "text.",
                ),
                io.Int.Input(
                    "window",
                    default=-1,
                    min=-1,
                    max=100_000_000,
                    optional=True,
                    advanced=True,
                    tooltip="Most tokens of a video that are kept: the oldest after the first "
                    "block are forgotten. -1: all.",
                ),
                KVCalibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="Of the clip's language model, for the calibrated presets.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler."),
                io.Clip.Output(display_name="clip", tooltip="For Generate Text."),
                KVCache.Output(display_name="cache", tooltip="For KV Cache Report."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        model: Any = None,
        clip: Any = None,
        sink: int = -1,
        recent: int = -1,
        window: int = -1,
        calibration: Calibration | None = None,
    ) -> io.NodeOutput:
        from sage_diffusion.integrations.comfy.kv import Settings
        from sage_diffusion.integrations.comfy.kv_patch import compress_clip, compress_model

        if model is None and clip is None:
            raise ValueError("KV Cache Compression needs a model or a clip")
        settings = Settings(preset, sink, recent, window, calibration)
        found: dict[str, Compressed] = {}
        if model is not None:
            found["model"] = compress_model(model, settings)
        if clip is not None:
            found["clip"] = compress_clip(clip, settings)
        kinds = [one.kind for one in found.values()]
        text = f"{preset}: {' and '.join(kinds)}"
        if idle := _idle(settings, kinds):
            text += f"\nwithout effect here: {', '.join(idle)}"
        show(cls.hidden.unique_id, text)
        model, clip = (found[name].host if name in found else None for name in ("model", "clip"))
        return io.NodeOutput(model, clip, list(found.values()))


def _idle(settings: Settings, kinds: list[str]) -> list[str]:
    """Names of inputs that were given and that no cache of these kinds looks at."""
    has_effect = {
        "recent": settings.recent < 0 or kinds != ["references"],
        "window": settings.window < 0 or "video" in kinds,
        "calibration": settings.calibration is None or settings.method in CALIBRATED,
    }
    return [name for name, has in has_effect.items() if not has]


class KVCacheReport(io.ComfyNode):
    """What a compressed KV cache took in the run that made what passes through."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionKVCacheReport",
            display_name="KV Cache Report",
            category=CATEGORY,
            description="Shows the memory of a compressed KV cache, measured in the last run, "
            "beside what ComfyUI would have allocated, and how far a text's predictions or a "
            "video move. Put it behind the sampler or Generate Text.",
            search_aliases=["kv cache memory", "cache size", "memory saved"],
            is_output_node=True,
            inputs=[
                io.AnyType.Input(
                    "after",
                    tooltip="The latent or the text: the report is read when it is there. It "
                    "passes through unchanged.",
                ),
                KVCache.Input("cache", tooltip="From KV Cache Compression."),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="A text whose last 64 predictions a compressed clip makes with and "
                    "without compression: their KL. Empty: not measured.",
                ),
                io.AnyType.Input(
                    "exact",
                    optional=True,
                    tooltip="The latent or pictures of the same run without compression: how far "
                    "apart they are, by time, and a picture of it.",
                ),
            ],
            outputs=[
                io.AnyType.Output(display_name="after", tooltip="What came in."),
                io.Image.Output(display_name="bars", tooltip="Bytes as bars, and both runs."),
                io.String.Output(display_name="report", tooltip="The text."),
                io.String.Output(display_name="json", tooltip="The same as JSON, in bytes."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> float:
        return float("nan")  # never cached: it reports on what happened, not on its inputs

    @classmethod
    def execute(
        cls, after: Any, cache: list[Compressed], text: str = "", exact: Any = None
    ) -> io.NodeOutput:
        from sage_diffusion.integrations.comfy.kv_report import bars, difference, text_of

        used = [one for one in cache if one.memory.kept] or cache
        lines = [text_of(one.memory) for one in used]
        data = [{"kind": one.kind, **one.memory.to_dict()} for one in used]
        pictures = [bars(one.memory) for one in used]
        if text.strip():
            found = _predictions(cache, text)
            lines.append(
                f"predictions: KL {found.kl:.5f}, 99th percentile {found.p99:.4f}, "
                f"{found.top1:.0%} the same token"
            )
            data.append({"kind": "predictions", "kl": found.kl, "p99": found.p99})
            data[-1]["top1"] = found.top1
        if exact is not None:
            apart = difference(after, exact)
            lines.append(str(apart))
            data.append(apart.to_dict())
            pictures.append(apart.picture)
        report = "\n".join(lines)
        show(cls.hidden.unique_id, report)
        return io.NodeOutput(
            after, _together(pictures), report, json.dumps(data), ui=ui.PreviewText(report)
        )


def _together(pictures: list[Any]) -> Any:
    """One batch, smaller pictures with white at the right and below."""
    import torch

    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    padded = [
        torch.nn.functional.pad(
            picture, (0, 0, 0, width - picture.shape[2], 0, height - picture.shape[1]), value=1.0
        )
        for picture in pictures
    ]
    return torch.cat(padded)


def _predictions(cache: list[Compressed], text: str) -> Agreement:
    """Of the compressed clip.

    Raises:
        ValueError: no clip is compressed.
    """
    from sage_diffusion.integrations.comfy.kv_calibration import compare_predictions

    clips = [one for one in cache if one.kind == "text"]
    if not clips:
        raise ValueError("predictions are a clip's: connect one, or leave the text empty")
    return compare_predictions(clips[0], text)
