"""A tensor that grows along one axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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

    def append(self, rows: Tensor) -> None:
        """Copy ``rows`` behind what is there."""
        count = rows.shape[self.axis]
        self._reserve(rows, self.length + count)
        assert self._data is not None
        self._data.narrow(self.axis, self.length, count).copy_(rows)
        self.length += count

    def _reserve(self, like: Tensor, length: int) -> None:
        old = self._data
        if old is not None and length <= old.shape[self.axis]:
            return
        shape = list(like.shape)
        shape[self.axis] = length if old is None else max(length, old.shape[self.axis] * 9 // 8)
        self._data = like.new_empty(shape)
        if old is not None:
            kept = old.narrow(self.axis, 0, self.length)
            self._data.narrow(self.axis, 0, self.length).copy_(kept)

    def cut(self, length: int) -> None:
        """Keep the first ``length`` rows."""
        self.length = min(self.length, length)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """A view of rows ``start`` to ``stop``.

        Raises:
            ValueError: nothing was appended yet.
        """
        if self._data is None:
            raise ValueError("a store must be filled before it is read")
        stop = self.length if stop is None else min(stop, self.length)
        return self._data.narrow(self.axis, start, max(stop - start, 0))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensor by ``function`` of its filled part, e.g. to move or to select."""
        if self._data is not None:
            self._data = function(self.read())

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, room for what comes included."""
        return 0 if self._data is None else self._data.untyped_storage().nbytes()

    @property
    def used(self) -> int:
        """Bytes of the rows that are filled."""
        return 0 if self._data is None else self.read().numel() * self._data.element_size()

    def clear(self) -> None:
        """Forget everything."""
        self._data, self.length = None, 0


def select(index: Tensor) -> Callable[[Tensor], Tensor]:
    """For :meth:`Store.map`: rows of the batch by their number, as beam search reorders them."""
    return lambda x: x.index_select(0, index.to(x.device))


def to(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """For :meth:`Store.map`: the same tensor on ``device``, without room for what comes."""
    return lambda x: x.to(device, copy=True) if x.device != torch.device(device) else x
