"""Tokenizers in transformers: Emu3, Janus, Chameleon, GLM-Image, Apertus 1.5; LlamaGen's weights.

A folder holds such a tokenizer alone or a whole model with one.  LlamaGen's network, and that of
Janus as its authors write it, is transformers' Janus under other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sage_diffusion.vq.families.base import Checkpoint, Family, codes, fill, lacking, numbers
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError, Traits

_CODES = "quantize.embedding.weight"

#: What CLIP's pictures are normalized with, hence GLM-Image's.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes))


class VideoEncoder(_Encoder):
    """Emu3's: a picture is a video of as many equal frames as one token spans."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.frames = model.config.temporal_downsample_factor

    def forward(self, x: Tensor) -> Tensor:
        video = x[:, None].repeat(1, self.frames, 1, 1, 1)
        return self.quant_conv(self.encoder(video).transpose(1, 2))[:, :, 0]


class VideoDecoder(_Decoder):
    """Emu3's; the first frame is the picture."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.frames = model.config.temporal_downsample_factor

    def forward(self, codes: Tensor) -> Tensor:
        video = codes[:, :, None]
        frames = self.decoder(self.post_quant_conv(video).transpose(1, 2), video.transpose(1, 2))
        return frames.unflatten(0, (-1, self.frames))[:, 0]


class _VisionEncoder(nn.Module):
    """GLM-Image's: a vision transformer's features."""

    def __init__(self, visual: Any, quant_conv: nn.Module):
        super().__init__()
        self.visual, self.quant_conv = visual, quant_conv

    def forward(self, x: Tensor) -> Tensor:
        patch = self.visual.patch_size
        height, width = x.shape[2] // patch, x.shape[3] // patch
        patches = x.unflatten(3, (width, patch)).unflatten(2, (height, patch))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
        grids = x.new_tensor([[1, height, width]] * len(x)).long()
        features = self.visual(patches, grid_thw=grids).last_hidden_state
        return self.quant_conv(features.view(len(x), height, width, -1).permute(0, 3, 1, 2))


@dataclass(frozen=True)
class _Kind:
    """A tokenizer class of transformers.

    Attributes:
        family: its name.
        module, model: the class.
        part: config of the tokenizer inside a whole model's.
        inside: prefix of its keys there.
        metric: of its codes.
        video: whether it takes frames.
        no_decoder: as of Traits.
        offset: id of the first token in a whole model's vocabulary, from its config.
    """

    family: str
    module: str
    model: str
    part: str
    inside: str
    metric: str
    video: bool = False
    no_decoder: str = ""
    offset: Callable[[dict[str, Any]], int] = lambda config: 0


def _named(name: str) -> Callable[[dict[str, Any]], int]:
    """The id of a token's name in a whole model's vocabulary."""
    return lambda config: (config.get("vocabulary_map") or {}).get(name, 0)


_READ = "its tokens are read by a generator only, and transformers has no pixel decoder for them"

#: ``model_type`` of a tokenizer and of a whole model.  The one line that another tokenizer adds.
_KINDS = {
    ("emu3_vqgan", "emu3"): _Kind(
        "emu3", "emu3", "Emu3VQVAE", "vq_config", "vqmodel", "l2", True,
        offset=_named("<|visual token 000000|>"),
    ),
    ("janus_vqgan", "janus"): _Kind(
        "janus", "janus", "JanusVQVAE", "vq_config", "vqmodel", "cosine"
    ),
    ("chameleon_vqgan", "chameleon"): _Kind(
        "chameleon", "chameleon", "ChameleonVQVAE", "vq_config", "vqmodel", "l2",
        no_decoder=_READ, offset=_named("IMGIMGAZ"),
    ),
    ("glm_image_vqmodel", "glm_image"): _Kind(
        "glm-image", "glm_image", "GlmImageVQVAE", "vq_config", "vqmodel", "cosine",
        no_decoder="its tokens are read by a generator only: meaning, which GLM-Image's diffusion "
        "half turns into pixels",
    ),
    ("apertus1p5_vision_tokenizer", "apertus1p5"): _Kind(
        "apertus", "apertus1p5", "Apertus1p5VisionTokenizerModel", "vision_config",
        "vision_tokenizer", "dot",
        no_decoder=_READ, offset=lambda config: config.get("image_token_offset", 131272),
    ),
}  # fmt: skip


def _kind(checkpoint: Checkpoint) -> tuple[_Kind, bool] | None:
    """Which it is, and whether inside a whole model."""
    named = (checkpoint.config or {}).get("model_type")
    for names, kind in _KINDS.items():
        if named in names:
            return kind, named == names[1]
    return None


def _refuse(family: str) -> Callable[[Checkpoint], str | None]:
    types = next(names for names, kind in _KINDS.items() if kind.family == family)

    def refuse(checkpoint: Checkpoint) -> str | None:
        if checkpoint.config is None:
            return "no config.json beside the weights"
        named = checkpoint.config.get("model_type")
        return None if named in types else f"config.json has model_type {named}, not {types[0]}"

    return refuse


def _within(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Weights of a part of a model, under their names there."""
    pattern = re.compile(rf"^(?:.*\.)?{part}\.(.*)$")
    found = ((pattern.match(name), tensor) for name, tensor in state.items())
    return {match[1]: tensor for match, tensor in found if match}


