"""What the workflows of :mod:`templates` share: files, gains, loaders, results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from template_graph import Node, Template

from sage_diffusion.adapt.costs import MEASURED, Costs, call_milliseconds, card_costs
from sage_diffusion.adapt.presets import card_preset, cheapest_first, worthwhile
from sage_diffusion.integrations.comfy.families import BODY, CAREFUL
from sage_diffusion.kernels.spec import LADDER

_SPLIT = "split_files/"

#: File -> folder of models, repository, what stands before that folder's name in it; empty where
#: the file lies at its top.
FILES = {
    "flux1-dev.safetensors": ("diffusion_models", "Comfy-Org/flux1-dev", ""),
    "clip_l.safetensors": ("text_encoders", "comfyanonymous/flux_text_encoders", ""),
    "t5xxl_fp16.safetensors": ("text_encoders", "comfyanonymous/flux_text_encoders", ""),
    "ae.safetensors": ("vae", "Comfy-Org/z_image_turbo", _SPLIT),
    "z_image_turbo_bf16.safetensors": ("diffusion_models", "Comfy-Org/z_image_turbo", _SPLIT),
    "qwen_3_4b.safetensors": ("text_encoders", "Comfy-Org/z_image_turbo", _SPLIT),
    "flux2_dev_fp8mixed.safetensors": ("diffusion_models", "Comfy-Org/flux2-dev", _SPLIT),
    "mistral_3_small_flux2_fp8.safetensors": ("text_encoders", "Comfy-Org/flux2-dev", _SPLIT),
    "flux2-vae.safetensors": ("vae", "Comfy-Org/flux2-dev", _SPLIT),
    "qwen_image_2512_fp8_e4m3fn.safetensors": (
        "diffusion_models",
        "Comfy-Org/Qwen-Image_ComfyUI",
        _SPLIT,
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders",
        "Comfy-Org/Qwen-Image_ComfyUI",
        _SPLIT,
    ),
    "qwen_image_vae.safetensors": ("vae", "Comfy-Org/Qwen-Image_ComfyUI", _SPLIT),
    "v1-5-pruned-emaonly-fp16.safetensors": (
        "checkpoints",
        "Comfy-Org/stable-diffusion-v1-5-archive",
        "",
    ),
    "sd3.5_large_fp8_scaled.safetensors": (
        "checkpoints",
        "Comfy-Org/stable-diffusion-3.5-fp8",
        "",
    ),
    "sd_xl_base_1.0.safetensors": (
        "checkpoints",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "",
    ),
    "wan2.1_t2v_1.3B_fp16.safetensors": (
        "diffusion_models",
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged",
        _SPLIT,
    ),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
        "text_encoders",
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged",
        _SPLIT,
    ),
    "wan_2.1_vae.safetensors": ("vae", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged", _SPLIT),
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": (
        "diffusion_models",
        "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        _SPLIT,
    ),
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": (
        "diffusion_models",
        "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        _SPLIT,
    ),
    "minimax_h3_fl2va_pruned_int8_convrot.safetensors": (
        "diffusion_models",
        "Comfy-Org/MiniMax-H3",
        "./",
    ),
    "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors": (
        "text_encoders",
        "Comfy-Org/MiniMax-H3",
        "./",
    ),
    "minimax_h3_video_vae_fp16.safetensors": ("vae", "Comfy-Org/MiniMax-H3", "./"),
    "minimax_h3_audio_vae_fp32.safetensors": ("vae", "Comfy-Org/MiniMax-H3", "./"),
    "ltx-2-19b-dev-fp8.safetensors": ("checkpoints", "Lightricks/LTX-2", ""),
    "gemma_3_12B_it_fp4_mixed.safetensors": ("text_encoders", "Comfy-Org/ltx-2", _SPLIT),
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors": (
        "diffusion_models",
        "Comfy-Org/HunyuanVideo_1.5_repackaged",
        _SPLIT,
    ),
    "byt5_small_glyphxl_fp16.safetensors": (
        "text_encoders",
        "Comfy-Org/HunyuanVideo_1.5_repackaged",
        _SPLIT,
    ),
    "hunyuanvideo15_vae_fp16.safetensors": (
        "vae",
        "Comfy-Org/HunyuanVideo_1.5_repackaged",
        _SPLIT,
    ),
}

#: Card in the cost table -> its name for people.
CARDS = {
    "rtx3090": "RTX 3090",
    "rtx4090": "RTX 4090",
    "rtx5090": "RTX 5090",
    "h100": "H200",  # the card that the table's figures of Hopper were measured on
}

PROMPT = "a lighthouse on a cliff at dawn, soft light, detailed"
MOVING = "a fox runs through fresh snow, tracking shot"


def addresses() -> dict[str, tuple[str, str]]:
    """File -> folder of models, and where it is to be had."""
    found = {}
    for name, (folder, repository, inside) in FILES.items():
        path = f"{inside.removeprefix('./')}{folder}/{name}" if inside else name
        found[name] = (folder, f"https://huggingface.co/{repository}/resolve/main/{path}")
    return found


@dataclass(frozen=True)
class Calls:
    """A model's longest calls, in the size that its workflow samples.

    Attributes:
        tokens: of picture or video, and prompt.
        heads: of both halves of guidance together.
        head_dim: of the model.
    """

    tokens: int
    heads: int
    head_dim: int = 128


def attention_times(kind: str, calls: Calls) -> dict[str, float]:
    """Card -> predicted time of attention, FP16's being 1.

    Args:
        kind: a preset, ``by model`` for the rules of a family, or a spec that most steps run, the
            first tenth FP16.
        calls: of the model.
    """
    found = {}
    for card in CARDS:
        costs = card_costs(card)
        size = calls.tokens, calls.tokens, calls.head_dim, calls.heads

        def time(spec: Any, costs: Costs = costs, size: Any = size) -> float:
            return call_milliseconds(spec, costs, *size)

        if kind == "by model":
            edges = next(iter(worthwhile(CAREFUL, card)), "fp16")
            body = cheapest_first(BODY, card)[0]
        elif kind in LADDER:
            edges, body = "fp16", kind
        else:
            plan = card_preset(kind, card)
            edges, body = (plan.resolve("", at, tokens=calls.tokens) for at in (0.05, 0.5))
        found[card] = (0.1 * time(edges) + 0.9 * time(body)) / time("fp16")
    return found


def gains(kind: str, calls: Calls) -> str:
    """What to expect on which card, as Markdown."""
    head = f"attention takes, of FP16's time at {calls.tokens:,} tokens"
    lines = [f"| card | {head} | |", "|---|---|---|"]
    for card, time in attention_times(kind, calls).items():
        how = "predicted from a measured main loop" if card in MEASURED else "predicted bound"
        how += ": slower, leave it off" if time > 1.02 else ": no gain" if time > 0.98 else ""
        lines.append(f"| {CARDS[card]} | {time:.2f} | {how} |")
    lines.append("\nHow much of a step that is, the node measures: its second line after a run.")
    return "\n".join(lines)


# ---------------------------------------------------------------------- parts of workflows
def loaded(t: Template, file: str, encoders: dict[str, Any], vae: str) -> tuple[Node, Node, Node]:
    """Loaders of a network, its text encoders and its VAE."""
    t.group("Models")
    model = t.add("UNETLoader", unet_name=file)
    kind = "DualCLIPLoader" if "clip_name1" in encoders else "CLIPLoader"
    return model, t.add(kind, **encoders), t.add("VAELoader", vae_name=vae)


def shown(t: Template, latent: Node, model: Node, vae: Any, name: str) -> None:
    """A sampler's result with Sage Attention's report."""
    t.group("Result")
    report = t.add("SageDiffusionReport", after=latent[0], model=model[0])
    image = t.add("VAEDecode", samples=report[0], vae=vae)
    if "video" in name:
        t.add("SaveAnimatedWEBP", images=image[0], filename_prefix=f"sage/{name}", fps=16.0)
    else:
        t.add("SaveImage", images=image[0], filename_prefix=f"sage/{name}")


def flux(t: Template) -> tuple[Node, Node, dict[str, Any]]:
    """Flux.1's loaders and prompt: model, VAE, inputs of a sampler."""
    model, clip, vae = loaded(
        t,
        "flux1-dev.safetensors",
        {
            "clip_name1": "clip_l.safetensors",
            "clip_name2": "t5xxl_fp16.safetensors",
            "type": "flux",
        },
        "ae.safetensors",
    )
    t.group("Prompt and size")
    text = t.add("CLIPTextEncode", clip=clip[0], text=PROMPT)
    guided = t.add("FluxGuidance", conditioning=text[0], guidance=3.5)
    nothing = t.add("ConditioningZeroOut", conditioning=text[0])
    size = t.add("EmptySD3LatentImage", width=1024, height=1024)
    sampling = {
        "positive": guided[0],
        "negative": nothing[0],
        "latent_image": size[0],
        "seed": 42,
        "cfg": 1.0,
    }
    return model, vae, sampling


