"""PrefixKV (Wang et al., 2412.03409): each layer keeps as many tokens as reach one common level."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sage_diffusion.kv import parts as _parts
from sage_diffusion.kv.calibration import Calibration
from sage_diffusion.kv.kept import pick
from sage_diffusion.kv.method import Body, ChoosesHeavy, Method, Place, Rotate
from sage_diffusion.kv.methods.lossless import Lossless
from sage_diffusion.kv.methods.xkv import XKV
from sage_diffusion.kv.parts import Part
from sage_diffusion.kv.store import Store


@dataclass(frozen=True)
class PrefixKV(Method):
    """Older tokens that the newest queries attend to least are evicted.

    Attributes:
        kept: mean share of the older tokens that stay.  With a calibration layers keep their share
            at one level of attention mass, without all keep this one.
        of: compresses those that stay; by default they are exact.
    """

    evicts = True
    heavy = 1.0  # the layer tells its body what the newest queries attend to

    kept: float = 0.5
    of: Method = field(default_factory=Lossless)

    @property
    def pre_rope(self) -> bool:  # type: ignore[override]
        return self.of.pre_rope

    def body(self, place: Place) -> PrefixBody:
        if not 0 < self.kept <= 1:
            raise ValueError(f"kept must be above 0 and at most 1, got {self.kept}")
        if self.of.evicts or isinstance(self.of, XKV):
            raise ValueError(
                "what is kept must be compressed by a method that evicts nothing and that looks at "
                f"one layer, as layers keep different tokens, got {type(self.of).__name__}"
            )
        share = self.kept
        if isinstance(place.calibration, Calibration):
            row = place.calibration.row(place.layer)
            share = float(place.calibration.ratios(self.kept)[row])
        of = self.of.body(place)
        if self.of.heavy and not isinstance(of, ChoosesHeavy):
            raise ValueError(f"{type(self.of).__name__} must keep no heavy hitters of its own here")
        return PrefixBody(place, share, of)


class PrefixBody(Body):
    """The kept tokens of one layer; evicted ones keep their place, as masks and positions need it.

    Attributes:
        attended: see :class:`sage_diffusion.kv.method.ChoosesHeavy`.
        of: the body of the kept tokens, one behind the other.
    """

    def __init__(self, place: Place, share: float, of: Body):
        super().__init__(place)
        self.share, self.of, self.unit = share, of, of.unit
        self.attended: Tensor | None = None
        self.stores = {"index": Store(1), **of.stores}
        self.constants = of.constants

    def append(self, k: Tensor, v: Tensor) -> None:
        count = k.shape[2]
        want = round(self.share * (self.tokens + count) / self.unit) * self.unit
        keep = min(max(want - self.stores["index"].length, 0), count)
        if self.attended is None:  # nothing is known: the newest stay
            index = torch.arange(count - keep, count, device=k.device).expand(k.shape[0], -1)
        else:
            index = self.attended.sum(1).topk(keep, 1).indices.sort(1).values
        self.stores["index"].append((index + self.tokens).int())
        if keep:
            if isinstance(self.of, ChoosesHeavy) and self.attended is not None:
                rows = index[:, None].expand(-1, k.shape[1], -1)
                self.of.attended = self.attended.gather(2, rows)
            self.of.append(pick(k, index), pick(v, index))
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

        def place(k: Tensor, start: int | Tensor) -> Tensor:
            assert rotate is not None and isinstance(start, int)
            return rotate(k, index[:, start : start + k.shape[2]].clamp(min=0))

        if not index.shape[1]:
            empty = q.new_zeros(*q.shape[:3], self.place.value_dim, dtype=torch.float32)
            return Part(empty, torch.full_like(empty[..., 0], -torch.inf))
        return self.of.attend(q, scale, columns, None if rotate is None else place)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "evicted tokens can't be read: a model must attend by scaled_dot_product_attention"
        )

    def crop(self, tokens: int) -> None:
        index = self.stores["index"].read()
        index.masked_fill_(index >= tokens, -1)
        count = int((index >= 0).sum(1).max()) if index.shape[1] else 0
        whole = -(-count // self.unit) * self.unit  # what is beyond stands for no token
        self.stores["index"].cut(whole)
        if self.of.tokens:
            self.of.crop(whole)
        self.tokens = tokens
