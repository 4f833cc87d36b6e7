"""A tokenizer: pictures to grids of ids and back."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.vq.quantizers import Quantizer

Colours = tuple[float, float, float]


class TokenizerError(ValueError):
    """A checkpoint, a picture or ids do not fit a tokenizer; the message says why."""


@dataclass(frozen=True)
class Traits:
    """What a family of tokenizers expects, besides its network.

    Attributes:
        family: its name.
        factor: pixels along each side of a token.
        low, high: range of the network's pictures, one or of each colour; another one changes ids
            without an error.
        no_decoder: why ids can't be turned into pixels, "" where they can.
        offset: what is added to an id in the vocabulary of the generator that reads it.
        size: side in pixels of the only pictures that it takes; None: any multiple of the factor.
        tokens: of such a picture, where they are no grid.
    """

    family: str
    factor: int
    low: float | Colours = -1.0
    high: float | Colours = 1.0
    no_decoder: str = ""
    offset: int = 0
    size: int | None = None
    tokens: int | None = None


class Tokenizer(nn.Module):
    """An encoder, a quantizer and a decoder.

    Args:
        encoder: ``[B, 3, H, W]`` in the family's range to latents ``[B, D, h, w]``.
        quantizer: of the latents.
        decoder: ``[B, D, h, w]`` to pictures; None where there is none.
        traits: of its family.
        settings: what the family rebuilds encoder and decoder from, as JSON.
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: Quantizer,
        decoder: nn.Module | None,
        traits: Traits,
        settings: dict[str, Any],
    ):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.traits, self.settings = traits, settings

    @property
    def codebook_size(self) -> int:
        """Values of one id."""
        return self.quantizer.codebook_size

    @property
    def bits(self) -> float:
        """Bits of one token."""
        return self.quantizer.bits

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.parameters()).device

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the quantizer and its codes: ids of another one do not fit."""
        digest = hashlib.sha256(json.dumps(self.quantizer.settings, sort_keys=True).encode())
        for name, tensor in sorted(self.quantizer.state_dict().items()):
            if name.rpartition(".")[2] not in ("counts", "sums", "started"):
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def latents(self, image: Tensor) -> Tensor:
        """Unquantized latents ``[B, h, w, D]`` float32 of pictures as :meth:`encode` takes them."""
        self.check_image(image)
        dtype = next(self.parameters()).dtype
        low, high = self._range(dtype)
        pixels = image.to(self.device, dtype) * (high - low) + low
        return self.encoder(pixels).permute(0, 2, 3, 1).float()

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Ids ``[B, h, w]``, or ``[B, h, w, Q]`` with Q levels, int64.

        Args:
            image: ``[B, 3, H, W]`` in 0 .. 1, sides multiples of the factor.

        Raises:
            TokenizerError: the picture does not fit.
        """
        z = self.latents(image)
        ids = self.quantizer.encode(z.flatten(1, 2))
        return ids.view(*self._grid(z), *ids.shape[2:])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in 0 .. 1, float32.

        Raises:
            TokenizerError: ids are out of range or of another shape, or this family has no decoder.
        """
        if self.decoder is None:
            raise TokenizerError(f"{self.traits.family} can't decode: {self.traits.no_decoder}")
        if ids.ndim != (3 if self.quantizer.levels == 1 else 4):
            shape = "[B, h, w]" if self.quantizer.levels == 1 else "[B, h, w, Q]"
            raise TokenizerError(f"ids must be {shape}, got {tuple(ids.shape)}")
        tokens = self.traits.tokens
        if tokens is not None and tuple(ids.shape[1:3]) != (1, tokens):
            raise TokenizerError(f"ids must be [B, 1, {tokens}], got {tuple(ids.shape)}")
        try:
            codes = self.quantizer.decode(ids.flatten(1, 2).to(self.device))
        except ValueError as error:
            raise TokenizerError(str(error)) from None
        grid = self.quantizer.grid or tuple(ids.shape[1:3])
        return self.pixels(codes.view(len(ids), *grid, -1)).clamp(0, 1)

    def pixels(self, codes: Tensor) -> Tensor:
        """The decoder's picture of quantized latents ``[B, h, w, D]``, about 0 .. 1, float32."""
        low, high = self._range(torch.float32)
        dtype = next(self.parameters()).dtype
        assert self.decoder is not None
        out = self.decoder(codes.permute(0, 3, 1, 2).to(dtype)).float()
        return (out - low) / (high - low)

    def _range(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of the network's pictures, ``[1 or 3, 1, 1]``."""
        ends = (self.traits.low, self.traits.high)
        low, high = (torch.tensor(x, dtype=dtype, device=self.device) for x in ends)
        return low.view(-1, 1, 1), high.view(-1, 1, 1)

    def _grid(self, z: Tensor) -> tuple[int, ...]:
        """Shape of the ids of latents ``[B, h, w, D]``: one each, or one row that is no grid."""
        tokens = self.traits.tokens
        return tuple(z.shape[:3]) if tokens is None else (len(z), 1, tokens)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: the picture again, unclamped, ids ``[B, N, ..]`` and the loss."""
        z = self.latents(image)
        out = self.quantizer(z.flatten(1, 2))
        return self.pixels(out.quantized.view(z.shape)), out.indices, out.loss

    def check_image(self, image: Tensor) -> None:
        """Raise TokenizerError unless this is a picture that the tokenizer takes."""
        factor = self.traits.factor
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise TokenizerError(
                f"image must be floating [B, 3, H, W], got {image.dtype} {tuple(image.shape)}"
            )
        if min(image.shape[2:]) < factor or image.shape[2] % factor or image.shape[3] % factor:
            height, width = image.shape[2:]
            raise TokenizerError(
                f"image sides must be multiples of {factor}, got {width} x {height}; "
                f"crop or pad it to {max(width // factor, 1) * factor} x "
                f"{max(height // factor, 1) * factor}"
            )
        if not bool(torch.isfinite(image).all()):
            raise TokenizerError("image must be finite, got NaN or infinity")
        size = self.traits.size
        if size is not None and tuple(image.shape[2:]) != (size, size):
            height, width = image.shape[2:]
            raise TokenizerError(
                f"{self.traits.family} takes pictures of {size} x {size} only, "
                f"got {width} x {height}"
            )
        if image.numel() and (image.min() < -0.01 or image.max() > 1.01):
            raise TokenizerError(
                f"image must be in 0 .. 1, got {image.min():.3g} .. {image.max():.3g}"
            )

    def picture_bits(self, height: int, width: int) -> float:
        """Bits that the ids of a picture take."""
        if self.traits.tokens is not None:
            return self.traits.tokens * self.bits
        return height // self.traits.factor * (width // self.traits.factor) * self.bits


def cropped(pixels: Tensor, factor: int) -> tuple[Tensor, list[int] | None]:
    """The middle of whole tokens of ``[B, 3, H, W]``, and width and height before if others.

    Raises:
        TokenizerError: a side is shorter than a token.
    """
    height, width = pixels.shape[2:]
    if min(height, width) < factor:
        raise TokenizerError(
            f"a picture must have sides of {factor} pixels or more, got {width} x {height}"
        )
    top, left = height % factor // 2, width % factor // 2
    tall, wide = height - height % factor, width - width % factor
    note = None if (tall, wide) == (height, width) else [width, height]
    return pixels[:, :, top : top + tall, left : left + wide], note


def token_bits(ids: Tensor) -> float:
    """Entropy in bits of ids as they are used: a lower bound of coding them one by one."""
    counts = torch.unique(ids, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum()) if len(counts) > 1 else 0.0


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0 .. 1; infinite where they are equal."""
    error = torch.mean((got.double() - want.double()) ** 2).item()
    return math.inf if error == 0 else -10 * math.log10(error)
