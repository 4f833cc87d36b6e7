"""ControlNets and further denoisers of diffusers: constructor arguments, functions for inputs."""

from __future__ import annotations

import torch
from integrations.tiny_inputs import Entry, heads, ones, padded, r, t
from torch import Tensor

_control = {
    "block_out_channels": (16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "conditioning_embedding_out_channels": (16, 16),
}
_flux = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16}


def _slots() -> Tensor:
    """Six tokens of text, then four slots of a picture, each for 2 x 2 latent tokens."""
    return (torch.arange(10) >= 6)[None]


FURTHER: dict[str, Entry] = {
    "ControlNetModel": (
        _control,
        lambda: {
            "sample": r(1, 4, 8, 8),
            "timestep": 7,
            "encoder_hidden_states": r(1, 6, 16),
            "controlnet_cond": r(1, 3, 16, 16),
        },
    ),
    "ControlNetUnionModel": (
        {
            **_control,
            "num_control_type": 2,
            "addition_time_embed_dim": 8,
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_trans_layer": 1,
            "num_proj_channel": 16,
        },
        lambda: {
            "sample": r(1, 4, 8, 8),
            "timestep": 7,
            "encoder_hidden_states": r(1, 6, 16),
            "controlnet_cond": [r(1, 3, 16, 16)],
            "control_type": ones(1, 2),
            "control_type_idx": [0],
        },
    ),
    "FluxControlNetModel": (
        {
            **_flux,
            **heads,
            "in_channels": 8,
            "pooled_projection_dim": 16,
            "axes_dims_rope": [2, 2, 4],
        },
        lambda: {
            "hidden_states": r(1, 16, 8),
            "controlnet_cond": r(1, 16, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "pooled_projections": r(1, 16),
            "timestep": t(0.5),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(6, 3),
        },
    ),
    "SD3ControlNetModel": (
        {
            **heads,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        lambda: {
            "hidden_states": r(1, 4, 8, 8),
            "controlnet_cond": r(1, 4, 8, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "pooled_projections": r(1, 16),
            "timestep": t(7),
        },
    ),
    "SanaControlNetModel": (
        {
            **heads,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": r(1, 4, 8, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "timestep": t(7),
            "controlnet_cond": r(1, 4, 8, 8),
            "encoder_attention_mask": padded(1, 6),
        },
    ),
    "Flux3Transformer2DModel": (
        {
            **_flux,
            **heads,
            "in_channels": 8,
            "cond_in_channels": 8,
            "timestep_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        lambda: {
            "hidden_states": r(1, 16, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "timestep": t(0.5),
            "img_ids": torch.zeros(16, 4),
            "txt_ids": torch.zeros(6, 4),
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **heads,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        lambda: {
            "hidden_states": r(1, 4, 8, 8),
            "timestep": t(7.0),
            "encoder_hidden_states": r(1, 6, 16),
            "encoder_attention_mask": padded(1, 6),
        },
    ),
    "QwenImage21Transformer2DModel": (
        {
            **heads,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": r(1, 16, 8),
            "encoder_hidden_states": r(1, 6, 16),
            "timestep": t(0.5),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": _slots(),
        },
    ),
    "StableAudioDiTModel": (
        {
            **heads,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": 16,
        },
        lambda: {
            "hidden_states": r(1, 4, 8),
            "timestep": t(7),
            "encoder_hidden_states": r(1, 6, 16),
            "global_hidden_states": r(1, 1, 16),
            "rotary_embedding": (ones(9, 4), torch.zeros(9, 4)),
        },
    ),
    "I2VGenXLUNet": (
        {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
        },
        lambda: {
            "sample": r(1, 4, 2, 8, 8),
            "timestep": 7,
            "fps": t(8),
            "image_latents": r(1, 4, 2, 8, 8),
            "image_embeddings": r(1, 16),
            "encoder_hidden_states": r(1, 6, 16),
        },
    ),
    "Kandinsky3UNet": (
        {
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (16, 16, 16, 16),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
        },
        lambda: {
            "sample": r(1, 4, 16, 16),
            "timestep": t(7),
            "encoder_hidden_states": r(1, 6, 16),
            "encoder_attention_mask": ones(1, 6),
        },
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
        },
        lambda: {
            "hidden_states": r(1, 2, 8, 8, 4),
            "encoder_hidden_states": r(1, 6, 16),
            "timestep": t(7),
            "pooled_projections": r(1, 16),
            "visual_rope_pos": tuple(torch.arange(n) for n in (2, 4, 4)),
            "text_rope_pos": torch.arange(6),
        },
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
            "visual_cond": False,
        },
        lambda: {
            "hidden_states": r(1, 2, 8, 8, 4),
            "encoder_hidden_states": r(1, 6, 16),
            "pooled_projections": r(1, 16),
            "timestep": t(7),
        },
    ),
    "StableCascadeUNet": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 16,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": 16,
            "clip_seq": 2,
        },
        lambda: {
            "sample": r(1, 4, 8, 8),
            "timestep_ratio": t(0.5),
            "clip_text_pooled": r(1, 1, 16),
        },
    ),
    "UVit2DModel": (
        {
            "hidden_size": 16,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 16,
            "vocab_size": 32,
            "codebook_size": 16,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 4,
        },
        lambda: {
            "input_ids": torch.arange(16).reshape(1, 4, 4),
            "encoder_hidden_states": r(1, 6, 16),
            "pooled_text_emb": r(1, 16),
            "micro_conds": ones(1, 5),
        },
    ),
    "AnimaTextConditioner": (
        {
            "source_dim": 16,
            "target_dim": 16,
            "model_dim": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "target_vocab_size": 32,
            "min_sequence_length": 8,
        },
        lambda: {"source_hidden_states": r(1, 6, 16), "target_input_ids": torch.arange(5)[None]},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 16, 16),
        },
        lambda: {
            "hidden_states": r(1, 4, 8, 8),
            "timestep": t(0.5),
            "encoder_hidden_states": r(1, 2, 6, 16),
        },
    ),
    "Kandinsky6SRTransformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
        },
        lambda: {"hidden_states": r(1, 1, 16, 16, 9), "timestep": t(7.0)},
    ),
}
