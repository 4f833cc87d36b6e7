"""VidKV (2503.16257): keys of 1.5 bits with a Fourier transform, values of three levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.quantize import Form
from sage_diffusion.kv.method import Body, Method, Place
from sage_diffusion.kv.packed import Grouping, PackedSide


def fourier(x: Tensor) -> Tensor:
    """``[.., C]`` -> its C real coefficients of a Fourier transform, orthonormal; C is even.

    The released code stores real and imaginary part of all C coefficients, twice the numbers.
    """
    z = torch.fft.rfft(x, norm="ortho")
    middle = torch.view_as_real(z[..., 1:-1]).flatten(-2) * 2**0.5
    return torch.cat((z[..., :1].real, middle, z[..., -1:].real), -1)


def inverse_fourier(x: Tensor) -> Tensor:
    """The inverse of :func:`fourier`."""
    middle = torch.view_as_complex(x[..., 1:-1].unflatten(-1, (-1, 2)).contiguous()) / 2**0.5
    ends = (x[..., :1].to(middle.dtype), x[..., -1:].to(middle.dtype))
    return torch.fft.irfft(torch.cat((ends[0], middle, ends[1]), -1), x.shape[-1], norm="ortho")


class VidKVBody(Body):
    """Channels of large range at 2 bits, the others' spectrum at 1; V at three levels a channel."""

    def __init__(self, place: Place, method: VidKV):
        super().__init__(place)
        self.unit = method.group
        wide = round(place.head_dim * (method.k_bits - 1))
        narrow = place.head_dim - wide
        if narrow % 2 or not 0 < wide < place.head_dim:
            raise ValueError(
                f"k_bits must leave an even number of the head's {place.head_dim} channels at "
                f"1 bit and some at 2, got {method.k_bits}: {narrow} and {wide}"
            )
        self._wide = wide
        self.high = PackedSide(Grouping(2, "channel", method.group, method.form), wide)
        self.low = PackedSide(Grouping(1, "channel", method.group, method.form), narrow)
        self.v = PackedSide(
            Grouping("ternary", "channel", method.group, method.form), place.value_dim
        )
        for name, side in (("k.high", self.high), ("k.low", self.low), ("v", self.v)):
            self.stores |= {f"{name}.{part}": store for part, store in side.stores.items()}

    def append(self, k: Tensor, v: Tensor) -> None:
        k = k.float()
        if not self.tokens:  # the prompt says which; shared by heads and sequences, as published
            spread = k.amax((0, 1, 2)) - k.amin((0, 1, 2))
            order = spread.argsort(dim=0, descending=True, stable=True)
            parts = order[: self._wide].sort().values, order[self._wide :].sort().values
            self.constants["k.order"] = torch.cat(parts).to(torch.int16)
        order = self.constants["k.order"].long()
        k = k.index_select(3, order)
        self.high.append(k[..., : self._wide])
        self.low.append(fourier(k[..., self._wide :]))
        self.v.append(v)
        self.tokens += k.shape[2]

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.tokens if stop is None else stop
        parts = self.high.read(start, stop), inverse_fourier(self.low.read(start, stop))
        order = self.constants["k.order"].long()
        return torch.cat(parts, 3).index_select(3, order.argsort()), self.v.read(start, stop)

    def crop(self, tokens: int) -> None:
        for side in (self.high, self.low, self.v):
            side.cut(tokens)
        self.tokens = tokens


@dataclass(frozen=True)
class VidKV(Method):
    """K of 1.x bits and V of three levels, both per channel over ``group`` tokens.

    The share ``k_bits - 1`` of K's channels, those of largest range, has 2 bits; of the others the
    Fourier transform over channels has the sign and a mean magnitude.

    Attributes:
        k_bits: between 1 and 2.
        group: tokens that share a step.
        form: of steps and zeros, "fp16" or "fp8".
        heavy: share of the tokens that are protected.  The paper protects visual tokens that
            resemble the text; here they are those that the newest queries attend to.
    """

    k_bits: float = 1.5
    group: int = 32
    form: Form = "fp16"
    heavy: float = 0.0

    def body(self, place: Place) -> VidKVBody:
        return VidKVBody(place, self)
