"""What a compression method is: settings that make bodies, one for each layer's older tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.sides import Turn
from sage_diffusion.kv import parts as _parts
from sage_diffusion.kv.parts import Part
from sage_diffusion.kv.store import Store, select, to

#: K ``[B, H, n, D]`` as it was before RoPE -> after it; the first token's index in the body, or the
#: index of each ``[B, n]``.
Rotate = Callable[[Tensor, int | Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """A :data:`Rotate` that may also be known in numbers.

    Attributes:
        keys: rotates.
        turn: the same for a kernel, or None where it is not known.
    """

    keys: Rotate
    turn: Callable[[], Turn | None]

    def __call__(self, k: Tensor, start: int | Tensor) -> Tensor:
        return self.keys(k, start)


#: Tokens that are read at once where a body is attended to without a kernel.
TILE = 1024


class Rope(Protocol):
    """How a model rotates K."""

    def rotate(self, x: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        """``x [B, H, n, D]`` at ``positions [B, n]`` (int64), or back; float32."""


@dataclass(frozen=True)
class Place:
    """Where a body will stand.

    Attributes:
        layer: its number in the model.
        heads, head_dim, value_dim: KV heads, and channels of each in K and V.
        dtype, device: of the model's K and V.
        rope: where the host knows it.
        calibration: of this model, where there is one.
        shared: one for all layers of a cache, for methods that store something across layers.
    """

    layer: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    rope: Rope | None = None
    calibration: Any = None
    shared: dict[Any, Any] = field(default_factory=dict, compare=False)


class Body(ABC):
    """The older tokens of one layer, compressed once and never again.

    A subclass keeps every tensor in :attr:`stores` (batch first, growing) or :attr:`constants` (the
    same for all sequences, e.g. a basis): copies, moves, batch selection and byte counts then work
    by themselves.  Their names are ``"k.codes"``, ``"v.steps"`` ..: side and kind.

    Attributes:
        tokens: appended so far.
        unit: :meth:`append` takes multiples of this many tokens.
    """

    unit: int = 1

    def __init__(self, place: Place):
        self.place, self.tokens = place, 0
        self.stores: dict[str, Store] = {}
        self.constants: dict[str, Tensor] = {}

    @abstractmethod
    def append(self, k: Tensor, v: Tensor) -> None:
        """Compress ``k [B, H, n, D]`` and ``v [B, H, n, Dv]``; n is a multiple of :attr:`unit`.

        All values are finite.  K is before RoPE if the method says :attr:`Method.pre_rope`.  What
        is given belongs to the caller: it is neither changed nor kept.
        """

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """K and V of tokens ``start`` to ``stop``, in float32 or the model's dtype."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens``, a multiple of :attr:`unit`."""

    def attend(
        self, q: Tensor, scale: float, mask: Tensor | None = None, rotate: Rotate | None = None
    ) -> Part:
        """Attention of ``q [B, Hq, L, D]`` over all tokens, without ever reading all at once.

        Args:
            mask: as in :func:`sage_diffusion.kv.parts.attend`, over this body's tokens.
            rotate: must be applied to the K that :meth:`read` gives, if not None.
        """
        found = []
        for start in range(0, self.tokens, TILE):
            stop = min(start + TILE, self.tokens)
            k, v = self.read(start, stop)
            if rotate is not None:
                k = rotate(k, start)
            found.append(_parts.attend(q, k, v, scale, _parts.columns(mask, start, stop)))
        return _parts.merge(found)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace all that is batched by ``function`` of it."""
        for store in self.stores.values():
            store.map(function)

    def select(self, index: Tensor) -> None:
        """Keep, repeat or reorder sequences of the batch by their numbers."""
        self.map(select(index))

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        self.map(to(device))
        self._move_constants(device)

    def park(self, device: torch.device | str, level: int) -> None:
        """Lay every tensor aside, see :meth:`Store.park`; constants are moved."""
        for store in self.stores.values():
            store.park(device, level)
        self._move_constants(device)

    def unpark(self, device: torch.device | str) -> None:
        """Bring every tensor back."""
        for store in self.stores.values():
            store.unpark(device)
        self._move_constants(device)

    def _move_constants(self, device: torch.device | str) -> None:
        move = to(device)  # in place: a body of bodies has the same dictionary
        self.constants.update({name: move(x) for name, x in self.constants.items()})

    def parts(self) -> Counter[str]:
        """Bytes that are filled, by the name of the tensor."""
        found = Counter({name: store.used for name, store in self.stores.items()})
        found.update({name: x.numel() * x.element_size() for name, x in self.constants.items()})
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, room for what comes included."""
        constant = sum(x.untyped_storage().nbytes() for x in self.constants.values())
        return sum(store.nbytes for store in self.stores.values()) + constant


class BodySide(Protocol):
    """K or V of a body, compressed by itself.

    Attributes:
        stores: by kind: codes, steps ..
    """

    stores: dict[str, Store]

    def append(self, x: Tensor) -> None:
        """Compress ``[B, H, n, D]``, whole units."""

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop``."""

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``, whole units."""


class TwoSided(Body):
    """K and V that know nothing of each other."""

    def __init__(self, place: Place, k: BodySide, v: BodySide):
        super().__init__(place)
        self.k, self.v = k, v
        for name, side in (("k", k), ("v", v)):
            self.stores |= {f"{name}.{kind}": store for kind, store in side.stores.items()}

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k.append(k)
        self.v.append(v)
        self.tokens += k.shape[2]

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.tokens if stop is None else stop
        return self.k.read(start, stop), self.v.read(start, stop)

    def crop(self, tokens: int) -> None:
        self.k.cut(tokens)
        self.v.cut(tokens)
        self.tokens = tokens


@runtime_checkable
class ChoosesHeavy(Protocol):
    """A body that keeps heavy hitters in a way of its own; the layer does it for all others.

    Attributes:
        attended: ``[B, H, n]``, how much the newest queries attended to the tokens that are
            appended next, squared probabilities summed; set by the layer.
    """

    attended: Tensor | None


class Method(ABC):
    """A way to compress; subclasses are frozen dataclasses whose fields are its settings.

    Attributes:
        pre_rope: whether its bodies want K as it was before RoPE.
        exact: whether :meth:`Body.read` gives back bit for bit what was appended.
        evicts: whether its bodies lack tokens, so that they can be attended to and not read, and
            are cropped to any number of tokens.
        heavy: share of the older tokens that are kept at 8 bits, those that the newest queries
            attend to most; a subclass may have a field of this name.
    """

    pre_rope: bool = False
    exact: bool = False
    evicts: bool = False
    heavy: float = 0.0

    @abstractmethod
    def body(self, place: Place) -> Body:
        """An empty body.

        Raises:
            ValueError: the settings don't fit the place, e.g. groups that don't divide head_dim.
        """
