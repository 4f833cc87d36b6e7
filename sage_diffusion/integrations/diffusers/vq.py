"""VQGANs as diffusers, taming-transformers and SimVQ write them, through diffusers' ``VQModel``.

MoVQ (Kandinsky) and aMUSEd's tokenizer are ``VQModel`` too.  The wrong range of pictures changes
ids without an error: aMUSEd takes 0 .. 1, all others -1 .. 1.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.vq.families.base import Checkpoint, Family
from sage_diffusion.vq.quantizers import VectorQuantizer
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError, Traits

_CODES = "quantize.embedding.weight"
_PROJECTION = "quantize.embedding_proj"

#: Parts of a training checkpoint that no tokenizer needs: losses, discriminators, weight averages.
_IGNORED = re.compile(r"^(loss|model_ema|discriminator|colorize)\b|^quantize\.codebook_used$")

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


class _Encoder(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.encoder, self.quant_conv = model.encoder, model.quant_conv

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))


class _Decoder(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.decoder, self.post_quant_conv = model.decoder, model.post_quant_conv
        self.spatial = model.config.norm_type == "spatial"

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes), codes if self.spatial else None)


def _refuse(checkpoint: Checkpoint) -> str | None:
    if checkpoint.config is not None:
        kind = checkpoint.config.get("_class_name")
        return None if kind == "VQModel" else f"config.json names {kind}, not VQModel"
    missing = [
        name
        for name in (_CODES, "encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight")
        if name not in checkpoint.state
    ]
    return f"no {missing[0]} among the keys" if missing else None


def _load(checkpoint: Checkpoint) -> Tokenizer:
    from diffusers import VQModel

    state = {name: x.float() for name, x in checkpoint.state.items() if not _IGNORED.match(name)}
    if _CODES not in state:
        raise TokenizerError(f"a VQModel must have {_CODES}, found none")
    table = state[_CODES]
    if checkpoint.config is not None:
        config = {k: v for k, v in checkpoint.config.items() if not k.startswith("_")}
    else:
        table = _folded(state)
        config = {"num_vq_embeddings": len(table), **_config(state)}
        state = _renamed(state, len(config["block_out_channels"]))
        state[_CODES] = table
    _check_table(table, config)
    try:
        model = VQModel(**config)
        model.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise TokenizerError(f"weights do not fit a VQModel: {said[:400]}") from None
    quantizer = VectorQuantizer(table.shape[1], len(table), decay=None, kmeans=False)
    quantizer.load_state_dict({"codebook": table})
    low = 0.0 if config.get("lookup_from_codebook") else -1.0
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    traits = Traits("vqgan", factor, low=low)
    return Tokenizer(_Encoder(model), quantizer, _Decoder(model), traits, dict(config))


def _check_table(table: Tensor, config: dict[str, Any]) -> None:
    wanted = (config.get("num_vq_embeddings"), config.get("vq_embed_dim") or table.shape[1])
    if tuple(table.shape) != wanted:
        raise TokenizerError(
            f"the codebook must be {wanted} as configured, got {tuple(table.shape)}"
        )


def _folded(state: dict[str, Tensor]) -> Tensor:
    """The codes: of SimVQ those behind its projection, which its own decoding of ids forgets."""
    table = state.pop(_CODES)
    weight = state.pop(f"{_PROJECTION}.weight", None)
    bias = state.pop(f"{_PROJECTION}.bias", None)
    return table if weight is None else nn.functional.linear(table, weight, bias)


def _numbers(state: dict[str, Tensor], pattern: str) -> list[int]:
    """Numbers that stand in names, ascending."""
    return sorted({int(m[1]) for m in (re.match(pattern, name) for name in state) if m})


def _config(state: dict[str, Tensor]) -> dict[str, Any]:
    """What a ``VQModel`` of these taming weights is made with; the codes are gone already."""
    levels = _numbers(state, r"encoder\.down\.(\d+)\.")
    blocks = _numbers(state, r"encoder\.down\.0\.block\.(\d+)\.")
    attentive = _numbers(state, r"encoder\.down\.(\d+)\.attn\.")
    latent = state["encoder.conv_out.weight"].shape[0]
    codes = state.get("quant_conv.weight")
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
        "vq_embed_dim": latent if codes is None else codes.shape[0],
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in state,
    }


def _renamed(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Weights under diffusers' names: its decoder counts levels from the coarsest."""
    found = {}
    for name, tensor in state.items():
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


FAMILY = Family("vqgan", _refuse, _load)
