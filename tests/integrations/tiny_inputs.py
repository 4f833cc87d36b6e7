"""What the tables of tiny diffusers models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def r(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def t(*values: float) -> Tensor:
    """A tensor of these values."""
    return torch.tensor(values)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask that keeps everything."""
    return torch.ones(*shape, dtype=dtype)


def padded(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask whose last two tokens are padding."""
    mask = torch.ones(*shape, dtype=dtype)
    mask[..., -2:] = 0
    return mask


Entry = tuple[dict[str, Any], Callable[[], dict[str, Any]]]

heads = {"num_attention_heads": 2, "attention_head_dim": 8}
image = {"patch_size": 2, "in_channels": 4, "out_channels": 4}
cross = {
    "sample_size": 8,
    "num_layers": 1,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    **heads,
}


def video(channels: int = 4, text: int = 16, **more: Any) -> dict[str, Any]:
    """Inputs of the Wan family: two latent frames."""
    return {
        "hidden_states": r(1, channels, 2, 8, 8),
        "encoder_hidden_states": r(1, 6, text),
        "timestep": t(7),
        **more,
    }


def picture(text: int = 16, **more: Any) -> dict[str, Any]:
    """Inputs of latent-image models."""
    return {
        "hidden_states": r(2, 4, 8, 8),
        "encoder_hidden_states": r(2, 6, text),
        "timestep": t(3, 7),
        **more,
    }


def minimax_h3() -> dict[str, Any]:
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    tags, levels = torch.zeros(18, dtype=torch.long), torch.zeros(18, dtype=torch.long)
    tags[text], tags[audio], levels[audio] = 1, 2, 1
    positions = torch.zeros(18, 3)
    positions[:, 0] = torch.arange(18)
    return {
        "hidden_states": r(1, 8, 16),
        "audio_hidden_states": r(1, 6, 6),
        "encoder_hidden_states": r(1, 4, 8),
        "timestep": t(0.7, 0.3),
        "timestep_indices": levels,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def wan_animate_2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [r(16, 2, 4, 4)],
        "timestep": t(1.0),
        "encoder_hidden_states": [r(8, 32)],
        "condition_latents": [r(20, 2, 4, 4)],
        "encoder_hidden_states_image": r(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }
