"""KIVI (Liu et al., 2402.02750): K in groups of tokens of one channel, V in groups of channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sage_diffusion.kv.method import Body, Method, Place
from sage_diffusion.kv.packed import Groups, PackedSide


class KiviBody(Body):
    """K per channel, V per token, uniform levels between each group's extremes."""

    def __init__(self, place: Place, k: Groups, v: Groups):
        super().__init__(place)
        k.check(place.head_dim)
        v.check(place.value_dim)
        self.unit = k.size
        self.k, self.v = PackedSide(k), PackedSide(v)
        self.stores = {f"k.{name}": store for name, store in self.k.stores.items()}
        self.stores |= {f"v.{name}": store for name, store in self.v.stores.items()}

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k.append(k)
        self.v.append(v)
        self.tokens += k.shape[2]

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.tokens if stop is None else stop
        return self.k.read(start, stop), self.v.read(start, stop)

    def crop(self, tokens: int) -> None:
        self.k.cut(tokens)
        self.v.cut(tokens)
        self.tokens = tokens


@dataclass(frozen=True)
class Kivi(Method):
    """Uniform codes, K per channel over ``group`` tokens and V per token over ``group`` channels.

    Attributes:
        k_bits, v_bits: 1 to 8.
        group: elements that share a step and a zero, FP16 each.
    """

    k_bits: int = 2
    v_bits: int = 2
    group: int = 32

    def body(self, place: Place) -> KiviBody:
        k = Groups(self.k_bits, "channel", self.group)
        return KiviBody(place, k, Groups(self.v_bits, "token", self.group))
