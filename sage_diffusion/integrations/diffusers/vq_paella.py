"""Stable Cascade's stage A (Wuerstchen's too), through diffusers' ``PaellaVQModel``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sage_diffusion.vq.families.base import Checkpoint, Family, codes, fill, lacking, numbers
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError, Traits

#: The codebook in diffusers' files, and in Stability's and ComfyUI's.
_CODES = ("vquantizer.embedding.weight", "vquantizer.codebook.weight")


def _refuse(checkpoint: Checkpoint) -> str | None:
    if not any(name in checkpoint.state for name in _CODES):
        return f"no {_CODES[1]} among the keys"
    return lacking(checkpoint.state, "in_block.1.weight", "up_blocks.0.0.weight")


def _config(state: dict[str, Tensor]) -> dict[str, Any]:
    """What a ``PaellaVQModel`` of these weights is made with, besides its codebook."""
    levels = (numbers(state, r"down_blocks\.(\d+)\.")[-1] + 1) // 2
    first = state["up_blocks.0.0.weight"]
    colours = state["in_block.1.weight"].shape[1]
    return {
        "levels": levels,
        "bottleneck_blocks": numbers(state, r"up_blocks\.(\d+)\.")[-1] - 2 * (levels - 1),
        "embed_dim": first.shape[0],
        "latent_channels": first.shape[1],
        "up_down_scale_factor": round((colours / 3) ** 0.5),
    }


def _load(checkpoint: Checkpoint) -> Tokenizer:
    # Where it lives differs by version; the pipeline that uses it always has it.
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    state = dict(checkpoint.state)
    name = next(name for name in _CODES if name in state)
    quantizer = codes(state.pop(name))
    config = _config(state)
    if quantizer.dim != config["latent_channels"]:
        raise TokenizerError(
            f"the codes must have {config['latent_channels']} dims, got {quantizer.dim}"
        )
    model = PaellaVQModel(**config, num_vq_embeddings=2)
    model.vquantizer = nn.Identity()
    fill(model, state, "a PaellaVQModel")
    factor = config["up_down_scale_factor"] * 2 ** (config["levels"] - 1)
    return Tokenizer(
        nn.Sequential(model.in_block, model.down_blocks),
        quantizer,
        nn.Sequential(model.up_blocks, model.out_block),
        Traits("stable-cascade-a", factor, low=0.0),
        config,
    )


FAMILIES = (Family("stable-cascade-a", _refuse, _load),)
