"""KIVI (Liu et al., 2402.02750): K in groups of tokens of one channel, V in groups of channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width
from sage_diffusion.kernels.kv.quantize import Form
from sage_diffusion.kernels.kv.sides import Turn
from sage_diffusion.kv import parts as _parts
from sage_diffusion.kv.decode import attend as attend_packed
from sage_diffusion.kv.decode import choose
from sage_diffusion.kv.method import Method, Place, Rotate, Rotation, TwoSided
from sage_diffusion.kv.packed import Grouping, PackedSide
from sage_diffusion.kv.parts import Part
from sage_diffusion.kv.split import SplitSide

#: Tokens whose codes are multiplied at once.
_TILE = 2048


class PackedBody(TwoSided):
    """K and V as two packed sides; with ``widths``, shares of K's channels have these.

    On a GPU the decode kernel attends to them, and turns K that was stored before RoPE.  Elsewhere
    attention to K in channel groups and V in token groups multiplies codes as they are: steps go
    into the queries and the weights.
    """

    k: PackedSide | SplitSide
    v: PackedSide

    def __init__(self, place: Place, k: Grouping, v: Grouping, widths: tuple[Width, ...] = ()):
        super().__init__(
            place,
            SplitSide(k, widths, place.head_dim, place.shared)
            if widths
            else PackedSide(k, place.head_dim, place.shared),
            PackedSide(v, place.value_dim, place.shared),
        )
        self.unit = max(k.unit, v.unit)
        if self.unit % k.unit or self.unit % v.unit:
            raise ValueError(f"groups of {k.unit} and {v.unit} tokens must divide one another")

    def append(self, k: Tensor, v: Tensor) -> None:
        super().append(k, v)
        if isinstance(self.k, SplitSide) and self.k.order is not None:
            self.constants["k.order"] = self.k.order

    def attend(
        self, q: Tensor, scale: float, mask: Tensor | None = None, rotate: Rotate | None = None
    ) -> Part:
        axes = self.k.grouping.axis, self.v.grouping.axis
        if q.device.type != "cpu" and isinstance(self.k, PackedSide):
            k, v, turn = self.k.side(), self.v.side(), _turn(rotate)
            known = rotate is None or turn is not None
            if known and choose(q, k, v, before_rope=turn is not None) != "torch":
                return attend_packed(q, k, v, scale, mask, turn)
        if rotate is not None or axes != ("channel", "token"):
            return super().attend(q, scale, mask, rotate)
        rows = _parts.grouped(q, self.place.heads) * scale
        found = []
        step = _TILE // self.unit * self.unit or self.unit
        for start in range(0, self.tokens, step):
            stop = min(start + step, self.tokens)

            def values(p: Tensor, start: int = start, stop: int = stop) -> Tensor:
                return self.v.weighted(p, start, stop)

            scores = self.k.scores(rows, start, stop)
            seen = _parts.columns(mask, start, stop)
            found.append(_parts.weigh(scores, seen, q.shape[1], values))
        return _parts.merge(found)


def _turn(rotate: Rotate | None) -> Turn | None:
    return rotate.turn() if isinstance(rotate, Rotation) else None


@dataclass(frozen=True)
class Kivi(Method):
    """Uniform codes, K per channel over ``group`` tokens and V per token over ``group`` channels.

    Attributes:
        k_bits, v_bits: 8, 4, 3, 2, "ternary" or 1; several for K: of equal shares of a head's
            channels, from those of the largest range down.
        group: elements that share a step and a zero.
        form: of steps and zeros, "fp16" or "fp8".
        pre_rope: whether K is compressed as it was before RoPE, where its channels keep to
            themselves.
    """

    k_bits: Width | tuple[Width, ...] = 2
    v_bits: Width = 2
    group: int = 32
    form: Form = "fp16"
    pre_rope: bool = False

    def body(self, place: Place) -> PackedBody:
        widths = self.k_bits if isinstance(self.k_bits, tuple) else ()
        k_bits = widths[0] if isinstance(self.k_bits, tuple) else self.k_bits
        k = Grouping(k_bits, "channel", self.group, self.form)
        v = Grouping(self.v_bits, "token", self.group, self.form)
        return PackedBody(place, k, v, widths)