def checkpoint(
    t: Template, file: str, latent: str, side: int, sage: dict[str, Any], **sampling: Any
) -> None:
    """A checkpoint, a positive and a negative prompt, Sage Attention, KSampler."""
    t.group("Models")
    whole = t.add("CheckpointLoaderSimple", ckpt_name=file)
    t.group("Prompt and size")
    positive = t.add("CLIPTextEncode", clip=whole[1], text=PROMPT)
    negative = t.add("CLIPTextEncode", clip=whole[1], text="blurry, low quality")
    size = t.add(latent, width=side, height=side)
    t.group("Sampling")
    model = t.add("SageDiffusionAttention", model=whole[0], **sage)
    drawn = t.add(
        "KSampler",
        model=model[0],
        positive=positive[0],
        negative=negative[0],
        latent_image=size[0],
        seed=42,
        **sampling,
    )
    shown(t, drawn, model, whole[2], t.name.split(" -")[0])


def wan_text(t: Template, clip: Node, length: int) -> dict[str, Any]:
    """Prompts and size of a video: inputs of a sampler."""
    t.group("Prompt and size")
    positive = t.add("CLIPTextEncode", clip=clip[0], text=MOVING)
    negative = t.add("CLIPTextEncode", clip=clip[0], text="static, blurry, subtitles")
    size = t.add("EmptyHunyuanLatentVideo", width=832, height=480, length=length)
    return {"positive": positive[0], "negative": negative[0], "latent_image": size[0]}
