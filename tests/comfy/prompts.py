"""API prompts of tiny models for the server tests."""

from __future__ import annotations

from typing import Any

#: family -> (width, tokens, pooled, VAE, node of the empty latent)
PARTS = {
    "sd3": (4096, 154, 2048, "taesd3", "EmptySD3LatentImage"),
    "flux": (4096, 64, 768, "taef1", "EmptySD3LatentImage"),
    "sd15": (768, 77, 0, "taesd", "EmptyLatentImage"),
    "wan": (4096, 64, 0, None, "EmptyHunyuanLatentVideo"),
}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API prompt."""
    return {"class_type": kind, "inputs": inputs}


def sampling(family: str, *, steps: int = 3, side: int = 64, **preset: Any) -> dict[str, Any]:
    """Load, patch, sample, decode, save, report.  ``preset`` are Sage Attention's inputs."""
    width, tokens, pooled, vae, latent = PARTS[family]
    size: dict[str, Any] = {"width": side, "height": side, "batch_size": 1}
    if latent == "EmptyHunyuanLatentVideo":
        size["length"] = 5
    prompt = {
        "1": node("UNETLoader", unet_name=f"tiny_{family}.safetensors", weight_dtype="default"),
        "2": node(
            "SageDiffusionAttention",
            model=["1", 0],
            enabled=True,
            backend="auto",
            strict=False,
            **(preset or {"preset": "quality"}),
        ),
        "3": node("TinyConditioning", width=width, tokens=tokens, pooled=pooled, seed=1),
        "4": node("TinyConditioning", width=width, tokens=tokens, pooled=pooled, seed=2),
        "5": node(latent, **size),
        "6": node(
            "KSampler",
            model=["2", 0],
            positive=["3", 0],
            negative=["4", 0],
            latent_image=["5", 0],
            seed=42,
            steps=steps,
            cfg=1.0 if family == "flux" else 4.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "7": node("SageDiffusionReport", after=["6", 0], model=["2", 0], details=True),
    }
    if vae is None:
        prompt["9"] = node("SaveLatent", samples=["7", 0], filename_prefix=family)
    else:
        prompt["8"] = node("VAELoader", vae_name=vae)
        prompt["9"] = node("VAEDecode", samples=["7", 0], vae=["8", 0])
        prompt["10"] = node("SaveImage", images=["9", 0], filename_prefix=family)
    return prompt


def check(family: str, **preset: Any) -> dict[str, Any]:
    """The same with Attention Accuracy Check in the sampler's place, and its outputs shown."""
    prompt = sampling(family, **preset)
    prompt["6"]["class_type"] = "SageDiffusionAccuracyCheck"
    prompt["6"]["inputs"] |= {
        "mode": "with and without the plan",
        "rate": 1.0,
        "metric": "cosine",
        "limit": 0.9,
        "filename_prefix": f"checks/{family}",
        "rows": 16,
        "vae": ["8", 0],
    }
    prompt["11"] = node("PreviewAny", source=["6", 3])
    prompt["12"] = node("PreviewAny", source=["6", 5])
    prompt["13"] = node("PreviewImage", images=["6", 2])
    return prompt


def autotune(family: str) -> dict[str, Any]:
    """Auto-tune Attention in Sage Attention's place."""
    prompt = sampling(family)
    sampler = prompt["6"]["inputs"]
    prompt["2"] = node(
        "SageDiffusionAutoTune",
        model=["1", 0],
        **{k: sampler[k] for k in ("positive", "negative", "latent_image", "seed", "steps")},
        **{k: sampler[k] for k in ("cfg", "sampler_name", "scheduler", "denoise")},
        goal="as fast as fast, better",
        card="this card",
        measure_anew=False,
    )
    return prompt


def calibrated(family: str, **more: Any) -> dict[str, Any]:
    """Sage Attention with a plan that is made first, end-to-end stage included, and previewed."""
    prompt = sampling(family, **{"preset": "plan input", "preset.plan": ["20", 0]})
    common = {k: v for k, v in prompt["6"]["inputs"].items() if k != "model"}
    given = {
        "positive_2": ["4", 0],
        "negative": ["21", 0],
        "runs": 1,
        "share": 0.5,
        "goal": "most time",
        "goal.time": 0.6,
        "card": "rtx4090",
        "name": "tiny",
        "end_to_end": 1,
        "method": "gradients",
    }
    width, tokens, pooled, _, _ = PARTS[family]
    prompt["20"] = node("SageDiffusionCalibrate", model=["1", 0], **(common | given | more))
    prompt["21"] = node("TinyConditioning", width=width, tokens=tokens, pooled=pooled, seed=3)
    prompt["22"] = node(
        "SageDiffusionPlanPreview", plan=["20", 0], steps=3, branch="cond", tokens=64, layers="*"
    )
    return prompt


def custom(spec: str, **more: Any) -> dict[str, Any]:
    """Sage Attention's inputs for the preset "custom"."""
    inputs = {
        "spec": spec,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "layers": "*",
        "keep_cross_attention": False,
        "min_tokens": 0,
    } | more
    return {"preset": "custom", **{f"preset.{name}": value for name, value in inputs.items()}}


def tokens(change: dict[str, Any]) -> dict[str, Any]:
    """A picture to tokens, one change, and back; inspected and kept."""
    tokenizer = ["1", 0]
    return {
        "1": node("SageDiffusionLoadVQTokenizer", tokenizer="tiny.safetensors"),
        "2": node("EmptyImage", width=100, height=70, batch_size=1, color=0x4080C0),
        "3": node("SageDiffusionVQEncode", tokenizer=tokenizer, image=["2", 0]),
        "4": node("SageDiffusionVQTokenEdit", tokenizer=tokenizer, tokens=["3", 0], **change),
        "5": node("SageDiffusionVQDecode", tokenizer=tokenizer, tokens=["4", 0]),
        "6": node("SageDiffusionCodebookInspector", tokenizer=tokenizer, tokens=["4", 0], shown=8),
        "7": node("SageDiffusionSaveVQTokens", tokens=["4", 0], filename_prefix="tiny"),
        "8": node("SaveImage", images=["5", 0], filename_prefix="tokens"),
        "10": node("PreviewImage", images=["6", 2]),
    }
