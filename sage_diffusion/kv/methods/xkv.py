"""xKV (Chang et al., 2503.18893): neighbouring layers share the coefficients of a subspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sage_diffusion.kv.method import Body, Method, Place
from sage_diffusion.kv.store import Store


@dataclass(frozen=True)
class XKV(Method):
    """The first ``rank`` right singular vectors of G layers' K (before RoPE), and of their V.

    The basis is that of the tokens that are compressed first, e.g. a prompt; later ones are
    projected on it.  Coefficients are stored once for the group, in the model's dtype.

    Attributes:
        group: layers G.
        k_rank, v_rank: shares of one layer's channels, for each layer of the group.
        unit: tokens that are compressed at once.
    """

    pre_rope = True

    group: int = 4
    k_rank: float = 0.5
    v_rank: float = 0.75
    unit: int = 128

    def body(self, place: Place) -> XKVBody:
        if self.group < 1 or not 0 < self.k_rank <= 1 or not 0 < self.v_rank <= 1:
            raise ValueError(
                "xkv must have at least one layer in a group and ranks above 0 up to 1, got "
                f"{self.group}, {self.k_rank} and {self.v_rank}"
            )
        return XKVBody(place, self)


@dataclass
class _Group:
    """What the layers of a group share.

    Attributes:
        members: bodies of its layers.
        done: tokens that are factored.
        factors: coefficients of K and of V.
    """

    members: list[XKVBody] = field(default_factory=list)
    done: int = 0
    factors: tuple[Store, Store] = field(default_factory=lambda: (Store(1), Store(1)))


class XKVBody(Body):
    """See :class:`XKV`.

    Until all layers of its group have brought a token, it stands as it came; so does all of a last
    group that has fewer layers.
    """

    def __init__(self, place: Place, method: XKV):
        super().__init__(place)
        self.unit, self.method = method.unit, method
        key = ("xkv", place.layer // method.group)
        self.group: _Group = place.shared.setdefault(key, _Group())
        self.group.members.append(self)
        self._waiting = (Store(1), Store(1))
        self.stores = {"k.waiting": self._waiting[0], "v.waiting": self._waiting[1]}
        if self.group.members[0] is self:  # counted, moved and reordered once
            self.stores |= {"k.factors": self.group.factors[0], "v.factors": self.group.factors[1]}

    def append(self, k: Tensor, v: Tensor) -> None:
        for store, x in zip(self._waiting, (k, v), strict=True):
            store.append(x.transpose(1, 2).flatten(2))
        self.tokens += k.shape[2]
        members = self.group.members
        if len(members) == self.method.group and len({body.tokens for body in members}) == 1:
            self._factor()

    def _factor(self) -> None:
        """Move what waits in all layers to the factors."""
        members, shares = self.group.members, (self.method.k_rank, self.method.v_rank)
        for side, share in enumerate(shares):
            joined = torch.cat([body._waiting[side].read() for body in members], 2)  # [B, n, G d]
            width = members[0]._waiting[side].read().shape[2]
            name = f"{'kv'[side]}.basis"
            if name not in self.constants:
                rank = max(1, round(share * width * len(members)))
                _basis(joined, rank, name, members)
            whole = torch.cat([body.constants[name] for body in members], 2).float()  # [B, r, G d]
            found = joined.float() @ whole.transpose(1, 2)
            self.group.factors[side].append(found.to(joined.dtype))
        for body in members:
            for store in body._waiting:
                store.clear()
        self.group.done = self.tokens

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop, done = self.tokens if stop is None else stop, self.group.done
        sides = []
        for side in range(2):
            parts = []
            if start < done:
                factors = self.group.factors[side].read(start, min(stop, done)).float()
                parts.append(factors @ self.constants[f"{'kv'[side]}.basis"].float())
            if stop > done:
                waiting = self._waiting[side].read(max(start - done, 0), stop - done)
                parts.append(waiting.float())
            x = torch.cat(parts, 1)
            sides.append(x.unflatten(2, (self.place.heads, -1)).transpose(1, 2))
        return sides[0], sides[1]

    def crop(self, tokens: int) -> None:
        for side in range(2):
            self._waiting[side].cut(max(tokens - self.group.done, 0))
            self.group.factors[side].cut(tokens)
        self.tokens, self.group.done = tokens, min(tokens, self.group.done)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        super().map(function)
        self.constants = {name: function(x) for name, x in self.constants.items()}


def _basis(joined: Tensor, rank: int, name: str, members: list[XKVBody]) -> None:
    """Eigenvectors of the Gram matrix ``X' X``, which are X's right singular vectors."""
    x = joined.double()
    vectors = torch.linalg.eigh(x.transpose(1, 2) @ x).eigenvectors[:, :, -rank:]
    rows = vectors.transpose(1, 2).to(joined.dtype)  # [B, r, G d]
    for body, part in zip(members, rows.chunk(len(members), 2), strict=True):
        body.constants[name] = part.contiguous()
