"""VQGANs as diffusers, taming-transformers and others write them, through diffusers' ``VQModel``.

MoVQ (Kandinsky) and aMUSEd's tokenizer are ``VQModel`` too; SimVQ's, IBQ's, RQ-VAE's and VAR's
networks are taming-transformers' under its names.  The wrong range of pictures changes ids without
an error: aMUSEd takes 0 .. 1, all others -1 .. 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sage_diffusion.integrations.diffusers import taming
from sage_diffusion.vq.families.base import (
    Checkpoint,
    Family,
    codes,
    fill,
    lacking,
    needed,
    numbers,
    own,
)
from sage_diffusion.vq.quantizers import FSQ, Quantizer, Residual
from sage_diffusion.vq.quantizers.scales import Scales
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError, Traits

_CODES = "quantize.embedding.weight"
_PROJECTION = "quantize.embedding_proj"
_LEVEL = r"quantizer\.codebooks\.(\d+)\.weight"
_SCALE = "quantize.quant_resi."

#: IBQ's and Emu3.5's codebooks begin here.  Smaller ones of IBQ have a VQGAN's keys and shapes, and
#: must be converted with ``metric="dot"``.
_IBQ_CODES = 2**17

#: Sides of VAR's grids for pictures of 256 pixels.
_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

#: Counts of codes, which no tokenizer needs.
_IGNORED = re.compile(
    r"^quantize\.(codebook_used|ema_vocab_hit_SV)$"
    r"|^quantizer\.codebooks\.\d+\.(cluster_size_ema|embed_ema)$"
)


class Encoder(nn.Module):
    """Pictures to latents."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder, self.quant_conv = model.encoder, model.quant_conv

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))


