"""GEAR (2403.05527): what quantization leaves, as a matrix of low rank and few outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width
from sage_diffusion.kernels.kv.quantize import Form
from sage_diffusion.kv.method import Method, Place, TwoSided
from sage_diffusion.kv.packed import Axis, Grouping, PackedSide
from sage_diffusion.kv.store import Store


class _Piece(NamedTuple):
    """Tokens that came at once, and where their factors and outliers begin in the stores."""

    start: int
    stop: int
    kind: str
    left: int
    right: int
    outliers: int
    each: int


class _Side:
    """K or V: codes, and for each piece factors ``[B, H, n, r]``, ``[B, H, r, D]`` and outliers.

    An outlier of K is one of a channel's tokens, of V one of a token's channels of all heads.
    """

    def __init__(self, method: Gear, place: Place, axis: Axis, dim: int, width: Width):
        self.method, self.axis, self.dim, self.heads = method, axis, dim, place.heads
        self.codes = PackedSide(Grouping(width, axis, method.group, method.form), dim)
        self.stores = dict(self.codes.stores)
        for kind in ("prompt", "decode"):
            self.stores |= {f"{kind}.left": Store(), f"{kind}.right": Store()}
        self.stores |= {"outliers": Store(1), "outliers.index": Store(1)}
        self.pieces: list[_Piece] = []

    def append(self, x: Tensor) -> None:
        start, stop = self.codes.tokens, self.codes.tokens + x.shape[2]
        kind = "decode" if self.pieces else "prompt"
        rank = self.method.rank if self.pieces else self.method.prompt_rank
        left, right = (self.stores[f"{kind}.{side}"] for side in ("left", "right"))
        at = left.length, right.length, self.stores["outliers"].length
        x = x.float()
        filled, outlier, count = self._take_outliers(x)
        self.codes.append(filled)
        error = (x - self.codes.read(start, stop)).masked_fill(outlier, 0)
        for store, factor in zip(
            (left, right), low_rank(error, rank, self.method.loops), strict=True
        ):
            store.append(factor.half())
        self.pieces.append(_Piece(start, stop, kind, *at, count))

    def _rows(self, x: Tensor) -> Tensor:
        """What outliers are sought in: a channel's tokens, or a token's channels of all heads."""
        return x.transpose(2, 3) if self.axis == "channel" else x.transpose(1, 2).flatten(2)

    def _back(self, rows: Tensor) -> Tensor:
        if self.axis == "channel":
            return rows.transpose(2, 3)
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _take_outliers(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """``x`` with its rows' extremes replaced by the mean, where they were, how many a row."""
        rows = self._rows(x)
        each = int(rows.shape[-1] * self.method.outliers / 2)
        index = torch.cat((rows.topk(each).indices, rows.topk(each, largest=False).indices), -1)
        outlier = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, index, True)
        filled = torch.where(outlier, rows.mean(-1, keepdim=True), rows)
        if each:
            values = rows.gather(-1, index).flatten(1)
            self.stores["outliers"].append(values.half())
            self.stores["outliers.index"].append(index.flatten(1).int())
        return self._back(filled), self._back(outlier), 2 * each

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as float32 ``[B, H, n, D]``."""
        x = self.codes.read(start, stop)
        for piece in self.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = x[:, :, first - start : last - start]
                part += self._low_rank(piece, first, last)
                self._put_outliers(piece, part, first)
        return x

    def _low_rank(self, piece: _Piece, first: int, last: int) -> Tensor:
        offset = piece.left - piece.start
        left = self.stores[f"{piece.kind}.left"].read(first + offset, last + offset)
        right = self.stores[f"{piece.kind}.right"].read(piece.right, piece.right + left.shape[3])
        return left.float() @ right.float()

    def _put_outliers(self, piece: _Piece, part: Tensor, first: int) -> None:
        """Write the outliers of a piece into ``part``, its tokens from ``first`` on."""
        if not piece.each:
            return
        at = piece.outliers, piece.outliers + piece.each * self._row_count(piece)
        values, index = (
            self.stores[name].read(*at).unflatten(1, (-1, piece.each))
            for name in ("outliers", "outliers.index")
        )
        rows, offset = self._rows(part), first - piece.start
        if self.axis == "channel":
            index = index - offset
            inside = (index >= 0) & (index < rows.shape[-1])
            index = index.where(inside, rows.shape[-1]).unflatten(1, rows.shape[1:3])
            values = values.unflatten(1, rows.shape[1:3])
        else:
            values, index = (x[:, offset : offset + rows.shape[1]] for x in (values, index))
        wider = torch.nn.functional.pad(rows, (0, 1))  # what is not inside goes there
        wider.scatter_(-1, index.long(), values.float())
        part.copy_(self._back(wider[..., :-1]))

    def _row_count(self, piece: _Piece) -> int:
        return self.heads * self.dim if self.axis == "channel" else piece.stop - piece.start

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``, whole groups."""
        self.codes.cut(tokens)
        kept = [piece for piece in self.pieces if piece.start < tokens]
        self.pieces = [piece._replace(stop=min(piece.stop, tokens)) for piece in kept]
        ends = {name: 0 for name in self.stores if name not in self.codes.stores}
        for piece in self.pieces:
            rank = self.method.prompt_rank if piece.kind == "prompt" else self.method.rank
            ends[f"{piece.kind}.left"] = piece.left + piece.stop - piece.start
            ends[f"{piece.kind}.right"] = piece.right + rank
            end = piece.outliers + piece.each * self._row_count(piece)
            ends["outliers"] = ends["outliers.index"] = end
        for name, end in ends.items():
            self.stores[name].cut(end)


