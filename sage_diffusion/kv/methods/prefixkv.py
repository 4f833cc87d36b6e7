"""PrefixKV (Wang et al., 2412.03409): each layer keeps as many tokens as reach one common level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kv import parts as _parts
from sage_diffusion.kv.calibration import Calibration
from sage_diffusion.kv.method import Body, Method, Place, Rotate
from sage_diffusion.kv.parts import Part
from sage_diffusion.kv.store import Store


@dataclass(frozen=True)
class PrefixKV(Method):
    """Older tokens that the newest queries attend to least are evicted; kept ones stay exact.

    Attributes:
        kept: mean share of the older tokens that stay.  With a calibration layers keep their share
            at one level of attention mass, without all keep this one.
    """

    evicts = True
    heavy = 1.0  # the layer tells its body what the newest queries attend to

    kept: float = 0.5

    def body(self, place: Place) -> PrefixBody:
        if not 0 < self.kept <= 1:
            raise ValueError(f"kept must be above 0 and at most 1, got {self.kept}")
        share = self.kept
        if isinstance(place.calibration, Calibration):
            row = place.calibration.row(place.layer)
            share = float(place.calibration.ratios(self.kept)[row])
        return PrefixBody(place, share)


class PrefixBody(Body):
    """The kept tokens of one layer; evicted ones keep their place, as masks and positions need it.

    Attributes:
        attended: see :class:`sage_diffusion.kv.method.ChoosesHeavy`.
    """

    def __init__(self, place: Place, share: float):
        super().__init__(place)
        self.share = share
        self.attended: Tensor | None = None
        self.stores = {"index": Store(1), "k": Store(), "v": Store()}

    def append(self, k: Tensor, v: Tensor) -> None:
        count = k.shape[2]
        keep = round(self.share * (self.tokens + count)) - self.stores["index"].length
        keep = min(max(keep, 0), count)
        if self.attended is None:  # nothing is known: the newest stay
            index = torch.arange(count - keep, count, device=k.device).expand(k.shape[0], -1)
        else:
            index = self.attended.sum(1).topk(keep, 1).indices.sort(1).values
        rows = index[:, None, :, None].expand(-1, k.shape[1], -1, -1)
        self.stores["index"].append((index + self.tokens).int())
        for name, x in (("k", k), ("v", v)):
            self.stores[name].append(x.gather(2, rows.expand(-1, -1, -1, x.shape[3])))
        self.attended = None
        self.tokens += count

    def attend(
        self, q: Tensor, scale: float, mask: Tensor | None = None, rotate: Rotate | None = None
    ) -> Part:
        index = self.stores["index"].read().long()
        missing = (index < 0)[:, None, None]
        columns = _parts.chosen(mask, index.clamp(min=0))
        if missing.any():
            none = _parts.as_bias(~missing)
            columns = none if columns is None else _parts.as_bias(columns) + none
        return _parts.attend(q, self.stores["k"].read(), self.stores["v"].read(), scale, columns)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "evicted tokens can't be read: a model must attend by scaled_dot_product_attention"
        )

    def crop(self, tokens: int) -> None:
        index = self.stores["index"].read()
        index.masked_fill_(index >= tokens, -1)
        count = int((index >= 0).sum(1).max())
        for store in self.stores.values():
            store.cut(count)
        self.tokens = tokens
