"""TiTok (Yu et al., 2406.07550): a picture as one row of tokens, written as its weights want it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.vq.families.base import Checkpoint, Family, codes, fill, lacking, numbers
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError, Traits


class _Layer(nn.Module):
    """A transformer layer of CLIP; heads have 64 dims."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, max(width // 64, 1), batch_first=True)
        parts = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict[str, nn.Module](parts))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    """Tokens of a grid, a class token before and the picture's own tokens behind."""

    def __init__(self, width: int, layers: int, cells: int, tokens: int):
        super().__init__()
        self.cells = cells
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(cells + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(_Layer(width) for _ in range(layers))

    def run(self, grid: Tensor, tokens: Tensor) -> Tensor:
        """All of ``[B, cells, W]`` and ``[B, N, W]`` after the layers."""
        first = self.class_embedding.expand(len(grid), 1, -1)
        grid = torch.cat([first, grid], 1) + self.positional_embedding
        tokens = tokens + self.latent_token_positional_embedding
        x = self.ln_pre(torch.cat([grid, tokens], 1))
        for layer in self.transformer:
            x = layer(x)
        return x


class _Encoder(_Transformer):
    def __init__(self, shape: _Shape):
        super().__init__(shape.width, shape.layers, shape.cells, shape.tokens)
        self.legacy = shape.legacy
        self.patch_embed = nn.Conv2d(3, shape.width, shape.patch, stride=shape.patch)
        self.conv_out = nn.Conv2d(shape.width, shape.dim, 1)

    def latents(self, x: Tensor, tokens: Tensor) -> Tensor:
        """``[B, D, 1, N]``."""
        grid = self.patch_embed(x).flatten(2).transpose(1, 2)
        found = self.run(grid, tokens.expand(len(x), -1, -1))[:, 1 + self.cells :]
        found = self.ln_post(found)
        if self.legacy:  # trained with width and tokens confused: the first weights need it so
            found = found.reshape(len(x), found.shape[2], found.shape[1], 1)
        else:
            found = found.transpose(1, 2)[..., None]
        found = self.conv_out(found)
        return found.reshape(len(x), found.shape[1], 1, -1)


class _Decoder(_Transformer):
    """Tokens to a grid of MaskGIT's 1,024 codes, or in later weights to pixels."""

    def __init__(self, shape: _Shape):
        super().__init__(shape.width, shape.layers, shape.cells, shape.tokens)
        self.shape = shape
        width, pixels = shape.width, 3 * shape.patch**2
        self.decoder_embed = nn.Linear(shape.dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        if shape.legacy:
            hidden = shape.hidden
            self.ffn = nn.Sequential(
                nn.Conv2d(width, hidden, 1), nn.Tanh(), nn.Conv2d(hidden, shape.classes, 1)
            )
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, pixels, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        tokens = self.decoder_embed(codes[:, :, 0].transpose(1, 2))
        grid = self.mask_token.expand(len(codes), self.cells, -1)
        x = self.ln_post(self.run(grid, tokens)[:, 1 : 1 + self.cells])
        side = round(self.cells**0.5)
        x = self.ffn(x.transpose(1, 2).unflatten(2, (side, side)))
        if self.shape.legacy:
            return x
        patch = self.shape.patch  # channels are rows, columns, colours
        x = x.unflatten(1, (patch, patch, 3)).permute(0, 3, 4, 1, 5, 2)
        return self.conv_out(x.flatten(4, 5).flatten(2, 3))


class _Shape:
    """Sizes of a transformer, read from its weights."""

    def __init__(self, state: dict[str, Tensor], part: str, legacy: bool):
        own = {n.removeprefix(part + "."): x for n, x in state.items() if n.startswith(part + ".")}
        self.legacy = legacy
        self.width = own["class_embedding"].shape[1]
        self.layers = len(numbers(own, r"transformer\.(\d+)\."))
        self.cells = len(own["positional_embedding"]) - 1
        self.tokens = len(own["latent_token_positional_embedding"])
        self.dim = state["quantize.embedding.weight"].shape[1]
        self.patch = self.hidden = self.classes = 0
        if "patch_embed.weight" in own:
            self.patch = own["patch_embed.weight"].shape[2]
        elif legacy:
            self.hidden, self.classes = own["ffn.0.weight"].shape[0], own["ffn.2.weight"].shape[0]
        else:
            self.patch = round((own["ffn.0.weight"].shape[0] / 3) ** 0.5)


class _Block(nn.Module):
    """MaskGIT's: convolutions without bias; the shortcut takes what they made, as published."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, n, eps=1e-6) for n in (width, out))
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        if width != out:
            self.nin_shortcut = nn.Conv2d(out, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        y = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return y + (self.nin_shortcut(y) if hasattr(self, "nin_shortcut") else x)


class _Pixels(nn.Module):
    """MaskGIT-VQGAN's decoder."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        levels = numbers(state, r"up\.(\d+)\.")
        widths = [state[f"up.{i}.block.0.conv1.weight"].shape[0] for i in levels]
        depth = len(numbers(state, r"mid\.(\d+)\."))
        self.conv_in = nn.Conv2d(state["conv_in.weight"].shape[1], widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(_Block(widths[-1], widths[-1]) for _ in range(depth))
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            level = nn.Module()
            level.block = nn.ModuleList(_Block(width if j else before, width) for j in range(depth))
            if i:
                level.upsample_conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        level: Any
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample_conv"):
                x = level.upsample_conv(nn.functional.interpolate(x, scale_factor=2.0))
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class _Encoding(nn.Module):
    """The encoder and the tokens that it starts from."""

    def __init__(self, encoder: _Encoder, tokens: Tensor):
        super().__init__()
        self.encoder, self.tokens = encoder, nn.Parameter(tokens.float())

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.latents(x, self.tokens)


class _Decoding(nn.Module):
    """The decoder, and where it ends in MaskGIT's codes, their mean and MaskGIT's decoder."""

    def __init__(self, decoder: _Decoder, table: Tensor | None, pixels: _Pixels | None):
        super().__init__()
        self.decoder, self.pixels = decoder, pixels
        self.table = None if table is None else nn.Parameter(table.float())

    def forward(self, codes: Tensor) -> Tensor:
        x = self.decoder(codes)
        if self.table is None or self.pixels is None:
            return x
        return self.pixels(torch.einsum("nchw,cd->ndhw", x.softmax(1), self.table))


def _refuse(checkpoint: Checkpoint) -> str | None:
    return lacking(
        checkpoint.state,
        "latent_tokens",
        "encoder.latent_token_positional_embedding",
        "quantize.embedding.weight",
    )


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    """``model.vq_model`` of its config: how codes are compared is written nowhere else."""
    found = ((checkpoint.config or {}).get("model") or {}).get("vq_model")
    if not isinstance(found, dict) or "use_l2_norm" not in found:
        raise TokenizerError(
            "TiTok's config.json must lie beside its weights and have model.vq_model.use_l2_norm"
        )
    return found


def _part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{name}."): x for n, x in state.items() if n.startswith(f"{name}.")}


def _load(checkpoint: Checkpoint) -> Tokenizer:
    state, options = checkpoint.state, _options(checkpoint)
    legacy = "decoder.conv_out.weight" not in state
    encoder_shape, decoder_shape = (_Shape(state, part, legacy) for part in ("encoder", "decoder"))
    encoder, decoder = _Encoder(encoder_shape), _Decoder(decoder_shape)
    fill(encoder, _part(state, "encoder"), "TiTok's encoder")
    fill(decoder, _part(state, "decoder"), "TiTok's decoder")
    table, pixels, no_decoder = None, None, ""
    if legacy:
        weights = _part(state, "pixel_decoder")
        if weights:
            table, pixels = state["pixel_quantize.embedding.weight"], _Pixels(weights)
            fill(pixels, weights, "TiTok's pixel decoder")
        else:
            no_decoder = "these weights are of its first stage, which ends in MaskGIT's codes"
    size = round(encoder_shape.cells**0.5) * encoder_shape.patch
    tokens = encoder_shape.tokens
    traits = Traits("titok", size, low=0.0, no_decoder=no_decoder, size=size, tokens=tokens)
    quantizer = codes(
        state["quantize.embedding.weight"], "cosine" if options["use_l2_norm"] else "l2"
    )
    decoding = None if no_decoder else _Decoding(decoder, table, pixels)
    settings = {"legacy": legacy, "tokens": tokens, "size": size}
    encoding = _Encoding(encoder, state["latent_tokens"])
    return Tokenizer(encoding, quantizer, decoding, traits, settings)


FAMILIES = (Family("titok", _refuse, _load),)
