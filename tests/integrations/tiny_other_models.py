"""Sound, priors and U-Nets of diffusers: constructor arguments, and functions for inputs."""

from __future__ import annotations

import torch
from integrations.tiny_inputs import Entry, heads, ones, padded, r, t

_unet = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1}

OTHER: dict[str, Entry] = {
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "sliding_window": 16,
        },
        lambda: {
            "hidden_states": r(2, 8, 8),
            "timestep": t(0.5, 0.5),
            "timestep_r": t(0.5, 0.5),
            "encoder_hidden_states": r(2, 10, 32),
            "context_latents": r(2, 8, 16),
        },
    ),
    "LongCatAudioDiTTransformer": (
        {
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 2,
            "dit_text_dim": 16,
            "latent_dim": 8,
            "text_conv": False,
        },
        lambda: {
            "hidden_states": r(1, 12, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "encoder_attention_mask": padded(1, 6),
            "attention_mask": ones(1, 12, dtype=torch.bool),
            "timestep": t(0.5),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            **heads,
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda: {
            "hidden_states": r(1, 8, 12),
            "encoder_hidden_states": r(1, 12, 16),
            "timestep": t(0.5),
        },
    ),
    "PriorTransformer": (
        {
            **heads,
            "num_layers": 2,
            "embedding_dim": 16,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        lambda: {
            "hidden_states": r(2, 16),
            "timestep": t(2, 2),
            "proj_embedding": r(2, 16),
            "encoder_hidden_states": r(2, 5, 16),
        },
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 8,
            "patch_size": 1,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "cond_token_dim": 16,
            "global_cond_dim": 12,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
            "use_differential_attention": False,
        },
        lambda: {
            "hidden_states": r(2, 8, 16),
            "timestep": t(0.2, 0.5),
            "encoder_hidden_states": r(2, 4, 16),
            "global_hidden_states": r(2, 12),
        },
    ),
    "TransformerTemporalModel": (
        {**heads, "in_channels": 4, "num_layers": 1, "norm_num_groups": 1},
        lambda: {"hidden_states": r(4, 4, 4, 4), "timestep": t(3), "num_frames": 4},
    ),
    "UNet2DModel": (
        {
            **_unet,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        lambda: {"sample": r(2, 4, 8, 8), "timestep": t(3)},
    ),
    "UNet2DConditionModel": (
        {
            **_unet,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        },
        lambda: {
            "sample": r(2, 4, 8, 8),
            "timestep": t(3),
            "encoder_hidden_states": r(2, 6, 16),
            "encoder_attention_mask": padded(2, 6),
        },
    ),
    "UNet3DConditionModel": (
        {
            **_unet,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        },
        lambda: {
            "sample": r(1, 4, 2, 8, 8),
            "timestep": t(3),
            "encoder_hidden_states": r(1, 6, 16),
        },
    ),
    "UNetControlNetXSModel": (
        {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (4, 8),
            "cross_attention_dim": 16,
            "transformer_layers_per_block": 1,
            "num_attention_heads": 2,
            "norm_num_groups": 4,
            "ctrl_block_out_channels": (2, 4),
            "ctrl_num_attention_heads": 4,
            "ctrl_max_norm_num_groups": 2,
            "ctrl_conditioning_embedding_out_channels": (2, 2),
        },
        lambda: {
            "sample": r(1, 4, 8, 8),
            "timestep": t(3),
            "encoder_hidden_states": r(1, 6, 16),
            "controlnet_cond": r(1, 3, 16, 16),
            "conditioning_scale": 1,
        },
    ),
    "UNetMotionModel": (
        {
            **_unet,
            "block_out_channels": (8, 16),
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
        },
        lambda: {
            "sample": r(1, 4, 2, 8, 8),
            "timestep": t(3),
            "encoder_hidden_states": r(2, 6, 16),
        },
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            **_unet,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 16,
            "num_attention_heads": 4,
            "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
        },
        lambda: {
            "sample": r(1, 2, 4, 8, 8),
            "timestep": t(3),
            "encoder_hidden_states": r(1, 1, 16),
            "added_time_ids": ones(1, 3),
        },
    ),
}
