"""One layer's past: an exact sink, a compressed body, an exact window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.sides import Turn
from sage_diffusion.kv import parts as _parts
from sage_diffusion.kv.kept import QUERIES, Exact, Heavy, Kept, importance, pick, unfit, without
from sage_diffusion.kv.method import TILE, Body, ChoosesHeavy, Method, Place, Rope, Rotation
from sage_diffusion.kv.parts import Part
from sage_diffusion.kv.store import Store, select, to
from sage_diffusion.kv.turning import angles_of


class Layer:
    """What a host holds of one layer.

    The first ``sink`` and at least the last ``window`` tokens are exact.  What leaves the window is
    compressed in whole units, once.  This happens in :meth:`settle`, so that the queries that came
    with some tokens see these exactly, however many came at once; :meth:`append` settles first.

    Args:
        method: makes the body when the first tokens come.
        sink, window: tokens.
        number: of the layer in the model.
        rope, calibration, shared: see :class:`~sage_diffusion.kv.method.Place`.

    Raises:
        ValueError: the method wants K before RoPE and the host does not know how it is rotated.
    """

    def __init__(
        self,
        method: Method,
        sink: int = 32,
        window: int = 128,
        number: int = 0,
        *,
        rope: Rope | None = None,
        calibration: Any = None,
        shared: dict[Any, Any] | None = None,
    ):
        if sink < 0 or window < 0:
            raise ValueError(f"sink and window must not be negative, got {sink} and {window}")
        if method.pre_rope and rope is None:
            raise ValueError(
                f"{type(method).__name__} compresses K before RoPE, and how layer {number} rotates "
                "is not known"
            )
        self.method, self.sink, self.window, self.number = method, sink, window, number
        self._rope, self._calibration = rope, calibration
        self.shared = {} if shared is None else shared
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.body: Body | None = None
        self._sink = {"k": Store(), "v": Store()}
        self._tail: tuple[Tensor, Tensor] | None = None
        self._exact = Exact()
        self._heavy: Heavy | None = None
        self._weight: Tensor | None = None  # [B, H, first of the tail]
        self.batch = 0  # sequences
        self._home: torch.device | None = None  # where it belongs, while it is parked
        self._laid: list[Store] = []
        self._offset: Tensor | None = None  # [B] int64: position of a token minus its index

    @property
    def heads(self) -> int:
        """Of K and V."""
        return self.filled().place.heads

    @property
    def compressed(self) -> int:
        """Tokens in the body."""
        return 0 if self.body is None else self.body.tokens

    @property
    def tokens(self) -> int:
        """All that were appended and not cropped."""
        tail = 0 if self._tail is None else self._tail[0].shape[2]
        return self._sink["k"].length + self.compressed + tail

    def append(self, k: Tensor, v: Tensor, positions: Tensor | None = None) -> None:
        """Add tokens ``k [B, H, n, D]``, ``v [B, H, n, Dv]``; they stay exact until :meth:`settle`.

        Args:
            positions: ``[B, n]`` int64, what RoPE rotated by; None: a token's index.

        Raises:
            ValueError: shapes or device are not those of the tokens before.
        """
        self._check_here()
        self.settle()
        if self.body is None:
            self.body = self.method.body(self._place(k, v))
        self._check(k, v)
        self.batch = k.shape[0]
        if positions is not None and self._rope is not None:
            last = self.tokens + k.shape[2] - 1
            self._offset = (positions[:, -1] - last).expand(k.shape[0])
        free = min(self.sink - self._sink["k"].length, k.shape[2])
        if free > 0 and self.compressed == 0 and self._tail is None:
            self._sink["k"].append(k[:, :, :free])
            self._sink["v"].append(v[:, :, :free])
            k, v = k[:, :, free:], v[:, :, free:]
        if k.shape[2]:
            held = self._tail or (k[:, :, :0], v[:, :, :0])
            # Copies of the first ones too: what the caller does to its own is not seen here.
            self._tail = torch.cat((held[0], k), 2), torch.cat((held[1], v), 2)

    def _place(self, k: Tensor, v: Tensor) -> Place:
        return Place(
            self.number,
            k.shape[1],
            k.shape[3],
            v.shape[3],
            k.dtype,
            k.device,
            self._rope,
            self._calibration,
            self.shared,
        )

    def _check(self, k: Tensor, v: Tensor) -> None:
        assert self.body is not None
        place = self.body.place
        want = (place.heads, place.head_dim, place.value_dim)
        if (k.shape[1], k.shape[3], v.shape[3]) != want or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"layer {self.number} holds {want[0]} heads of {want[1]} and {want[2]} channels, "
                f"got K {tuple(k.shape)} and V {tuple(v.shape)}"
            )
        if self._tail is not None and self._tail[0].device != k.device:
            raise ValueError(
                f"layer {self.number} is on {self._tail[0].device}, got tokens on {k.device}"
            )

    def settle(self) -> None:
        """Compress what has left the window."""
        if self.body is None or self._tail is None:
            return
        k, v = self._tail
        leaving = max(k.shape[2] - self.window, 0) // self.body.unit * self.body.unit
        if leaving:
            self._compress(k[:, :, :leaving], v[:, :, :leaving])
        k, v = k[:, :, leaving:], v[:, :, leaving:]
        if self._weight is not None:
            self._weight = self._weight[:, :, leaving:]
        if k.shape[2] == 0:
            self._tail = None
        elif k.untyped_storage().nbytes() > k.numel() * k.element_size():
            self._tail = k.clone(), v.clone()  # a view would keep what has left alive
        else:
            self._tail = k, v

    def _compress(self, k: Tensor, v: Tensor) -> None:
        assert self.body is not None
        self._keep_heavy(k, v)
        bad = unfit(k, v)
        if len(bad):
            self._exact.append(
                (bad + self.compressed).expand(len(k), -1), k[:, :, bad], v[:, :, bad]
            )
            k, v = without(k, bad), without(v, bad)
        if self.method.pre_rope:
            k = self._rotated(k, self.compressed, inverse=True)
        self.body.append(k, v)

    def _keep_heavy(self, k: Tensor, v: Tensor) -> None:
        """Keep those of the leaving tokens that the newest queries attended to most."""
        if not self.method.heavy or self._weight is None:
            return
        assert self.body is not None
        leaving = k.shape[2]
        if isinstance(self.body, ChoosesHeavy):
            self.body.attended = self._weight[:, :, :leaving]
            return
        want = round(self.method.heavy * (self.compressed + leaving))
        count = min(max(want - self.heavy, 0), leaving)
        if not count:
            return
        if self._heavy is None:
            self._heavy = Heavy(self.body.place)
        weight = self._weight[:, :, :leaving].sum(1)
        weight[:, unfit(k, v)] = -1  # they are exact already
        index = weight.topk(count, 1).indices.sort(1).values
        self._heavy.append(index + self.compressed, pick(k, index), pick(v, index))

    def _observe(self, q: Tensor, scale: float, mask: Tensor | None, lse: Tensor) -> None:
        """Add what the newest queries give to the tokens that are still exact."""
        if not self.method.heavy or self._tail is None:
            return
        k = self._tail[0]
        seen = _parts.columns(mask, self.tokens - k.shape[2], self.tokens)
        new = importance(q, k, scale, seen, lse)  # [B, H, n]
        if self._weight is not None:
            new[:, :, : self._weight.shape[2]] += self._weight
        self._weight = new

    @property
    def heavy(self) -> int:
        """Tokens of the body that are kept at 8 bits, of each sequence."""
        return 0 if self._heavy is None else len(self._heavy)

    @property
    def kept_exact(self) -> int:
        """Tokens of the body that are kept exact, as they were not finite or beyond FP16."""
        return len(self._exact)

    def kept(self) -> list[Kept]:
        """Better copies of some tokens of the body."""
        return [x for x in (self._heavy, self._exact) if x is not None and len(x)]

    def _rotated(self, k: Tensor, start: int | Tensor, inverse: bool = False) -> Tensor:
        """K of the body from its token ``start`` on, or of tokens ``[B, n]``, at its positions."""
        assert self._rope is not None
        if isinstance(start, int):
            start = torch.arange(start, start + k.shape[2], device=k.device)
        index = start + self._sink["k"].length
        offset = torch.zeros(1, dtype=torch.int64) if self._offset is None else self._offset
        positions = (index + offset.to(k.device)[:, None]).clamp(min=0).expand(k.shape[0], -1)
        return self._rope.rotate(k, positions, inverse)

    @property
    def _rotate(self) -> Rotation | None:
        return Rotation(self._rotated, self._turn) if self.method.pre_rope else None

    def _turn(self) -> Turn | None:
        """How the body's K is rotated, in numbers, or None where that is not known."""
        assert self._rope is not None
        place = self.filled().place
        key = "angles", place.head_dim, str(place.device)
        if key not in self.shared:
            self.shared[key] = angles_of(self._rope, place.head_dim, place.device)
        if self.shared[key] is None:
            return None
        angles, gain = self.shared[key]
        first = torch.full((self.batch,), self._sink["k"].length, device=place.device)
        return Turn(angles, gain, first if self._offset is None else first + self._offset)

    def tiles(self, size: int = TILE) -> Iterator[tuple[Tensor, Tensor]]:
        """All K and V in order, at most ``size`` tokens of the body at a time."""
        if self._sink["k"].length:
            yield self._sink["k"].read(), self._sink["v"].read()
        for start in range(0, self.compressed, size):
            yield self._body_tile(start, min(start + size, self.compressed))
        if self._tail is not None:
            yield self._tail

    def _body_tile(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert self.body is not None
        k, v = self.body.read(start, stop)
        if self.method.pre_rope:
            k = self._rotated(k, start)
        for kept in self.kept():
            k, v = kept.overlay(k, v, start)
        return k, v

    def read(self) -> tuple[Tensor, Tensor]:
        """All K and V ``[B, H, T, D]`` in the dtype that they came in.

        Raises:
            ValueError: there are no tokens.
        """
        if self.body is None or not self.tokens:
            raise ValueError(f"layer {self.number} has no tokens to read")
        dtype = self.body.place.dtype
        sides = zip(*((k.to(dtype), v.to(dtype)) for k, v in self.tiles()), strict=True)
        k, v = (torch.cat(side, 2) if len(side) > 1 else side[0] for side in sides)
        return k, v

    def attend(self, q: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Attention of ``q [B, Hq, L, D]`` over all tokens; ``[B, Hq, L, Dv]`` in q's dtype.

        Args:
            mask: as in :func:`sage_diffusion.kv.parts.attend`; None: every query sees every token.
        """
        found: list[Part] = []
        sink = self._sink["k"].length
        if sink:
            k, v = self._sink["k"].read(), self._sink["v"].read()
            found.append(_parts.attend(q, k, v, scale, _parts.columns(mask, 0, sink)))
        if self.compressed:
            found += self._attend_body(q, scale, _parts.columns(mask, sink, sink + self.compressed))
        if self._tail is not None:
            seen = _parts.columns(mask, sink + self.compressed, self.tokens)
            found.append(_parts.attend(q, *self._tail, scale, seen))
        whole = _parts.merge(found)
        self._observe(q, scale, mask, whole.lse)
        return whole.out.to(q.dtype)

    def _attend_body(self, q: Tensor, scale: float, mask: Tensor | None) -> list[Part]:
        assert self.body is not None
        found = []
        kept = self.kept()
        if kept:
            shape = (self.batch, self.compressed + 1)
            hidden = torch.zeros(shape, dtype=torch.bool, device=q.device)
            for some in kept:
                found.append(some.attend(q, scale, mask))
                some.hide(hidden)
            seen = ~hidden[:, None, None, :-1]
            if mask is None or mask.dtype == torch.bool:
                mask = seen if mask is None else mask & seen
            else:
                mask = mask + _parts.as_bias(seen)
        return [*found, self.body.attend(q, scale, mask, self._rotate)]

    def observe(self, q: Tensor, scale: float, mask: Tensor | None = None) -> None:
        """Tell the layer of attention that was computed elsewhere, on what :meth:`read` gives.

        Only a method that keeps heavy hitters looks at it, and at the last 64 rows.
        """
        if not self.method.heavy or self._tail is None:
            return
        q = q[:, :, -QUERIES:]
        mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, -QUERIES:]
        start, lse = 0, []
        for k, _ in self.tiles():
            scores = (_parts.grouped(q, k.shape[1]) * scale) @ k.float().transpose(2, 3)
            scores = scores.view(*q.shape[:3], -1)
            if mask is not None:
                scores = scores + _parts.as_bias(mask[..., start : start + k.shape[2]])
            lse.append(scores.logsumexp(-1))
            start += k.shape[2]
        self._observe(q, scale, mask, torch.stack(lse).logsumexp(0))

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens``.

        Tokens of a unit that is cut in two are read and stay in the window as they were read.

        Raises:
            ValueError: the sink would be cut while there is a body.
        """
        if tokens >= self.tokens:
            return
        sink, body = self._sink["k"].length, self.compressed
        if tokens < sink and body:
            raise ValueError(
                f"crop must leave the {sink} tokens of the sink, got {tokens}; "
                "reset the cache to start again"
            )
        for store in self._sink.values():
            store.cut(tokens)
        over = tokens - sink - body
        if over > 0:
            assert self._tail is not None
            self._tail = self._tail[0][:, :, :over].clone(), self._tail[1][:, :, :over].clone()
            self._weight = None if self._weight is None else self._weight[:, :, :over]
            return
        self._tail = self._weight = None
        if over < 0 and body:
            self._crop_body(tokens - sink)

    def _crop_body(self, tokens: int) -> None:
        assert self.body is not None
        whole = tokens // self.body.unit * self.body.unit
        if self.method.evicts:  # what it lacks can't be read, and it forgets any number of tokens
            whole = tokens
        if tokens > whole:
            k, v = self._body_tile(whole, tokens)
            dtype = self.body.place.dtype
            self._tail = k.to(dtype, copy=True), v.to(dtype, copy=True)
        self.body.crop(whole)
        for kept in self.kept():
            kept.crop(whole)

    def select(self, index: Tensor) -> None:
        """Keep, repeat or reorder sequences of the batch by their numbers ``index`` int64."""
        move = select(index)
        self.batch = index.numel()
        self._map(move)

    def to(self, device: torch.device | str) -> None:
        """Move every tensor."""
        self._map(to(device))
        if self.body is not None:
            self.body.to(device)

    def _stores(self) -> Iterator[Store]:
        """All that grows but the body's."""
        yield from self._sink.values()
        for kept in (self._heavy, self._exact):
            if kept is not None:
                yield from kept.stores.values()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores():
            store.map(function)
        if self.body is not None:
            self.body.map(function)
        if self._tail is not None:
            self._tail = function(self._tail[0]), function(self._tail[1])
        self._weight, self._offset = (
            None if x is None else function(x) for x in (self._weight, self._offset)
        )

    def parts(self) -> Counter[str]:
        """Bytes that are filled, by what they hold.

        ``sink``, ``window``, ``heavy``, ``unfit`` and the body's parts.
        """
        found = Counter({"sink": sum(store.used for store in self._sink.values())})
        found["window"] = sum(x.numel() * x.element_size() for x in self._tail or ())
        for name, kept in (("heavy", self._heavy), ("unfit", self._exact)):
            if kept is not None and len(kept):
                found[name] = sum(store.used for store in kept.stores.values())
        if self.body is not None:
            found.update(self.body.parts())
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        tail = sum(x.untyped_storage().nbytes() for x in self._tail or ())
        body = 0 if self.body is None else self.body.nbytes
        return tail + body + sum(store.nbytes for store in self._stores())

    def filled(self) -> Body:
        """The body.

        Raises:
            ValueError: no tokens came yet.
        """
        if self.body is None:
            raise ValueError(f"layer {self.number} has no tokens yet")
        return self.body

    def park(self, device: torch.device | str = "cpu", level: int = 0) -> None:
        """Lay everything aside on another device; it is there again after :meth:`unpark`.

        Args:
            level: of zlib's deflate, 1 to 9; 0: as it is.  Deflated bytes lie in the host's memory.

        Raises:
            ValueError: there is no such level.
            RuntimeError: it is parked already.
        """
        if not 0 <= level <= 9:
            raise ValueError(f"level must be 0 to 9, got {level}")
        self._check_here()
        self.settle()
        if self.body is None:
            return
        self._home = self.body.place.device
        self._laid = [Store(), Store()] if self._tail is not None else []
        for store, x in zip(self._laid, self._tail or (), strict=True):
            store.append(x)
        self._tail = None
        for store in (*self._stores(), *self._laid):
            store.park(device, level)
        self.body.park(device, level)

    def unpark(self) -> None:
        """Bring everything back, bit for bit."""
        if self._home is None:
            return
        body = self.filled()
        for store in (*self._stores(), *self._laid):
            store.unpark(self._home)
        body.unpark(self._home)
        if self._laid:
            self._tail = self._laid[0].read(), self._laid[1].read()
        self._home, self._laid = None, []

    @property
    def parked(self) -> bool:
        """Whether it lies aside."""
        return self._home is not None

    def _check_here(self) -> None:
        if self.parked:
            raise RuntimeError(f"layer {self.number} is parked: unpark it before it is used")
