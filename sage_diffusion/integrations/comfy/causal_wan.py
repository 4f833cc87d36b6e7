"""A Wan transformer of diffusers as a checkpoint for ComfyUI's autoregressive sampler.

    python -m sage_diffusion.integrations.comfy.causal_wan causal_video.safetensors

writes the bundled causal video model, for ``models/diffusion_models``; ``--transformer`` takes any
folder of a causal ``WanTransformer3DModel``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from sage_diffusion.files import write_bytes

#: The bundled causal video model.
BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "causal_video" / "transformer"

#: Channels of ComfyUI's latents for Wan.
CHANNELS = 16

_NAMES = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)


def to_comfy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under ComfyUI's names, with zeros for the channels that the model lacks of 16.

    Raises:
        ValueError: the model's patches are not 1 x 2 x 2, or it has more than 16 channels.
    """
    found = {}
    for name, weight in state.items():
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        found[name] = weight
    embedding = found["patch_embedding.weight"]
    missing = CHANNELS - embedding.shape[1]
    if tuple(embedding.shape[2:]) != (1, 2, 2) or missing < 0:
        raise ValueError(
            "ComfyUI's causal Wan has patches of 1 x 2 x 2 and at most 16 channels, got "
            f"{tuple(embedding.shape[2:])} and {embedding.shape[1]}"
        )
    found["patch_embedding.weight"] = F.pad(embedding, (0, 0, 0, 0, 0, 0, 0, missing))
    for name, rest in (("head.head.weight", (-1,)), ("head.head.bias", ())):
        padding = (0, 0) * len(rest) + (0, missing)
        found[name] = F.pad(found[name].unflatten(0, (4, -1)), padding).flatten(0, 1)
    return {name: weight.contiguous() for name, weight in found.items()}


def metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """What ComfyUI can't tell from the weights: that the model is causal, its heads and text."""
    known = {
        "causal_ar": True,
        "num_heads": config["num_attention_heads"],
        "text_dim": config["text_dim"],
    }
    return {"config": json.dumps({"transformer": known})}


def convert(folder: Path, out: Path) -> None:
    """Write the checkpoint of a ``transformer`` folder of diffusers.

    Raises:
        FileNotFoundError: the folder holds no such model.
        ValueError: see :func:`to_comfy`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = to_comfy(load_file(folder / "diffusion_pytorch_model.safetensors"))
    write_bytes(out, save(state, metadata(config)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a .safetensors file")
    parser.add_argument("--transformer", type=Path, default=BUNDLED)
    args = parser.parse_args(arguments)
    if not args.transformer.is_dir():
        parser.error(
            f"there is no folder {args.transformer}: the bundled model is in the repository, not "
            "in the registry's archive"
        )
    convert(args.transformer, args.out)
    print(f"wrote {args.out}: put it into ComfyUI's models/diffusion_models")


if __name__ == "__main__":
    main()
