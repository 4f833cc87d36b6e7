"""MatryoshkaKV (Lin et al., 2410.14731): K and V of a head, rotated; first coordinates only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kv.allocation import allocate
from sage_diffusion.kv.calibration import GROUP, Calibration, CalibrationError
from sage_diffusion.kv.coefficients import BLOCK, WIDTHS, Coefficients
from sage_diffusion.kv.method import Body, Method, Place
from sage_diffusion.kv.store import Store


@dataclass(frozen=True)
class Matryoshka(Method):
    """Orthogonal projections of K (after RoPE) and V, a rank for each layer, head and side.

    The rotations are the calibration's principal components, or what training made of them, one for
    each KV head, so that GQA's saving stays.  Ranks are dealt out by one level over all layers,
    heads and sides: of energy, or of a trained calibration's estimate of what each rank costs.

    Attributes:
        kept: mean share of the channels that are kept.
        adaptive: ranks by what they lose; False: the same rank everywhere.
        width: bits of a coordinate, one of 2, 3, 4, 5, 6, 8, min-max over up to 128 tokens; None:
            in the model's dtype.
    """

    kept: float = 0.5
    adaptive: bool = True
    width: int | None = None

    def body(self, place: Place) -> MatryoshkaBody:
        if not isinstance(place.calibration, Calibration):
            raise CalibrationError("matryoshka needs a calibration of the model")
        if not 0 < self.kept <= 1:
            raise ValueError(f"kept must be above 0 and at most 1, got {self.kept}")
        if self.width is not None and self.width not in WIDTHS[1:]:
            raise ValueError(f"width must be one of {WIDTHS[1:]} or None, got {self.width}")
        return MatryoshkaBody(place, self)

    def ranks(self, calibration: Calibration) -> Tensor:
        """``[L, 2, H]`` int64."""
        key = "matryoshka", self.kept, self.adaptive
        return calibration.once(key, lambda: self._dealt_out(calibration))

    def _dealt_out(self, calibration: Calibration) -> Tensor:
        layers, sides, heads, dim = calibration.tensors["post.energy"].shape
        if not self.adaptive:
            return torch.full((layers, sides, heads), round(self.kept * dim))
        losses = _losses(calibration).flatten(0, 2)
        costs = torch.arange(dim + 1.0)
        return allocate(losses, costs, self.kept * dim * len(losses)).view(layers, sides, heads)


def _losses(calibration: Calibration) -> Tensor:
    """What the first 0 .. D coordinates of a head lose, ``[L, 2, H, D + 1]`` float64."""
    if "post.losses" in calibration.tensors:
        return calibration.tensors["post.losses"].double()
    energy = calibration.tensors["post.energy"].double()
    energy = energy / energy.sum((2, 3), keepdim=True)  # a side of a layer counts 1
    left = energy.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([left, torch.zeros_like(left[..., :1])], -1)


class MatryoshkaBody(Body):
    """See :class:`Matryoshka`; heads have stores of their own, as their ranks differ."""

    def __init__(self, place: Place, method: Matryoshka):
        super().__init__(place)
        self.unit = 1 if method.width is None else BLOCK
        calibration: Calibration = place.calibration
        row = calibration.row(place.layer)
        ranks = method.ranks(calibration)[row]  # [2, H]
        mean, basis = (calibration.tensors[f"post.{name}"][row] for name in ("mean", "basis"))
        self._heads: dict[str, Store | Coefficients] = {}
        for side in range(2):
            for head in range(place.heads):
                rank, name = int(ranks[side, head]), f"{'kv'[side]}{head}"
                if method.width is None or not rank:  # of no coordinates there are no codes
                    self._heads[name] = self.stores[f"{name}.coefficients"] = Store(1)
                else:
                    codes = Coefficients(torch.full((rank,), method.width), GROUP)
                    self._heads[name] = codes
                    self.stores |= {f"{name}.{kind}": x for kind, x in codes.stores.items()}
                self.constants[f"{name}.mean"] = mean[side, head].to(place.device, copy=True)
                self.constants[f"{name}.basis"] = basis[side, head, :, :rank].to(
                    place.device, copy=True, memory_format=torch.contiguous_format
                )

    def append(self, k: Tensor, v: Tensor) -> None:
        for side, x in (("k", k), ("v", v)):
            for head in range(self.place.heads):
                name = f"{side}{head}"
                centred = x[:, head].float() - self.constants[f"{name}.mean"].float()
                found = centred @ self.constants[f"{name}.basis"].float()
                into = self._heads[name]
                into.append(found.to(x.dtype) if isinstance(into, Store) else found)
        self.tokens += k.shape[2]

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.tokens if stop is None else stop
        sides = []
        for side in "kv":
            heads = []
            for head in range(self.place.heads):
                name = f"{side}{head}"
                mean, basis = (self.constants[f"{name}.{x}"].float() for x in ("mean", "basis"))
                heads.append(self._heads[name].read(start, stop).float() @ basis.T + mean)
            sides.append(torch.stack(heads, 1))
        return sides[0], sides[1]

    def crop(self, tokens: int) -> None:
        for head in self._heads.values():
            head.cut(tokens)
        self.tokens = tokens
