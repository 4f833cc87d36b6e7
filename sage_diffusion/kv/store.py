"""A tensor that grows along one axis."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Parked(NamedTuple):
    """A tensor's bytes, deflated, and what they were."""

    data: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


class Store:
    """Rows that are appended, cut off at the end, and moved, without copying all at each append.

    Room grows by at least an eighth, so appending costs O(new) on average and at most an eighth of
    the bytes are room for what comes.

    Args:
        axis: the one that grows; the batch is axis 0.
    """

    def __init__(self, axis: int = 2):
        self.axis, self.length = axis, 0
        self._data: Tensor | None = None
        self._parked: _Parked | None = None

    def append(self, rows: Tensor) -> None:
        """Copy ``rows`` behind what is there."""
        count = rows.shape[self.axis]
        data = self._reserve(rows, self.length + count)
        data.narrow(self.axis, self.length, count).copy_(rows)
        self.length += count

    def _reserve(self, like: Tensor, length: int) -> Tensor:
        old = self._data
        if old is not None and length <= old.shape[self.axis]:
            return old
        shape = list(like.shape)
        shape[self.axis] = length if old is None else max(length, old.shape[self.axis] * 9 // 8)
        self._data = torch.empty(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            kept = old.narrow(self.axis, 0, self.length)
            self._data.narrow(self.axis, 0, self.length).copy_(kept)
        return self._data

    def cut(self, length: int) -> None:
        """Keep the first ``length`` rows."""
        self.length = min(self.length, length)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A view of rows ``start`` to ``stop``.

        Raises:
            RuntimeError: it is parked and deflated.
            ValueError: nothing was appended yet.
        """
        if self._parked is not None:
            raise RuntimeError("what is parked must be unparked before it is used")
        if self._data is None:
            raise ValueError("a store must be filled before it is read")
        stop = self.length if stop is None else min(stop, self.length)
        return self._data.narrow(self.axis, start, max(stop - start, 0))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensor by ``function`` of its filled part, e.g. to move or to select."""
        if self._parked is not None or self._data is not None:
            self._data = function(self.read())

    def park(self, device: torch.device | str, level: int) -> None:
        """Move to ``device`` without room for what comes.

        Args:
            level: 0, or of zlib's deflate, 1 to 9: then the bytes lie in the host's memory.
        """
        if self._data is None:
            return
        filled = self.read()
        if not level:
            self._data = filled.to(device, copy=True).contiguous()
            return
        octets = filled.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        data = zlib.compress(octets, level)
        self._parked, self._data = _Parked(data, tuple(filled.shape), filled.dtype), None

    def unpark(self, device: torch.device | str) -> None:
        """Back on ``device``, bit for bit."""
        if self._parked is not None:
            data, shape, dtype = self._parked
            octets = torch.from_numpy(np.frombuffer(zlib.decompress(data), np.uint8).copy())
            self._data, self._parked = octets.view(dtype).view(shape).to(device), None
        elif self._data is not None:
            self._data = self._data.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, room for what comes included."""
        if self._parked is not None:
            return len(self._parked.data)
        return 0 if self._data is None else self._data.untyped_storage().nbytes()

    @property
    def used(self) -> int:
        """Bytes of the rows that are filled."""
        if self._parked is not None:
            return len(self._parked.data)
        return 0 if self._data is None else self.read().numel() * self._data.element_size()

    def clear(self) -> None:
        """Forget everything."""
        self._data, self._parked, self.length = None, None, 0


def select(index: Tensor) -> Callable[[Tensor], Tensor]:
    """For :meth:`Store.map`: rows of the batch by their number, as beam search reorders them."""

    def pick(x: Tensor) -> Tensor:
        at = index.to(x.device)
        if x.dtype == torch.float8_e4m3fn:  # which index_select does not know
            return x.view(torch.uint8).index_select(0, at).view(x.dtype)
        return x.index_select(0, at)

    return pick


def to(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """For :meth:`Store.map`: the same tensor on ``device``."""
    return lambda x: x.to(device)