class Decoder(nn.Module):
    """Codes to pictures."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder, self.post_quant_conv = model.decoder, model.post_quant_conv
        self.spatial = model.config.norm_type == "spatial"

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes), codes if self.spatial else None)


def _empty(config: dict[str, Any]) -> Any:
    """A ``VQModel`` of fresh weights, without its codebook."""
    from diffusers import VQModel

    try:
        model: Any = VQModel(**{**config, "num_vq_embeddings": 2})
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"weights do not fit a VQModel: {error}") from None
    model.quantize = nn.Identity()
    return model


def _network(state: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """A ``VQModel`` of weights under diffusers' names, without its codebook."""
    model = _empty(config)
    for name in ("quant_conv", "post_quant_conv"):
        weight = state[f"{name}.weight"]
        if weight.shape[2] > 1:  # VAR's
            out, width, size, _ = weight.shape
            setattr(model, name, nn.Conv2d(width, out, size, padding=size // 2))
    fill(model, state, "a VQModel")
    return model


def _tokenizer(
    family: str,
    quantizer: Quantizer,
    state: dict[str, Tensor],
    config: dict[str, Any],
    **traits: Any,
) -> Tokenizer:
    if quantizer.dim != config["vq_embed_dim"]:
        raise TokenizerError(
            f"the codes must have {config['vq_embed_dim']} dims as the network, got {quantizer.dim}"
        )
    return _around(_network(state, config), family, quantizer, config, **traits)


def _around(
    model: Any, family: str, quantizer: Quantizer, config: dict[str, Any], **traits: Any
) -> Tokenizer:
    """The tokenizer of a ``VQModel``; aMUSEd's is told by ``lookup_from_codebook``."""
    low = 0.0 if config.get("lookup_from_codebook") else -1.0
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    found = Traits(family, factor, low=low, **traits)
    return Tokenizer(Encoder(model), quantizer, Decoder(model), found, settings)


def _own(family: str) -> Family:
    """What was repaired here."""
    return own(family, lambda quantizer, found: _around(_empty(found), family, quantizer, found))


def _load_folder(checkpoint: Checkpoint) -> Tokenizer:
    """As diffusers writes it."""
    config = {k: v for k, v in (checkpoint.config or {}).items() if not k.startswith("_")}
    state = dict(checkpoint.state)
    if _CODES not in state:
        raise TokenizerError(f"a VQModel must have {_CODES}, found none")
    table = state.pop(_CODES)
    config["vq_embed_dim"] = config.get("vq_embed_dim") or config.get("latent_channels")
    wanted = (config.get("num_vq_embeddings"), config["vq_embed_dim"])
    if tuple(table.shape) != wanted:
        raise TokenizerError(
            f"the codebook must be {wanted} as configured, got {tuple(table.shape)}"
        )
    return _tokenizer("vqgan", codes(table), state, config)


def _load(checkpoint: Checkpoint, family: str, quantizer_of: Callable[..., Quantizer]) -> Tokenizer:
    """Under taming-transformers' names."""
    state = needed(checkpoint.state)
    state = {name: x.float() for name, x in state.items() if not _IGNORED.match(name)}
    quantizer = quantizer_of(state, checkpoint.header or {})
    config = taming.config_of(state)
    traits = {}
    if isinstance(quantizer, Scales):
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        traits = {"size": factor * quantizer.scales[-1], "tokens": quantizer.tokens}
    return _tokenizer(family, quantizer, taming.renamed(state), config, **traits)


def _plain(state: dict[str, Tensor], header: dict[str, Any]) -> Quantizer:
    """The codes: of SimVQ those behind its projection, which its own decoding of ids forgets."""
    table = state.pop(_CODES)
    weight = state.pop(f"{_PROJECTION}.weight", None)
    bias = state.pop(f"{_PROJECTION}.bias", None)
    if weight is not None:
        table = nn.functional.linear(table, weight, bias)
    return codes(table, header.get("metric") or "l2")


def _dot(state: dict[str, Tensor], header: dict[str, Any]) -> Quantizer:
    return codes(state.pop(_CODES), "dot")


def _rounded(state: dict[str, Tensor], header: dict[str, Any]) -> Quantizer:
    return FSQ(header["levels"])


def _residual(state: dict[str, Tensor], header: dict[str, Any]) -> Quantizer:
    """RQ-VAE's levels; the last row of each table is padding."""
    count = len(numbers(state, _LEVEL))
    tables = [state.pop(f"quantizer.codebooks.{i}.weight")[:-1] for i in range(count)]
    return codes(tables[0]) if count == 1 else Residual([codes(table) for table in tables])


def _scales(state: dict[str, Tensor], header: dict[str, Any]) -> Quantizer:
    """VAR's; its convolutions are one for all scales, some that share, or one each."""
    table = state.pop(_CODES)
    weights = {name: state.pop(name) for name in list(state) if name.startswith(_SCALE)}
    found = sorted({name.rpartition(".")[0] for name in weights}, key=_natural)
    sides = header.get("scales") or _SIDES
    quantizer = Scales(table.shape[1], len(table), sides, convolutions=len(found))
    own = {"codebook": table}
    for i, name in enumerate(found):
        for part in ("weight", "bias"):
            own[f"convolutions.{i}.{part}"] = weights[f"{name}.{part}"]
    fill(quantizer, own, "multi-scale quantization")
    return quantizer


def _natural(name: str) -> list[int]:
    """Order of numbered names."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _refuse_network(checkpoint: Checkpoint) -> str | None:
    for key in ("_class_name", "model_type"):
        if key in (checkpoint.config or {}):
            return f"config.json has {key} {(checkpoint.config or {})[key]}"
    if "encoder.time_conv.0.conv.conv.weight" in checkpoint.state:
        return "encoder.time_conv makes it Emu3's"
    return lacking(checkpoint.state, *taming.KEYS)


def _metric(checkpoint: Checkpoint) -> str:
    """As its conversion was told, else told by the codebook's size; SimVQ's may be as large."""
    told = (checkpoint.header or {}).get("metric")
    simvq = f"{_PROJECTION}.weight" in checkpoint.state
    large = len(checkpoint.state[_CODES]) >= _IBQ_CODES
    return told or ("dot" if large and not simvq else "l2")


def _refuse_plain(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.config
    if config is not None and "_class_name" in config:
        kind = config["_class_name"]
        return None if kind == "VQModel" else f"config.json names {kind}, not VQModel"
    reason = lacking(checkpoint.state, _CODES) or _refuse_network(checkpoint)
    if reason is None and any(name.startswith(_SCALE) for name in checkpoint.state):
        return "quantize.quant_resi makes it multi-scale"
    if reason is None and _metric(checkpoint) == "dot":
        return f"its codes are chosen by dot product, as from {_IBQ_CODES} codes on"
    return reason


def _refuse_dot(checkpoint: Checkpoint) -> str | None:
    reason = lacking(checkpoint.state, _CODES) or _refuse_network(checkpoint)
    if reason is None and _metric(checkpoint) != "dot":
        return f"fewer than {_IBQ_CODES} codes, and its header has no metric dot"
    return reason


def _refuse_rounded(checkpoint: Checkpoint) -> str | None:
    if not (checkpoint.header or {}).get("levels"):
        return "its header has no levels"
    return _refuse_network(checkpoint)


def _refuse_residual(checkpoint: Checkpoint) -> str | None:
    reason = lacking(checkpoint.state, "quantizer.codebooks.0.weight")
    return reason or _refuse_network(checkpoint)


def _refuse_scales(checkpoint: Checkpoint) -> str | None:
    if not any(name.startswith(_SCALE) for name in checkpoint.state):
        return f"no {_SCALE}* among the keys"
    return lacking(checkpoint.state, _CODES) or _refuse_network(checkpoint)


def _load_plain(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.config is not None and "_class_name" in checkpoint.config:
        return _load_folder(checkpoint)
    return _load(checkpoint, "vqgan", _plain)


FAMILIES = (
    *(_own(name) for name in ("vqgan", "ibq", "rq-vae")),
    Family("vqgan", _refuse_plain, _load_plain),
    Family("ibq", _refuse_dot, lambda found: _load(found, "ibq", _dot)),
    Family("fsq", _refuse_rounded, lambda found: _load(found, "fsq", _rounded)),
    Family("rq-vae", _refuse_residual, lambda found: _load(found, "rq-vae", _residual)),
    Family("var", _refuse_scales, lambda found: _load(found, "var", _scales)),
)
