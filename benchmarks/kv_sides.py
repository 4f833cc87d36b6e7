"""Rows of ``benchmarks.kv`` for one side: three levels of V, half of K's rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width
from sage_diffusion.kv.calibration import Calibration, CalibrationError
from sage_diffusion.kv.coefficients import TokenCodes
from sage_diffusion.kv.method import Method, Place, TwoSided
from sage_diffusion.kv.store import Store


class Exact:
    """``[B, H, n, D]`` as it is."""

    def __init__(self) -> None:
        self.stores = {"numbers": Store()}

    def append(self, x: Tensor) -> None:
        self.stores["numbers"].append(x)

    def read(self, start: int, stop: int) -> Tensor:
        return self.stores["numbers"].read(start, stop)

    def cut(self, tokens: int) -> None:
        self.stores["numbers"].cut(tokens)


class Projected(Exact):
    """The first coordinates of all heads together, in a calibration's basis.

    Args:
        mean, back: ``[d]`` and ``[d, d]`` float32; rows of ``back`` are directions.
        kept: ``[r]``, those that are stored.
    """

    def __init__(self, mean: Tensor, back: Tensor, kept: Tensor, heads: int):
        super().__init__()
        self.mean, self.back, self.heads = mean, back[kept], heads
        self.into = torch.linalg.inv(back)[:, kept]

    def append(self, x: Tensor) -> None:
        flat = x.float().transpose(1, 2).flatten(2)
        super().append(((flat - self.mean) @ self.into)[:, None].to(x.dtype))

    def read(self, start: int, stop: int) -> Tensor:
        flat = super().read(start, stop)[:, 0].float() @ self.back + self.mean
        return flat.unflatten(2, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class ValuesOnly(Method):
    """K exact, V of few levels, min-max over a token's channels."""

    v_width: Width
    v_group: int = 64

    def body(self, place: Place) -> TwoSided:
        return TwoSided(place, Exact(), TokenCodes(self.v_width, self.v_group, place.value_dim))


@dataclass(frozen=True)
class LowRankKeys(Method):
    """A share of K's directions before RoPE, those that count most, as numbers; V of few levels."""

    pre_rope = True

    share: float
    v_width: Width
    v_group: int = 32

    def body(self, place: Place) -> TwoSided:
        if not isinstance(place.calibration, Calibration):
            raise CalibrationError("low-rank keys need a calibration of the model")
        codes, scale, mean = place.calibration.back(place.layer, "joint")
        weights = place.calibration.tensors["joint.weights"][place.calibration.row(place.layer)]
        kept = weights.topk(round(self.share * weights.numel())).indices
        back = codes.float() * scale.float()[:, None]
        k = Projected(mean.float(), back, kept, place.heads)
        made = TwoSided(place, k, TokenCodes(self.v_width, self.v_group, place.value_dim))
        made.constants["k.basis"] = codes[kept]
        return made
