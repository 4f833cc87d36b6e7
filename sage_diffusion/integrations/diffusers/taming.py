"""Weights of VQGANs under taming-transformers' names, which many projects kept, for diffusers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.vq.families.base import numbers

#: Keys that all of these networks have, and no other that is known: Open-MAGVIT2's blocks have no
#: such biases, LlamaGen's other names, and transformers' encoders no decoder.
KEYS = (
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.conv1.bias",
    "encoder.mid.block_1.conv1.bias",
    "decoder.conv_out.weight",
)

#: Names of taming-transformers to those of diffusers, in the order in which they are replaced.
_RENAMES = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def config_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """What a ``VQModel`` of these weights is made with, besides its codebook."""
    levels = numbers(state, r"encoder\.down\.(\d+)\.")
    blocks = numbers(state, r"encoder\.down\.0\.block\.(\d+)\.")
    attentive = numbers(state, r"encoder\.down\.(\d+)\.attn\.")
    latent = state["encoder.conv_out.weight"].shape[0]
    quant_conv = state.get("quant_conv.weight")
    return {
        "block_out_channels": [
            state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels
        ],
        "down_block_types": [
            "AttnDownEncoderBlock2D" if i in attentive else "DownEncoderBlock2D" for i in levels
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if i in attentive else "UpDecoderBlock2D"
            for i in reversed(levels)
        ],
        "layers_per_block": len(blocks),
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": latent,
        "vq_embed_dim": latent if quant_conv is None else quant_conv.shape[0],
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in state,
    }


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under diffusers' names: its decoder counts levels from the coarsest."""
    levels = len(numbers(state, r"encoder\.down\.(\d+)\."))
    found = {}
    for name, tensor in _split(state).items():
        new = re.sub(
            r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name
        )
        for pattern, replacement in _RENAMES:
            new = re.sub(pattern, replacement, new)
        linear = re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", new)
        found[new] = tensor[:, :, 0, 0] if linear and tensor.ndim == 4 else tensor
    if "quant_conv.weight" not in found:  # SimVQ's latents are the codes' own
        width = found["encoder.conv_out.weight"].shape[0]
        for part in ("quant_conv", "post_quant_conv"):
            found[f"{part}.weight"] = torch.eye(width)[:, :, None, None]
            found[f"{part}.bias"] = torch.zeros(width)
    return found


def _split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values one by one, where a project has them in one layer (VAR)."""
    found = {}
    for name, tensor in state.items():
        if ".qkv." in name:
            for part, own in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = own
        else:
            found[name] = tensor
    return found
