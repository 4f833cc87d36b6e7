"""Weights of adapters for the tiny pipelines."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ip_adapter_state(unet: nn.Module, tokens: int = 4) -> dict[str, dict[str, Tensor]]:
    """Weights of an IP-Adapter for the tiny U-Net."""
    state: dict[str, Tensor] = {}
    number = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("k", "v"):
                key = f"{number}.to_{part}_ip.weight"
                state[key] = torch.randn(module.inner_dim, unet.config.cross_attention_dim)
            number += 2
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(width * tokens, 16),
        "proj.bias": torch.zeros(width * tokens),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": state}
