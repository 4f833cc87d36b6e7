"""Emu3's tokenizer under its authors' names, through transformers' ``Emu3VQVAE``."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from sage_diffusion.integrations.transformers.vq import VideoDecoder, VideoEncoder
from sage_diffusion.vq.families.base import Checkpoint, Family, codes, fill, lacking, numbers
from sage_diffusion.vq.tokenizer import Tokenizer, Traits

_CODES = "quantize.embedding.weight"

#: The authors' names to those of transformers, in the order in which they are replaced.
_RENAMES = (
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.mid\.attn_1\.norm\.", ".mid.attn_norm."),
    (r"\.(attn\.\d+|attn_1)\.([qkv])\.", r".\1.\2_proj."),
    (r"\.(attn\.\d+|attn_1)\.proj_out\.", r".\1.out_proj."),
    (r"\.mid\.", ".middle_block."),
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
)


def _refuse(checkpoint: Checkpoint) -> str | None:
    return lacking(
        checkpoint.state,
        _CODES,
        "encoder.time_conv.0.conv.conv.weight",
        "encoder.down.0.block.0.conv1.weight",
    )


def _config(state: dict[str, Tensor]) -> dict[str, Any]:
    """What an ``Emu3VQVAE`` of these weights is made with."""
    levels = numbers(state, r"encoder\.down\.(\d+)\.")
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    base = state["encoder.conv_in.weight"].shape[0]
    return {
        "codebook_size": len(state[_CODES]),
        "embed_dim": state[_CODES].shape[1],
        "latent_channels": state["encoder.conv_out.weight"].shape[0],
        "temporal_downsample_factor": 2 ** len(numbers(state, r"encoder\.time_conv\.(\d+)\.")),
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": len(numbers(state, r"encoder\.down\.0\.block\.(\d+)\.")),
        "attn_resolutions": numbers(state, r"encoder\.down\.(\d+)\.attn\."),
        "hidden_size": widths[-1],
    }


def _load(checkpoint: Checkpoint) -> Tokenizer:
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE, Emu3VQVAEConfig

    config = _config(checkpoint.state)
    state = {}
    for name, tensor in checkpoint.state.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        linear = name.endswith("_proj.weight") and tensor.ndim == 4
        state[name] = tensor[:, :, 0, 0] if linear else tensor
    model = Emu3VQVAE(Emu3VQVAEConfig(**config))
    fill(model, state, "Emu3's network")
    traits = Traits("emu3", 2 ** (len(config["channel_multiplier"]) - 1))
    quantizer = codes(state[_CODES])
    return Tokenizer(VideoEncoder(model), quantizer, VideoDecoder(model), traits, config)


FAMILIES = (Family("emu3 of its authors", _refuse, _load),)
