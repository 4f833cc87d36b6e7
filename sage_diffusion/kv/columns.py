"""Codes out of words byte by byte: the order that costs a CPU least."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width, bits, pack


@dataclass(frozen=True, eq=False)
class Columns:
    """The codes of a token's words in the order of bytes, and which channels these are.

    A matrix product does not care in which order its sum is taken: instead of putting codes into
    the order of their channels, the few rows that they are multiplied with are put into theirs.

    Attributes:
        width: bits of a code, or "ternary".
        dim: channels D.
        channel: ``[C]`` int64, the channel of each column, D where it is padding; C >= D.
        column: ``[D]`` int64, the column of each channel.
    """

    width: Width
    dim: int
    channel: Tensor
    column: Tensor

    @staticmethod
    @lru_cache(maxsize=64)
    def of(width: Width, dim: int) -> Columns:
        """For heads of ``dim`` channels, found by packing each channel alone."""
        one_hot = torch.eye(dim, dtype=torch.uint8)
        columns = _split(pack(one_hot, width), width)  # [D, C]
        channel = torch.where((columns > 0).any(0), columns.argmax(0), dim)
        return Columns(width, dim, channel, columns.argmax(1))

    def split(self, words: Tensor) -> Tensor:
        """Codes uint8 ``[.., C]`` of words int32 ``[.., W]``."""
        return _split(words, self.width)

    def floats(self, words: Tensor, room: dict[Any, Any]) -> Tensor:
        """:meth:`split` as float32, in memory that the next call with this ``room`` writes anew.

        Memory that is mapped and given back for each tile costs as much as all arithmetic.
        """
        shape = (*words.shape[:-1], len(self.channel))
        size, key = math.prod(shape), ("kv.columns", words.device)
        if key not in room or room[key].numel() < size:
            room[key] = torch.empty(size, device=words.device)
        out: Tensor = room[key][:size].view(shape)
        p = bits(self.width)
        if p == 8:
            return out.copy_(self.split(words))
        for part, codes in zip(
            out.chunk(4 if p == 3 else 8 // p, -1), _parts(words, p), strict=True
        ):
            part.copy_(codes)
        return out

    def spread(self, x: Tensor) -> Tensor:
        """``[.., D]`` in the order of columns ``[.., C]``, zero at padding."""
        padded = torch.nn.functional.pad(x, (0, 1)) if len(self.channel) > self.dim else x
        return padded.index_select(-1, self.channel.to(x.device))

    def gather(self, x: Tensor) -> Tensor:
        """``[.., C]`` in the order of channels ``[.., D]``."""
        return x.index_select(-1, self.column.to(x.device))


def _split(words: Tensor, width: Width) -> Tensor:
    """Parts of each byte, one behind the other: all lowest, then all next, .."""
    p = bits(width)
    return words.contiguous().view(torch.uint8) if p == 8 else torch.cat(list(_parts(words, p)), -1)


def _parts(words: Tensor, p: int) -> Iterator[Tensor]:
    """``[.., W]`` int32 -> the uint8 parts of :func:`_split`."""
    if p == 3:
        yield from _three(words)
        return
    octets = words.contiguous().view(torch.uint8)
    for shift in range(0, 8, p):
        shifted = octets >> shift if shift else octets
        yield shifted if shift == 8 - p else shifted & ((1 << p) - 1)


def _three(words: Tensor) -> Iterator[Tensor]:
    """Codes of 3 bits, four bytes at a time; a word of single bits holds two words of pairs'."""
    blocks = words.shape[-1] // 3
    low, high = words.split([2 * blocks, blocks], -1)
    low = low.contiguous()
    high = torch.stack((high, high >> 1), -1).flatten(-2)  # a bit beside each pair of bits
    for n in range(4):
        top = high << 2 if n == 0 else high >> (2 * n - 2)
        codes = ((low >> (2 * n)) & 0x03030303).bitwise_or_(top & 0x04040404)
        yield codes.view(torch.uint8)
