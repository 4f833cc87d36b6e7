"""Tiny random models that ComfyUI's own loaders accept, a few megabytes each.

They are built with ComfyUI's own classes, so that key names are right for the version at hand.
Weights are scaled by their fan-in: outputs stay finite and attention is neither flat nor one-hot.

    python tests/comfy/tiny_models.py --comfy DIR MODELS [family ..]
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("sd3", "flux", "wan", "hyvid", "sd15")


def _known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that this version of a class knows."""
    return {k: v for k, v in options.items() if k in inspect.signature(function).parameters}


def _sd3(build: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    return MMDiT(
        input_size=None,
        patch_size=2,
        in_channels=16,
        depth=2,
        adm_in_channels=2048,
        num_patches=64 * 64,
        pos_embed_max_size=64,
        pos_embed_scaling_factor=None,
        qk_norm="rms",
        context_embedder_config=embedder,
        **build,
    )


def _flux(build: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.flux.model import Flux, FluxParams

    return Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        patch_size=2,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=256,
        mlp_ratio=4.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        **_known(FluxParams, txt_ids_dims=[]),
        **build,
    )


def _wan(build: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v",
        patch_size=(1, 2, 2),
        in_dim=16,
        dim=256,
        ffn_dim=512,
        freq_dim=256,
        text_dim=4096,
        out_dim=16,
        num_heads=2,
        num_layers=2,
        **build,
    )


def _hyvid(build: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    newer = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    return HunyuanVideo(
        image_model="hunyuan_video",
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=256,
        mlp_ratio=4.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16, 56, 56],
        theta=256,
        patch_size=[1, 2, 2],
        qkv_bias=True,
        guidance_embed=True,
        byt5=False,
        meanflow=False,
        **_known(HunyuanVideoParams, **newer),
        **build,
    )


def _sd15(build: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,  # what ComfyUI recognizes SD 1.5 by; everything else is free
        num_res_blocks=[1, 1],
        channel_mult=[1, 1],
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        num_head_channels=-1,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        legacy=False,
        **build,
    )


BUILDERS = {"sd3": _sd3, "flux": _flux, "wan": _wan, "hyvid": _hyvid, "sd15": _sd15}


def scaled(state: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random float16 weights of the same shapes."""
    ones = ("norm.scale", "norm_q.weight", "norm_k.weight", "gamma")
    new = {}
    for key, value in state.items():
        if not value.is_floating_point():
            new[key] = value.clone()
        elif key.endswith(ones) or (value.ndim == 1 and key.endswith("weight")):
            new[key] = torch.ones(value.shape, dtype=torch.float16)
        elif value.ndim <= 1:
            new[key] = torch.zeros(value.shape, dtype=torch.float16)
        else:
            weight = torch.randn(value.shape, generator=generator)
            new[key] = (weight * 0.7 / max(1, value[0].numel()) ** 0.5).half().contiguous()
    return new


def write(folder: Path, family: str) -> Path:
    """One family's model, kept where it already stands; ``taesd`` writes all tiny VAEs.

    Returns:
        Path of the file.
    """
    import comfy.ops
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    if family == "taesd":
        from comfy.taesd.taesd import Decoder, Encoder

        path = folder / "vae_approx" / "taesd_decoder.safetensors"
        for name, channels in (("taesd", 4), ("taesd3", 16), ("taef1", 16)):
            for part, make in (("encoder", Encoder), ("decoder", Decoder)):
                path = folder / "vae_approx" / f"{name}_{part}.safetensors"
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_file(scaled(make(channels).state_dict(), generator), path)
        return path
    path = folder / "diffusion_models" / f"tiny_{family}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        operations = comfy.ops.manual_cast
        build = {"dtype": torch.float32, "device": "cpu", "operations": operations}
        save_file(scaled(BUILDERS[family](build).state_dict(), generator), path)
    return path


def write_checkpoint(folder: Path) -> Path:
    """A whole SD 1.5 checkpoint under the name that the workflows ask for.

    The UNet is tiny, the VAE is TAESD, the text encoder has CLIP-L's size: ComfyUI fixes it.
    """
    import json

    import comfy.clip_model
    import comfy.ops
    from comfy.taesd.taesd import Decoder, Encoder
    from safetensors.torch import save_file

    path = folder / "checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors"
    if path.exists():
        return path
    operations = comfy.ops.manual_cast
    build = {"dtype": torch.float32, "device": "cpu", "operations": operations}
    text = json.loads((Path(comfy.__path__[0]) / "sd1_clip_config.json").read_text())
    parts = {
        "model.diffusion_model.": _sd15(build),
        "cond_stage_model.transformer.": comfy.clip_model.CLIPTextModel(
            text, torch.float32, "cpu", operations
        ),
        "first_stage_model.taesd_encoder.": Encoder(4),
        "first_stage_model.taesd_decoder.": Decoder(4),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {
        prefix + key: value
        for prefix, module in parts.items()
        for key, value in scaled(module.state_dict(), generator).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path


def start_comfy(comfy: Path) -> None:
    """Make ``import comfy`` work in this process, on the CPU."""
    arguments, sys.argv = sys.argv, ["comfyui", "--cpu"]
    sys.path.insert(0, str(comfy))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = arguments


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", default=[*FAMILIES, "taesd"])
    given = parser.parse_args()
    start_comfy(given.comfy)
    for name in given.families:
        print(write(given.folder, name))


def write_tokenizer(folder: Path) -> Path:
    """A tiny VQ tokenizer, where a server looks for it."""
    from sage_diffusion.vq import SimVQ
    from sage_diffusion.vq.checkpoints import save_tokenizer
    from sage_diffusion.vq.families import compact

    torch.manual_seed(0)
    path = folder / "vq_tokenizers" / "tiny.safetensors"
    settings = {"widths": [8, 12], "depths": [1, 1]}
    save_tokenizer(path, compact.make(SimVQ(6, 50), settings).eval())
    return path
