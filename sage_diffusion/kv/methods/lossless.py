"""No compression: what every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sage_diffusion.kv.method import Body, Method, Place
from sage_diffusion.kv.store import Store


class LosslessBody(Body):
    """K and V as they come."""

    def __init__(self, place: Place):
        super().__init__(place)
        self.stores = {"k.exact": Store(), "v.exact": Store()}

    def append(self, k: Tensor, v: Tensor) -> None:
        self.stores["k.exact"].append(k)
        self.stores["v.exact"].append(v)
        self.tokens += k.shape[2]

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.tokens if stop is None else stop
        return self.stores["k.exact"].read(start, stop), self.stores["v.exact"].read(start, stop)

    def crop(self, tokens: int) -> None:
        for store in self.stores.values():
            store.cut(tokens)
        self.tokens = tokens


@dataclass(frozen=True)
class Lossless(Method):
    """Bit for bit what the model computed."""

    exact = True

    def body(self, place: Place) -> LosslessBody:
        return LosslessBody(place)
