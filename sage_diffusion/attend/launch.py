"""One row of the table of launches, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


class TableError(ValueError):
    """A file is no table of launches; the message says what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """The best launch of one kernel on one card.

    Attributes:
        gpu: PyTorch's name of the card, or the cost model's for a prediction ("rtx4090").
        triton: the version that compiled it; another one may want another launch.
        arch: "sm_89", "gfx942".
        backend: whose kernel.
        formats: of Q and K, P and V: "int8/fp8-fast".
        head_dim: padded, 64, 128 or 256.
        launch: values of the backend's :attr:`.Kernels.knobs`.
        source: "measured" or "predicted bound".
        value: milliseconds, or cycles of the predicted bound.
    """

    gpu: str
    triton: str
    arch: str
    backend: str
    formats: str
    head_dim: int
    launch: dict[str, int]
    source: str
    value: float

    @property
    def key(self) -> tuple[object, ...]:
        """Entries of the same key replace each other."""
        return self.gpu, self.triton, self.backend, self.formats, self.head_dim
