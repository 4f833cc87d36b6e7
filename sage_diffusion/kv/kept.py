"""Tokens of a body that have a better copy of their own: heavy hitters, and what is not finite."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sage_diffusion.kv import parts as _parts
from sage_diffusion.kv.method import Place
from sage_diffusion.kv.packed import Grouping, PackedSide
from sage_diffusion.kv.parts import Part
from sage_diffusion.kv.store import Store

#: Queries whose attention says which tokens are heavy, and rows of the matrix that it takes.
QUERIES = 64

#: Beyond it steps and zeros of 16 bits overflow.
LARGEST = 6e4


class Kept(ABC):
    """Some tokens of the body, of each sequence as many.

    Attributes:
        stores: ``index`` int32 ``[B, n]``, a token's number in the body, ascending, -1 where a
            sequence has none; and what the subclass keeps.
    """

    def __init__(self) -> None:
        self.stores = {"index": Store(1)}

    @abstractmethod
    def append(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep ``k, v [B, H, n, D]`` of tokens ``index [B, n]`` of the body, behind all others."""

    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor]:
        """K (after RoPE) and V of all, ``[B, H, n, D]``."""

    @abstractmethod
    def _cut(self, count: int) -> None:
        """Keep the first ``count`` of each sequence."""

    def __len__(self) -> int:
        return self.stores["index"].length

    @property
    def index(self) -> Tensor:
        """``[B, n]`` int64."""
        return self.stores["index"].read().long()

    def crop(self, tokens: int) -> None:
        """Forget those from the body's token ``tokens`` on."""
        if not len(self):
            return
        index = self.stores["index"].read()
        index.masked_fill_(index >= tokens, -1)
        count = int((index >= 0).sum(1).max())
        self.stores["index"].cut(count)
        self._cut(count)

    def hide(self, hidden: Tensor) -> None:
        """Mark in ``hidden [B, T + 1]``, whose last column nobody reads."""
        hidden.scatter_(1, self.index.where(self.index >= 0, hidden.shape[1] - 1), True)

    def attend(self, q: Tensor, scale: float, mask: Tensor | None) -> Part:
        """Attention over these tokens; ``mask`` is over the body's."""
        index = self.index
        columns = _parts.chosen(mask, index.clamp(min=0))
        missing = (index < 0)[:, None, None]
        if missing.any():
            none = _parts.as_bias(~missing)
            columns = none if columns is None else _parts.as_bias(columns) + none
        k, v = self.values()
        return _parts.attend(q, k, v, scale, columns)

    def overlay(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The body's K and V from token ``start`` on, with these tokens in their places."""
        index = self.index - start
        inside = (index >= 0) & (index < k.shape[2])
        if not inside.any():
            return k, v
        row, at = inside.nonzero(as_tuple=True)
        sides = []
        for side, better in zip((k, v), self.values(), strict=True):
            side = side.clone()
            side[row, :, index[row, at]] = better[row, :, at].to(side.dtype)
            sides.append(side)
        return sides[0], sides[1]


class Exact(Kept):
    """Tokens as they came."""

    def __init__(self) -> None:
        super().__init__()
        self.stores |= {"k": Store(), "v": Store()}

    def append(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        self.stores["index"].append(index.int())
        self.stores["k"].append(k)
        self.stores["v"].append(v)

    def values(self) -> tuple[Tensor, Tensor]:
        return self.stores["k"].read(), self.stores["v"].read()

    def _cut(self, count: int) -> None:
        self.stores["k"].cut(count)
        self.stores["v"].cut(count)


class Heavy(Kept):
    """Tokens in 8 bits, one step and zero for each token and head."""

    def __init__(self, place: Place):
        super().__init__()
        self._k = PackedSide(Grouping(8, "token", place.head_dim), place.head_dim)
        self._v = PackedSide(Grouping(8, "token", place.value_dim), place.value_dim)
        for name, side in (("k", self._k), ("v", self._v)):
            self.stores |= {f"{name}.{part}": store for part, store in side.stores.items()}

    def append(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        self.stores["index"].append(index.int())
        self._k.append(k)
        self._v.append(v)

    def values(self) -> tuple[Tensor, Tensor]:
        return self._k.read(0, len(self)), self._v.read(0, len(self))

    def _cut(self, count: int) -> None:
        self._k.cut(count)
        self._v.cut(count)


def importance(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, lse: Tensor) -> Tensor:
    """How much the newest queries attend to some tokens: ``[B, H, T]`` float32.

    Errors of V enter the output's error squared, so probabilities are squared before they are
    summed over queries.

    Args:
        q: ``[B, Hq, L, D]``; the last :data:`QUERIES` rows count.
        k: ``[B, H, T, D]`` of the tokens in question.
        mask: over them.
        lse: ``[B, Hq, L]``, the log of each row's whole normalizer, all other tokens included.
    """
    rows = slice(-QUERIES, None)
    scores = (_parts.grouped(q[:, :, rows], k.shape[1]) * scale) @ k.float().transpose(2, 3)
    scores = scores.view(*q.shape[:2], -1, k.shape[2])
    if mask is not None:
        scores = scores + _parts.as_bias(mask if mask.shape[2] == 1 else mask[:, :, rows])
    weights = scores.sub_(lse[:, :, rows, None].clamp(min=-1e30)).exp_().square_().sum(2)
    return weights.unflatten(1, (k.shape[1], -1)).sum(2)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index [B, n]`` of ``values [B, H, T, D]``."""
    shape = (-1, values.shape[1], -1, values.shape[3])
    return values.gather(2, index[:, None, :, None].expand(shape))


def unfit(k: Tensor, v: Tensor) -> Tensor:
    """Tokens ``[n]`` (int64) that no code can stand for: not finite, or too large, in any row."""
    fit = [(x.abs().amax((0, 1, 3)) <= LARGEST) for x in (k, v)]
    return (~(fit[0] & fit[1])).nonzero()[:, 0]


def without(x: Tensor, tokens: Tensor) -> Tensor:
    """``x [B, H, n, D]`` with the mean of all other tokens in the place of these."""
    good = torch.ones(x.shape[2], dtype=torch.bool, device=x.device)
    good[tokens] = False
    mean = x[:, :, good].mean(2, keepdim=True) if good.any() else torch.zeros_like(x[:, :, :1])
    return torch.where(good[:, None], x, mean)
