"""Scores of latents and codes that are not computed unless somebody looks at them.

Tokenizers of other libraries write the whole latents x codes matrix and take its ``argmin``.  While
:class:`LazyScores` is active, the products and distances that such a quantizer starts with become
:class:`Scores`, which know latents, codes and what was added; the ``argmin`` asks the nearest-code
search.  Whatever else is done with them is done with the real matrix, so that results never depend
on whether a line of somebody's code is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sage_diffusion.kernels.vq.terms import Terms, terms
from sage_diffusion.vq.codes import best_code


class Scores:
    """``factor * (z . c) + row + column``, or the distances ``|z - c|``, of shape ``[.., N, K]``.

    Args:
        z: latents ``[.., N, D]``; None of a sum of row and column alone.
        table: codes ``[K, D]``.
        real: computes the matrix.
        factor: of the products; 0 of distances.
        row, column: ``[.., N, 1]`` and ``[K]``, or None for zeros.
    """

    def __init__(
        self,
        z: Tensor | None,
        table: Tensor | None,
        real: Callable[[], Tensor],
        factor: float = 1.0,
        row: Tensor | None = None,
        column: Tensor | None = None,
    ):
        self.z, self.table, self.real = z, table, real
        self.factor, self.row, self.column = factor, row, column

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Methods of tensors: those that are known stay lazy, the others see the real matrix."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        method = getattr(Tensor, name)
        if not callable(method):
            return getattr(self.real(), name)
        return lambda *args, **kwargs: _apply(method, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        return _apply(Tensor.__getitem__, (self, index), {})

    def __neg__(self) -> Any:
        return _apply(torch.mul, (self, -1.0), {})

    def __mul__(self, other: Any) -> Any:
        return _apply(torch.mul, (self, other), {})

    def __add__(self, other: Any) -> Any:
        return _apply(torch.add, (self, other), {})

    def __sub__(self, other: Any) -> Any:
        return _apply(torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Any:
        return _apply(torch.sub, (other, self), {})

    __rmul__, __radd__ = __mul__, __add__

    def scaled(self, factor: float, real: Callable[[], Tensor]) -> Scores:
        """All of it times a number."""
        row, column = (None if x is None else x * factor for x in (self.row, self.column))
        return Scores(self.z, self.table, real, self.factor * factor, row, column)

    def plus(self, other: Scores, real: Callable[[], Tensor]) -> Scores | None:
        """The sum, or None where both have products."""
        if self.z is not None and other.z is not None:
            return None
        products = self if self.z is not None else other

        def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return b if a is None else a if b is None else a + b

        row, column = total(self.row, other.row), total(self.column, other.column)
        return Scores(products.z, products.table, real, products.factor, row, column)

    def only(self, real: Callable[[], Tensor]) -> Scores | None:
        """Without its batch of one; None if it has none."""
        if self.z is None or self.z.ndim != 3 or len(self.z) != 1 or self.row is not None:
            return None
        return Scores(self.z[0], self.table, real, self.factor, None, self.column)

    def best(self, largest: bool) -> Tensor | None:
        """Ids of the largest or smallest score per latent; None if the search can't tell."""
        if self.z is None or self.table is None:
            return None
        distances = self.factor == 0
        sign = self.factor if largest else -self.factor
        if (distances and largest) or (not distances and sign <= 0):
            return None
        if distances:
            given = terms(self.table, "l2")
        else:
            column = None if self.column is None else self.column.float()
            toward = 1.0 if largest else -1.0
            given = Terms(bias=None if column is None else toward / sign * column)
        with torch._C.DisableTorchFunction():  # the search's own arithmetic stays what it is
            ids = best_code(self.z.reshape(-1, self.z.shape[-1]), self.table, given)
        return ids.view(self.z.shape[:-1])


class LazyScores(TorchFunctionMode):
    """While active, what scores all codes for all latents makes :class:`Scores`.

    Args:
        functions: that do so: "cdist", "linear", "matmul", "einsum" (of ``bd,dn->bn``), and "add"
            of a column and a row.
    """

    def __init__(self, functions: Collection[str]):
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, Scores) for x in args):
            with torch._C.DisableTorchFunction():
                return _apply(func, args, kwargs)
        name = getattr(func, "__name__", "").strip("_")
        found = _scores(name, func, args, kwargs) if name in self.functions else None
        return func(*args, **kwargs) if found is None else found


def _scores(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Scores | None:
    """Lazy scores in place of a call, or None where it makes none."""

    def real() -> Tensor:
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    if name == "cdist":
        x, table = args[:2]
        euclidean = (args[2] if len(args) > 2 else kwargs.get("p", 2.0)) == 2
        if table.ndim == 3 and len(table) == 1:
            table = table[0]
        return Scores(x, table, real, 0.0) if euclidean and table.ndim == 2 else None
    if name == "linear":
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return Scores(args[0], args[1], real, 1.0, None, bias) if args[1].ndim == 2 else None
    if name == "add":
        a, b = args[:2]
        outer = (
            not kwargs
            and isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.ndim > 1
            and b.ndim == 1
            and a.shape[-1] == 1 < len(b)
        )
        return Scores(None, None, real, 1.0, a, b) if outer else None
    if name == "einsum":
        if args[0] != "bd,dn->bn":
            return None
        args = args[1:]
    x, codes = args[:2]
    if x.ndim != 2 or codes.ndim != 2:
        return None
    return Scores(x, codes.t(), real)


def _apply(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of lazy scores: lazy where it is known, else of the real matrix."""

    def real() -> Any:
        with torch._C.DisableTorchFunction():
            return func(*(x.real() if isinstance(x, Scores) else x for x in args), **kwargs)

    name = getattr(func, "__name__", "")
    first: Any = args[0]
    second: Any = args[1] if len(args) > 1 else None
    found: Any = None
    if name in ("argmin", "argmax") and isinstance(first, Scores):
        dim = kwargs.get("dim", second)
        width = 2 if first.z is None else first.z.ndim
        if dim in (-1, width - 1) and not kwargs.get("keepdim"):
            found = first.best(largest=name == "argmax")
    elif name in ("mul", "__rmul__") and kwargs == {}:
        number = second if isinstance(first, Scores) else first
        scores = first if isinstance(first, Scores) else second
        if isinstance(number, (int, float)) and scores.factor:
            found = scores.scaled(float(number), real)
    elif name in ("add", "sub", "__rsub__", "rsub") and kwargs == {}:
        if name in ("__rsub__", "rsub"):
            first, second = second, first
        if isinstance(first, Scores) and isinstance(second, Scores):
            found = _sum(first, second, -1.0 if "sub" in name else 1.0, real)
    elif name == "__getitem__" and second == 0 and isinstance(first, Scores):
        found = first.only(real)
    return real() if found is None else found


def _sum(a: Scores, b: Scores, sign: float, real: Callable[[], Tensor]) -> Scores | None:
    """``a + sign * b``, or None of distances or of two products."""
    if not a.factor or not b.factor:
        return None
    return a.plus(b.scaled(sign, b.real), real)