def low_rank(x: Tensor, rank: int, loops: int) -> tuple[Tensor, Tensor]:
    """``x [B, H, n, D] ~= left [B, H, n, r] @ right [B, H, r, D]`` by power iteration.

    Starts from the same random directions each time, so a run can be repeated.
    """
    start = torch.randn(x.shape[3], rank, generator=torch.Generator().manual_seed(0))
    right = start.to(x.device).expand(*x.shape[:2], -1, -1)
    left = x.new_zeros(*x.shape[:3], rank)
    if rank == 0:
        return left, right.transpose(2, 3)
    for loop in range(loops):
        if loop == loops - 1:
            right = torch.linalg.qr(right).Q
        left = x @ right
        if loop == loops - 1:
            left = torch.linalg.qr(left).Q
        right = x.transpose(2, 3) @ left
    return left, right.transpose(2, 3)


class GearBody(TwoSided):
    """Two sides of codes, factors and outliers."""

    def __init__(self, place: Place, method: Gear):
        if method.unit % method.group or method.unit < max(method.rank, 1):
            raise ValueError(
                f"unit must be a multiple of the group, {method.group}, and at least the rank, "
                f"{method.rank}, got {method.unit}"
            )
        if max(method.rank, method.prompt_rank) > min(place.head_dim, place.value_dim, method.unit):
            raise ValueError(
                f"ranks must be at most the unit and the head's channels, got {method.rank} and "
                f"{method.prompt_rank} of {method.unit} tokens and {place.head_dim} channels"
            )
        super().__init__(
            place,
            _Side(method, place, "channel", place.head_dim, method.k_bits),
            _Side(method, place, "token", place.value_dim, method.v_bits),
        )
        self.unit = method.unit


@dataclass(frozen=True)
class Gear(Method):
    """KIVI's codes, the largest and smallest elements exact, and a low rank of what is left.

    Attributes:
        k_bits, v_bits: of codes.
        group: tokens (K) or channels (V) that share a step and a zero.
        unit: tokens that are compressed at once while decoding, with factors of their own.
        prompt_rank, rank: of the factors of what comes first, and of each later unit.
        outliers: share of each channel's tokens (K) and each token's channels (V) that are exact.
        loops: of the power iteration.
        form: of steps and zeros, "fp16" or "fp8".
    """

    k_bits: Width = 2
    v_bits: Width = 2
    group: int = 32
    unit: int = 64
    prompt_rank: int = 4
    rank: int = 2
    outliers: float = 0.02
    loops: int = 3
    form: Form = "fp16"

    def body(self, place: Place) -> GearBody:
        return GearBody(place, self)
