"""One side, K or V, of one layer's older tokens: codes in words, steps and zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width, bits
from sage_diffusion.kernels.kv.quantize import Axis, Form, decode, quantize
from sage_diffusion.kernels.kv.sides import Side
from sage_diffusion.kv.codes import pack, unpack
from sage_diffusion.kv.columns import Columns
from sage_diffusion.kv.store import Store


@dataclass(frozen=True)
class Grouping:
    """How one side is quantized: how many levels, and which elements share a step and a zero.

    Attributes:
        width: bits of a code, or "ternary".
        axis: "channel" for groups of ``size`` tokens of one channel, "token" for ``size`` channels
            of one token.
        size: elements of a group.
        form: of steps and zeros, "fp16" or "fp8".
    """

    width: Width
    axis: Axis
    size: int = 32
    form: Form = "fp16"

    def check(self, dim: int) -> None:
        """Raise ValueError unless there are such codes and channels divide into groups."""
        bits(self.width)
        if self.size < 1 or (self.axis == "token" and dim % self.size):
            raise ValueError(f"groups of {self.size} channels must divide the head's {dim}")

    @property
    def unit(self) -> int:
        """Tokens of a group."""
        return self.size if self.axis == "channel" else 1


class PackedSide:
    """Codes, steps and zeros of ``[B, H, T, D]``, appended group by group in O(new).

    Attributes:
        stores: ``codes`` words, ``steps`` and ``zeros``; the last is empty where zeros follow from
            the steps.
        dim: channels.
        largest: step of all that were appended.

    Args:
        room: where memory that is needed for a moment is shared, e.g. by all layers of a cache.
    """

    def __init__(self, grouping: Grouping, dim: int, room: dict[Any, Any] | None = None):
        grouping.check(dim)
        self._room = {} if room is None else room
        self.grouping, self.dim, self.tokens = grouping, dim, 0
        self.largest = 0.0
        self.stores = {"codes": Store(), "steps": Store(), "zeros": Store()}
        self._columns = Columns.of(grouping.width, dim)

    def append(self, x: Tensor) -> None:
        """Quantize ``x [B, H, n, D]``, whole groups."""
        g = self.grouping
        made = quantize(x, g.width, g.axis, g.size, g.form)
        if x.shape[2]:  # larger steps have larger codes in 8 bits, too
            step, _ = decode(made.step.amax(), None, g.width)
            self.largest = max(self.largest, float(step))
        self.stores["codes"].append(pack(made.codes, g.width))
        self.stores["steps"].append(made.step)
        if made.zero is not None:
            self.stores["zeros"].append(made.zero)
        self.tokens += x.shape[2]

    def _scales(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Steps and zeros, float32, of the groups that hold tokens ``start`` to ``stop``."""
        unit = self.grouping.unit
        first, last = start // unit, -(-stop // unit)
        zeros = self.stores["zeros"]
        zero = zeros.read(first, last) if zeros.length else None
        return decode(self.stores["steps"].read(first, last), zero, self.grouping.width)

    def side(self) -> Side:
        """As the kernels take it; views of what is there."""
        g, zeros = self.grouping, self.stores["zeros"]
        return Side(
            self.stores["codes"].read(),
            self.stores["steps"].read(),
            zeros.read() if zeros.length else None,
            g.width,
            g.axis,
            g.size,
            self.dim,
            self.tokens,
            self.largest,
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as float32 ``[B, H, n, D]``."""
        g = self.grouping
        codes = unpack(self.stores["codes"].read(start, stop), g.width, self.dim).float()
        step, zero = self._scales(start, stop)
        if g.axis == "token":
            grouped = codes.unflatten(3, (-1, g.size))
            return grouped.mul_(step[..., None]).add_(zero[..., None]).flatten(3)
        lead = start % g.size
        if lead == 0 and (stop - start) % g.size == 0:  # whole groups
            grouped = codes.unflatten(2, (-1, g.size))
            return grouped.mul_(step[:, :, :, None]).add_(zero[:, :, :, None]).flatten(2, 3)
        step, zero = (
            x.repeat_interleave(g.size, 2)[:, :, lead : lead + stop - start] for x in (step, zero)
        )
        return codes.mul_(step).add_(zero)

    def scores(self, q: Tensor, start: int, stop: int) -> Tensor:
        """``q . x`` for ``q [B, H, R, D]``, float32 ``[B, H, R, n]``, of a side in channel groups.

        The steps go into q, so that a code is only made a float; ``start`` begins a group.
        """
        g, n = self.grouping, stop - start
        codes = self._columns.floats(self.stores["codes"].read(start, stop), self._room)
        step, zero = self._scales(start, stop)  # [B, H, G, D]
        bias = q @ zero.transpose(2, 3)  # [B, H, R, G]
        rows, steps = self._columns.spread(q), self._columns.spread(step)
        scaled = rows[:, :, None] * steps[:, :, :, None]  # [B, H, G, R, C]
        if n % g.size:  # a group that is not read to its end
            codes = torch.nn.functional.pad(codes, (0, 0, 0, -n % g.size))
        grouped = codes.unflatten(2, (-1, g.size)).transpose(3, 4)
        found = torch.matmul(scaled, grouped) + bias.transpose(2, 3)[..., None]
        return found.transpose(2, 3).flatten(3)[..., :n]

    def weighted(self, p: Tensor, start: int, stop: int) -> Tensor:
        """``p @ x`` for ``p [B, H, R, n]``, float32 ``[B, H, R, D]``, of a side in token groups.

        Each group of channels has its own steps, which go into p; of each product with all codes
        the channels of its group are kept.
        """
        codes = self._columns.floats(self.stores["codes"].read(start, stop), self._room)
        scales = self._scales(start, stop)
        step, zero = (x.transpose(2, 3).contiguous() for x in scales)  # [B, H, G, n]
        rows, groups = p.shape[2], step.shape[2]
        scaled = (p[:, :, None] * step[:, :, :, None]).flatten(2, 3)  # [B, H, G R, n]
        product = self._columns.gather(scaled @ codes).unflatten(2, (groups, rows))
        own = product.unflatten(4, (groups, -1)).diagonal(dim1=2, dim2=4)  # [B, H, R, size, G]
        return (own.transpose(3, 4) + (p @ zero.transpose(2, 3))[..., None]).flatten(3)

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``, whole groups."""
        self.stores["codes"].cut(tokens)
        for name in ("steps", "zeros"):
            self.stores[name].cut(tokens // self.grouping.unit)
        self.tokens = tokens
