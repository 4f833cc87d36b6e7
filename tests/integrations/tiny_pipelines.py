"""Twelve diffusers pipelines of few weights, from configs alone: no hub, no tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

diffusers.logging.set_verbosity_error()
# On tensors this small, threads only wait for each other: ten times slower on a busy machine.
torch.set_num_threads(1)


@dataclass
class Tiny:
    """A pipeline, what to call it with, and its denoiser."""

    pipe: Any
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> nn.Module:
        """The transformer or U-Net."""
        return getattr(self.pipe, "transformer", None) or self.pipe.unet

    def __call__(self, steps: int = 2, **more: Any) -> Tensor:
        """Pictures or frames of one seed, always the same."""
        kwargs = {**self.kwargs, "generator": torch.Generator().manual_seed(0), **more}
        out = self.pipe(num_inference_steps=steps, output_type="pt", return_dict=False, **kwargs)
        return torch.as_tensor(out[0])


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _embeds(*shape: int) -> dict[str, Tensor]:
    return {"prompt_embeds": _randn(*shape), "negative_prompt_embeds": -_randn(*shape)}


def _masks(mask: Tensor, negative: Tensor | None = None) -> dict[str, Tensor]:
    other = mask if negative is None else negative
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": other}


def _vae(latent_channels: int = 4, **more: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        **more,
    )


def _vae_without_quant_conv(latent_channels: int = 4) -> nn.Module:
    return _vae(
        latent_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def _no_text(*names: str) -> dict[str, None]:
    return dict.fromkeys(names or ("text_encoder", "tokenizer"))


def sd15() -> Tiny:
    """Stable Diffusion 1.5: DDIM, guidance by a batch of two."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=_vae(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_no_text(),
    )
    return Tiny(pipe, {**_embeds(1, 7, 32), "height": 16, "width": 16})


def sdxl() -> Tiny:
    """SDXL: Euler with sigmas, two head dims."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        **_no_text("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    )
    pooled = {
        "pooled_prompt_embeds": _randn(1, 32),
        "negative_pooled_prompt_embeds": -_randn(1, 32),
    }
    return Tiny(pipe, {**_embeds(1, 7, 64), **pooled, "height": 16, "width": 16})


def sd3() -> Tiny:
    """Stable Diffusion 3: joint attention through plain SDPA, head_dim 64."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_projection_dim=128,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    encoders = [f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae_without_quant_conv(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **_no_text(*encoders),
    )
    pooled = {
        "pooled_prompt_embeds": _randn(1, 64),
        "negative_pooled_prompt_embeds": -_randn(1, 64),
    }
    return Tiny(pipe, {**_embeds(1, 7, 32), **pooled, "height": 16, "width": 16})


def flux() -> Tiny:
    """Flux: dispatcher, head_dim 64, double and single blocks, no true guidance."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    )
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        vae=_vae_without_quant_conv(1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **_no_text("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    )
    embeds = {"prompt_embeds": _randn(1, 7, 32), "pooled_prompt_embeds": _randn(1, 32)}
    return Tiny(pipe, {**embeds, "height": 16, "width": 16})


def flux2() -> Tiny:
    """Flux 2: fused projections in the single blocks."""
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = diffusers.Flux2Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **_no_text(),
    )
    kwargs = {"prompt_embeds": _randn(1, 7, 32), "text_encoder_out_layers": (1,)}
    return Tiny(pipe, {**kwargs, "height": 16, "width": 16})


def wan() -> Tiny:
    """Wan: video, self- and cross-attention, two calls per step for guidance, head_dim 64."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    pipe = diffusers.WanPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **_no_text(),
    )
    return Tiny(pipe, {**_embeds(1, 7, 32), "height": 16, "width": 16, "num_frames": 5})


def ltx() -> Tiny:
    """LTX-Video: an additive float32 mask on the text."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )
    pipe = diffusers.LTXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **_no_text(),
    )
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[:, 5:] = False
    kwargs = {**_embeds(1, 7, 32), **_masks(mask)}
    return Tiny(pipe, {**kwargs, "height": 32, "width": 32, "num_frames": 9})


def cogvideox() -> Tiny:
    """CogVideoX: joint attention through plain SDPA."""
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = diffusers.CogVideoXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        **_no_text(),
    )
    return Tiny(pipe, {**_embeds(1, 16, 32), "height": 16, "width": 16, "num_frames": 8})


def qwenimage() -> Tiny:
    """Qwen-Image: key-padding masks, two calls per step for guidance, head_dim 64."""
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **_no_text(),
    )
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[:, 5:] = 0
    kwargs = {
        **_embeds(1, 7, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
        "true_cfg_scale": 2.0,
    }
    return Tiny(pipe, {**kwargs, "height": 32, "width": 32})


def zimage() -> Tiny:
    """Z-Image: a model without a set_attn_processor of its own."""
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # left as torch.empty by the constructor
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    pipe = diffusers.ZImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **_no_text(),
    )
    embeds = {"prompt_embeds": [_randn(7, 16)], "negative_prompt_embeds": [-_randn(7, 16)]}
    return Tiny(pipe, {**embeds, "guidance_scale": 3.0, "height": 32, "width": 32})


def pixart() -> Tiny:
    """PixArt-alpha: cross-attention with a mask."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    pipe = diffusers.PixArtAlphaPipeline(
        transformer=transformer, vae=_vae(), scheduler=diffusers.DDIMScheduler(), **_no_text()
    )
    kwargs = {**_embeds(1, 7, 32), **_masks(torch.ones(1, 7)), "negative_prompt": None}
    return Tiny(pipe, {**kwargs, "use_resolution_binning": False, "height": 16, "width": 16})


def sana() -> Tiny:
    """Sana: linear self-attention, softmax cross-attention."""
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipe = diffusers.SanaPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **_no_text(),
    )
    kwargs = {**_embeds(1, 7, 8), **_masks(torch.ones(1, 7)), "negative_prompt": None}
    return Tiny(pipe, {**kwargs, "use_resolution_binning": False, "height": 32, "width": 32})


PIPELINES: dict[str, Callable[[], Tiny]] = {
    f.__name__: f
    for f in (
        sd15,
        sdxl,
        sd3,
        flux,
        flux2,
        wan,
        ltx,
        cogvideox,
        qwenimage,
        zimage,
        pixart,
        sana,
    )
}


def build(name: str) -> Tiny:
    """One of :data:`PIPELINES`, with the same weights each time."""
    torch.manual_seed(0)
    tiny = PIPELINES[name]()
    tiny.pipe.set_progress_bar_config(disable=True)
    tiny.denoiser.eval()
    tiny.pipe.vae.eval()
    return tiny