def _load(checkpoint: Checkpoint) -> Tokenizer:
    import importlib

    found = _kind(checkpoint)
    assert found is not None and checkpoint.config is not None
    kind, whole = found
    config = checkpoint.config
    state = _within(checkpoint.state, kind.inside) if whole else dict(checkpoint.state)
    if _CODES not in state:
        raise TokenizerError(f"a {kind.model} must have {_CODES}, found none")
    # Its config class is found by the model's own annotation, as transformers does.
    module = importlib.import_module(f"transformers.models.{kind.module}.modeling_{kind.module}")
    model_class: Any = getattr(module, kind.model)
    own = config.get(kind.part, {}) if whole else config
    model = model_class(model_class.config_class.from_dict(own))
    fill(model, state, f"a {kind.model}")
    quantizer = codes(state[_CODES], kind.metric)
    settings = {"model_type": model.config.model_type}
    traits: dict[str, Any] = {"no_decoder": kind.no_decoder}
    traits["offset"] = kind.offset(config) if whole else 0
    if kind.family == "glm-image":
        encoder, factor = _vision(checkpoint, module, model, whole)
        low, high = _clip_range()
        traits.update(low=low, high=high)
    else:
        encoder = VideoEncoder(model) if kind.video else _Encoder(model)
        factor = 2 ** (len(model.config.channel_multiplier) - 1)
    decoder = None if kind.no_decoder else VideoDecoder(model) if kind.video else _Decoder(model)
    return Tokenizer(encoder, quantizer, decoder, Traits(kind.family, factor, **traits), settings)


def _vision(checkpoint: Checkpoint, module: Any, model: Any, whole: bool) -> tuple[nn.Module, int]:
    """GLM-Image's encoder and the side of its patches."""
    weights = _within(checkpoint.state, "visual")
    if not whole or not weights:
        raise TokenizerError(
            "GLM-Image's pictures pass its vision transformer, which lies in the folder "
            "vision_language_encoder; this one has no weights of it"
        )
    vision: Any = module.GlmImageVisionModel
    config = vision.config_class.from_dict((checkpoint.config or {}).get("vision_config", {}))
    visual = vision(config)
    fill(visual, weights, "GLM-Image's vision transformer")
    return _VisionEncoder(visual, model.quant_conv), config.patch_size


def _clip_range() -> tuple[Any, Any]:
    pairs = list(zip(_MEAN, _STD, strict=True))
    return tuple(-m / s for m, s in pairs), tuple((1 - m) / s for m, s in pairs)


#: LlamaGen's names to those of transformers' Janus.
_RENAMES = (
    (r"^gen_vision_model\.", ""),
    (r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up.\1.block."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)


def _janus_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = any(name.startswith("gen_vision_model.") for name in state)
    found = {}
    for name, tensor in state.items():
        if name.endswith("quantize.codebook_used") or (
            whole and not name.startswith("gen_vision_model.")
        ):
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def _refuse_llamagen(checkpoint: Checkpoint) -> str | None:
    prefix = "gen_vision_model." if f"gen_vision_model.{_CODES}" in checkpoint.state else ""
    names = (_CODES, "encoder.conv_blocks.0.res.0.conv1.weight")
    return lacking(checkpoint.state, *(prefix + name for name in names))


def _load_llamagen(checkpoint: Checkpoint) -> Tokenizer:
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    state = _janus_names(checkpoint.state)
    levels = numbers(state, r"encoder\.down\.(\d+)\.")
    base = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    table = state[_CODES]
    settings: dict[str, Any] = {
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": len(numbers(state, r"encoder\.down\.0\.block\.(\d+)\.")),
        "latent_channels": state["encoder.conv_out.weight"].shape[0],
        "embed_dim": table.shape[1],
        "num_embeddings": len(table),
    }
    model = JanusVQVAE(JanusVQVAEConfig(**settings))
    fill(model, state, "LlamaGen's network")
    traits = Traits("llamagen", 2 ** (len(levels) - 1))
    return Tokenizer(_Encoder(model), codes(table, "cosine"), _Decoder(model), traits, settings)


FAMILIES = (
    *(Family(kind.family, _refuse(kind.family), _load) for kind in _KINDS.values()),
    Family("llamagen", _refuse_llamagen, _load_llamagen),
)
