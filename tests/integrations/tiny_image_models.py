"""Image transformers of diffusers: constructor arguments, and a function that makes inputs."""

from __future__ import annotations

from typing import Any

import torch
from integrations.tiny_inputs import Entry, cross, heads, image, ones, padded, picture, r, t, video
from torch import Tensor

_joint = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}


def _packed(**more: Any) -> dict[str, Any]:
    """Inputs of the Flux family: sixteen image tokens, seven of text."""
    return {
        "hidden_states": r(1, 16, 4),
        "encoder_hidden_states": r(1, 7, 24),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
        "timestep": t(0.5),
        **more,
    }


def _sizes(dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    size = torch.full((2, 2), 16, dtype=dtype)
    return {"original_size": size, "target_size": size, "crop_coords": size * 0}


def _omnigen() -> dict[str, Any]:
    length = 12 + 1 + 16  # text and the picture it contains, the timestep, the picture
    return {
        "hidden_states": r(2, 4, 8, 8),
        "timestep": t(0.2, 0.5),
        "input_ids": torch.arange(24).reshape(2, 12) % 9,
        "input_img_latents": [r(1, 4, 4, 4)],
        "input_image_sizes": {0: [[0, 4]]},
        "attention_mask": torch.ones(2, length, length),
        "position_ids": torch.arange(length).expand(2, -1),
    }


def _ideogram() -> dict[str, Any]:
    text, picture = 2, 3  # the model's own numbers for the two kinds of token
    return {
        "hidden_states": r(1, 8, 16),
        "encoder_hidden_states": r(1, 8, 24),
        "timestep": t(0.5),
        "position_ids": torch.arange(8)[None, :, None].expand(1, 8, 3),
        "segment_ids": torch.ones(1, 8, dtype=torch.long),
        "indicator": torch.tensor([[picture] * 4 + [text] * 4]),
    }


IMAGE: dict[str, Entry] = {
    "AuraFlowTransformer2DModel": (
        {
            **image,
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pos_embed_max_size": 64,
        },
        picture,
    ),
    "BriaTransformer2DModel": (
        {
            **_joint,
            "attention_head_dim": 8,
            "axes_dims_rope": (0, 4, 4),
            "pooled_projection_dim": None,
        },
        _packed,
    ),
    "BriaFiboTransformer2DModel": (
        {
            **_joint,
            "attention_head_dim": 8,
            "axes_dims_rope": (0, 4, 4),
            "pooled_projection_dim": None,
            "text_encoder_dim": 12,
        },
        lambda: _packed(text_encoder_layers=[r(1, 7, 12)] * 2),
    ),
    "ChromaTransformer2DModel": (
        {
            **_joint,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _packed,
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **image,
            **heads,
            "num_layers": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda: picture(**_sizes()),
    ),
    "CogView4Transformer2DModel": (
        {
            **image,
            **heads,
            "num_layers": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        lambda: picture(**_sizes()),
    ),
    "DiTTransformer2DModel": (
        {**cross, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 8},
        lambda: {"hidden_states": r(2, 4, 8, 8), "timestep": t(3, 7), "class_labels": t(1, 2)},
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda: {
            "hidden_states": r(1, 8, 4, 4),
            "timestep": t(0.5),
            "text_bth": r(1, 6, 16),
            "text_lens": t(4),
        },
    ),
    "FluxTransformer2DModel": (
        {**_joint, "pooled_projection_dim": 12},
        lambda: _packed(pooled_projections=r(1, 12)),
    ),
    "Flux2Transformer2DModel": (
        {**_joint, "axes_dims_rope": (4, 4, 4, 4)},
        lambda: _packed(
            img_ids=torch.zeros(1, 16, 4), txt_ids=torch.zeros(1, 7, 4), guidance=t(1.0)
        ),
    ),
    "GlmImageTransformer2DModel": (
        {
            **image,
            **heads,
            "num_layers": 1,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        lambda: {
            "hidden_states": r(1, 4, 8, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "prior_token_id": t(5),
            "prior_token_drop": t(False),
            "timestep": t(3),
            "target_size": t(16.0, 16.0)[None],
            "crop_coords": t(0.0, 0.0)[None],
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            **image,
            **heads,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": r(2, 4, 8, 8),
            "encoder_hidden_states_t5": r(2, 6, 8),
            "encoder_hidden_states_llama3": r(2, 2, 6, 4),
            "pooled_embeds": r(2, 8),
            "timesteps": t(3, 7),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            **heads,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        lambda: {
            "hidden_states": r(2, 4, 8, 8),
            "encoder_hidden_states": r(2, 4, 8),
            "text_embedding_mask": ones(2, 4),
            "encoder_hidden_states_t5": r(2, 4, 8),
            "text_embedding_mask_t5": ones(2, 4),
            "timestep": t(3.0, 7.0),
            "image_meta_size": ones(2, 6) * 16,
            "style": t(0, 0),
            "image_rotary_emb": [ones(1, 8), torch.zeros(1, 8)],
        },
    ),
    "Ideogram4Transformer2DModel": (
        {
            "in_channels": 16,
            "num_layers": 2,
            **heads,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (2, 1, 1),
        },
        _ideogram,
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "patch_size": (1, 2, 2),
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": (4, 6, 6),
        },
        lambda: video(timestep=t(1.0)),
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {
            "patch_size": (1, 2, 2),
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": (4, 6, 6),
        },
        lambda: {
            "hidden_states": r(1, 2, 4, 1, 2, 2),
            "encoder_hidden_states": r(1, 6, 16),
            "timestep": t(1.0),
            "shape_list": [[(1, 1, 1), (1, 1, 1)]],
        },
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            "hidden_states": r(1, 4, 16),
            "encoder_hidden_states": r(1, 4, 3, 16),
            "timestep": t(0.5),
            "position_ids": torch.zeros(8, 3),
            "encoder_attention_mask": padded(1, 4),
        },
    ),
    "LongCatImageTransformer2DModel": (
        {**_joint, "pooled_projection_dim": 12},
        lambda: _packed(guidance=t(1.0)),
    ),
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "cross_attention_dim": 16,
        },
        lambda: {
            "hidden_states": r(2, 4, 8, 8),
            "encoder_hidden_states": r(2, 6, 16),
            "timestep": t(0.2, 0.5),
            "encoder_mask": padded(2, 6, dtype=torch.float32),
            "image_rotary_emb": r(64, 64, 4),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 16,
        },
        lambda: picture(timestep=t(0.2, 0.5), encoder_attention_mask=padded(2, 6)),
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            "moe_enabled": False,
            "capacity_factors": [8.0, 8.0],
        },
        lambda: {
            "hidden_states": r(1, 16, 16),
            "encoder_hidden_states": r(1, 8, 16),
            "encoder_hidden_states_mask": padded(1, 8, dtype=torch.long),
            "timestep": t(0.5),
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 10,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        _omnigen,
    ),
    "OvisImageTransformer2DModel": ({**_joint, "out_channels": 4}, _packed),
    "PixArtTransformer2DModel": (
        {
            **cross,
            "cross_attention_dim": 16,
            "num_embeds_ada_norm": 8,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        lambda: picture(
            encoder_attention_mask=padded(2, 6, dtype=torch.float32),
            added_cond_kwargs={"aspect_ratio": None, "resolution": None},
        ),
    ),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": (8, 8),
        },
        lambda: {
            "hidden_states": r(1, 4, 8, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "timestep": t(0.5),
        },
    ),
    "QwenImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": r(1, 16, 16),
            "encoder_hidden_states": r(1, 8, 16),
            "encoder_hidden_states_mask": padded(1, 8, dtype=torch.long),
            "timestep": t(0.5),
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "SanaTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            **heads,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        picture,
    ),
    "SD3Transformer2DModel": (
        {
            **image,
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),  # as in SD 3.5 medium
            "qk_norm": "rms_norm",
        },
        lambda: picture(pooled_projections=r(2, 12)),
    ),
    "ZImageTransformer2DModel": (
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [64, 32, 32],
        },
        lambda: {"x": [r(4, 1, 8, 8)], "cap_feats": [r(6, 16)], "t": t(0.5)},
    ),
}
