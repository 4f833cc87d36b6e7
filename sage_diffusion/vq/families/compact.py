"""This package's own tokenizer: a small convolutional autoencoder that trains on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sage_diffusion.vq.families.base import own
from sage_diffusion.vq.quantizers import Quantizer
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError, Traits

_NAME = "compact"

#: Pixels along a side of the first layer's patches.
_PATCH = 4

#: Eight pixels a token, three million weights.
DEFAULT: dict[str, Any] = {"widths": [64, 128], "depths": [1, 3]}


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, which they start as."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        act = nn.functional.gelu
        return x + self.second(act(self.first(act(x))))


def _encoder(dim: int, widths: list[int], depths: list[int]) -> nn.Sequential:
    """Patches of 4 x 4 pixels; every further width halves the sides."""
    layers: list[nn.Module] = [
        nn.PixelUnshuffle(_PATCH),
        nn.Conv2d(3 * _PATCH**2, widths[0], 3, padding=1),
    ]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if i:
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[i - 1], width, 1)]
        layers += [_Residual(width) for _ in range(depth)]
    return nn.Sequential(*layers, nn.GELU(), nn.Conv2d(widths[-1], dim, 1))


def _decoder(dim: int, widths: list[int], depths: list[int]) -> nn.Sequential:
    """The encoder backwards."""
    layers: list[nn.Module] = [nn.Conv2d(dim, widths[-1], 3, padding=1)]
    for i in reversed(range(len(widths))):
        layers += [_Residual(widths[i]) for _ in range(depths[i])]
        if i:
            layers += [nn.Conv2d(widths[i], 4 * widths[i - 1], 1), nn.PixelShuffle(2)]
    out = nn.Conv2d(widths[0], 3 * _PATCH**2, 3, padding=1)
    return nn.Sequential(*layers, nn.GELU(), out, nn.PixelShuffle(_PATCH))


def make(quantizer: Quantizer, settings: dict[str, Any] | None = None) -> Tokenizer:
    """A tokenizer with fresh weights.

    Args:
        quantizer: its D is the latents'.
        settings: ``widths``, channels from the finest to the coarsest grid, and ``depths``,
            residual blocks on each; one width makes tokens of 4 x 4 pixels, each more doubles
            their sides.

    Raises:
        TokenizerError: the settings are no such lists.
    """
    settings = dict(DEFAULT if settings is None else settings)
    widths, depths = settings.get("widths"), settings.get("depths")
    if (
        set(settings) != {"widths", "depths"}
        or not isinstance(widths, list)
        or not isinstance(depths, list)
        or not 1 <= len(widths) == len(depths) <= 5
        or any(not isinstance(n, int) or n < 1 for n in (*widths, *depths))
    ):
        raise TokenizerError(
            f"{_NAME} must have widths and depths, lists of one length, got {settings}"
        )
    traits = Traits(_NAME, factor=_PATCH * 2 ** (len(widths) - 1))
    return Tokenizer(
        _encoder(quantizer.dim, widths, depths),
        quantizer,
        _decoder(quantizer.dim, widths, depths),
        traits,
        settings,
    )


FAMILIES = (own(_NAME, make),)
