"""Compressed KV caches in place of ComfyUI's own, without a change to its attention.

ComfyUI's causal Wan and its language models allocate a cache for the longest run, write slices of
K and V and read slices back.  Proxies that understand these slices stand for its tensors: what is
written goes to a :class:`~sage_diffusion.kv.layer.Layer`, what is read is decoded into memory that
all layers share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.kv.calibration import Calibration
from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.method import Method, Rope
from sage_diffusion.kv.presets import method as method_of
from sage_diffusion.kv.rolling import Rolling, RollingBody
from sage_diffusion.kv.scratch import Scratch


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        method: a preset's name or a method.
        sink: first tokens that are kept exact; -1: a video's first block, 32 tokens of text.
        recent: newest tokens that are kept exact; -1: a video's newest block, 128 tokens of text.
        window: most tokens of a video that are kept; -1: all.
        calibration: of the language model, for the calibrated presets.
    """

    method: str | Method = "k4v4"
    sink: int = -1
    recent: int = -1
    window: int = -1
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        method_of(self.method)
        for name in ("sink", "recent", "window"):
            value = getattr(self, name)
            if value < -1:
                raise ValueError(f"{name} must be -1 or more, got {value}")


@dataclass
class Memory:
    """What one run's cache took, and what ComfyUI's own would have.

    Attributes:
        host: bytes that ComfyUI would have allocated for the same run.
        layers: layers whose cache stands here.
        left: why others are ComfyUI's own, with their number.
        tokens: of the longest layer.
        kept: bytes at the last read.
        peak: most at any read, with the memory that a layer is decoded into.
        parts: the bytes kept, by what they hold.
    """

    host: int = 0
    layers: int = 0
    left: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    kept: int = 0
    peak: int = 0
    parts: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "left": dict(self.left), "parts": dict(self.parts)}

    def begin(self) -> None:
        """Forget the run before."""
        vars(self).update(vars(Memory()))


class Past:
    """All layers of one run.

    Attributes:
        memory: see :meth:`measure`, which every read calls.
    """

    def __init__(self, memory: Memory):
        self.memory, self.scratch = memory, Scratch()
        self.layers: list[Any] = []
        self._shown: Any = None
        self._views: tuple[Tensor, Tensor] | None = None
        memory.begin()

    def add(self, layer: Any, host_bytes: int) -> None:
        """Hold one layer more, that ComfyUI would have given this memory."""
        self.layers.append(layer)
        self.memory.layers += 1
        self.memory.host += host_bytes

    def remove(self, layer: Any, host_bytes: int) -> None:
        """Let go of a layer and what :meth:`add` counted for it."""
        self.layers.remove(layer)
        self.memory.layers -= 1
        self.memory.host -= host_bytes
        if self._shown is layer:
            self._shown = self._views = None

    def write(self, layer: Any, start: int, k: Tensor, v: Tensor) -> None:
        """``[B, H, n, D]`` at token ``start``: behind all others, or in place of the newest."""
        if start > layer.tokens:
            raise ValueError(
                f"the cache has {layer.tokens} tokens, the next must be written there or before, "
                f"got {start}"
            )
        layer.crop(start)
        layer.append(k, v)
        self._views = None

    def read(self, layer: Any) -> tuple[Tensor, Tensor]:
        """All K and V ``[B, H, T, D]``; they are asked for one after the other, decoded once."""
        if self._views is None or self._shown is not layer:
            exact = isinstance(layer, Newest)
            self._views = layer.read() if exact else self.scratch.fill(layer)
            self._shown = layer
            self.measure()
        return self._views

    def measure(self) -> None:
        """Look at what all layers take."""
        memory = self.memory
        memory.kept = sum(layer.nbytes for layer in self.layers)
        memory.peak = max(memory.peak, memory.kept + self.scratch.nbytes)
        memory.parts = sum((layer.parts() for layer in self.layers), Counter())
        memory.tokens = max(memory.tokens, *(layer.tokens for layer in self.layers))


class _Side:
    """Stands for a tensor ``[B, H, T, D]`` or ``[B, T, H, D]``; K and V make a pair."""

    def __init__(self, pair: Pair, name: str):
        self._pair, self._name = pair, name

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for: nothing of this size is allocated."""
        return self._pair.shape

    def _tokens(self, index: Any) -> slice:
        index, axis = index if isinstance(index, tuple) else (index,), self._pair.axis
        if len(index) != axis + 1 or any(part != slice(None) for part in index[:axis]):
            raise TypeError(f"a compressed cache is sliced along its tokens only, got {index}")
        tokens = index[axis]
        if not isinstance(tokens, slice) or tokens.step not in (None, 1):
            raise TypeError(f"a compressed cache is read and written by slices, got {tokens!r}")
        return tokens

    def __setitem__(self, index: Any, value: Tensor) -> None:
        self._pair.put(self._name, self._tokens(index).start or 0, value)

    def __getitem__(self, index: Any) -> Tensor:
        tokens = self._tokens(index)
        if tokens.start not in (None, 0):
            raise ValueError(f"a compressed cache is read from its first token, got {tokens!r}")
        return self._pair.get(self._name)


class Pair:
    """K and V of a layer, which ComfyUI writes one after the other, then reads up to the newest.

    Args:
        shape: of each tensor that a proxy stands for.
        axis: of its tokens.
    """

    def __init__(self, past: Past, layer: Any, shape: torch.Size, axis: int, dtype: torch.dtype):
        self.layer, self.shape, self.axis = layer, shape, axis
        self.sides = _Side(self, "k"), _Side(self, "v")
        self._past, self._dtype = past, dtype
        self._waiting: tuple[int, Tensor] | None = None

    def put(self, name: str, start: int, value: Tensor) -> None:
        """Half of a write."""
        value = value.to(self._dtype)
        value = value if self.axis == 2 else value.transpose(1, 2)
        if name == "k":
            self._waiting = start, value
            return
        if self._waiting is None or self._waiting[0] != start:
            raise ValueError("K must be written before V, at the same token")
        k, self._waiting = self._waiting[1], None
        self._past.write(self.layer, start, k, value)

    def get(self, name: str) -> Tensor:
        """All tokens that there are."""
        found = self._past.read(self.layer)[name == "v"]
        return found if self.axis == 2 else found.transpose(1, 2)


class VideoLayer(dict[str, Any]):
    """``k``, ``v`` and ``end`` of a layer of ComfyUI's causal Wan.

    ``end`` is lowered when a block is denoised again; then the oldest blocks beyond the window go.
    """

    def __init__(self, pair: Pair, window: int):
        super().__init__(k=pair.sides[0], v=pair.sides[1], end=0)
        self._layer, self._window = pair.layer, window

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "end" and value < self["end"]:
            block = self["end"] - value
            self._layer.crop(value)
            self._layer.keep(self._window - block if self._window > 0 else None)
            value = self._layer.tokens
        super().__setitem__(key, value)


class Blocks(Layer):
    """A video's layer: its first block tells how many tokens the sink and the newest block have."""

    def __init__(self, settings: Settings, number: int):
        self._settings, self._known = settings, False
        self._inner = method_of(settings.method)
        super().__init__(Rolling(self._inner), 0, 0, number)

    def append(self, k: Tensor, v: Tensor, positions: Tensor | None = None) -> None:
        if not self._known:
            block, settings = k.shape[2], self._settings
            self.sink = block if settings.sink < 0 else settings.sink
            self.window = block if settings.recent < 0 else settings.recent
            self.method = Rolling(self._inner, block)
            self._known = True
        super().append(k, v, positions)

    def keep(self, tokens: int | None) -> None:
        """Forget the oldest spans after the sink until ``tokens`` are left; None: nothing."""
        while tokens is not None and self.tokens > tokens:
            if not isinstance(self.body, RollingBody) or not self.body.tokens:
                return
            self.body.drop()


class Newest:
    """The newest tokens of a layer with a sliding window, exact; ``tokens`` counts all of them."""

    def __init__(self, keep: int):
        self._keep, self.tokens = keep, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens.

        Raises:
            ValueError: several at once after some were dropped: their masks are of the whole past.
        """
        old, count = self._held, k.shape[2]
        if old is not None and count > 1 and old[0].shape[2] < self.tokens:
            raise ValueError(
                f"a layer with a sliding window of {self._keep} tokens has dropped older ones, so "
                f"it takes one token at a time, got {count}"
            )
        self.tokens += count
        if old is None:
            self._held = k.clone(), v.clone()
            return
        first = max(old[0].shape[2] + count - max(self._keep, count), 0)
        self._held = (
            torch.cat([old[0][:, :, first:], k], 2),
            torch.cat([old[1][:, :, first:], v], 2),
        )

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` of all that were appended.

        Raises:
            ValueError: they were dropped already.
        """
        over = self.tokens - tokens
        if over <= 0:
            return
        assert self._held is not None
        left = self._held[0].shape[2] - over
        if left < 0 or (left == 0 and tokens > 0):
            raise ValueError(
                f"a sliding window of {self._keep} tokens can't go back by {over} tokens"
            )
        self._held = (self._held[0][:, :, :left].clone(), self._held[1][:, :, :left].clone())
        self.tokens = tokens
        if tokens == 0:
            self._held = None

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V ``[B, H, T, D]`` of the tokens that are kept."""
        assert self._held is not None
        return self._held

    def parts(self) -> Counter[str]:
        """Bytes, all exact."""
        return Counter({"window": self.nbytes})

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(x.untyped_storage().nbytes() for x in self._held or ())


def video_caches(
    settings: Settings, memory: Memory, *, layers: int, heads: int, head_dim: int
) -> Callable[..., list[VideoLayer]]:
    """What stands for ``CausalWanModel.init_kv_caches``.

    Args:
        memory: begins anew whenever a run does.
    """

    def init_kv_caches(
        batch_size: int, max_seq_len: int, device: Any, dtype: torch.dtype
    ) -> list[VideoLayer]:
        shape = torch.Size((batch_size, max_seq_len, heads, head_dim))
        past, found = Past(memory), []
        for number in range(layers):
            layer = Blocks(settings, number)
            past.add(layer, 2 * shape.numel() * dtype.itemsize)
            found.append(VideoLayer(Pair(past, layer, shape, 1, dtype), settings.window))
        return found

    return init_kv_caches


def text_cache(
    original: Callable[..., list[Any]],
    settings: Settings,
    memory: Memory,
    sliding: Sequence[int],
    rope: Rope | None = None,
) -> Callable[..., list[Any]]:
    """What stands for ``init_kv_cache`` of ComfyUI's language models.

    Entries that are no pair of tensors of the cache's length stay: linear layers, layers that share
    another's cache, caches that grow by themselves.

    Args:
        original: is asked for a cache of three tokens, to see what it is made of; attribute
            ``replaced`` of what is returned.
        sliding: tokens of each layer's sliding window, 0 for none; such a layer keeps its newest
            tokens, exact, and no others.
        rope: of the others, for methods that take K before it.
    """

    def init_kv_cache(
        batch: int, max_cache_len: int, device: Any, execution_dtype: torch.dtype
    ) -> list[Any]:
        entries = list(original(batch, _PROBE, device, execution_dtype))
        past = Past(memory)
        for number, entry in enumerate(entries):
            reason = _why_not(entry)
            if reason is not None:
                memory.left[reason] += 1
                continue
            shape = torch.Size((*entry[0].shape[:2], max_cache_len, entry[0].shape[3]))
            keep = sliding[number] if number < len(sliding) else 0
            layer = Newest(keep) if keep else _text_layer(settings, number, rope)
            past.add(layer, 2 * shape.numel() * entry[0].element_size())
            entries[number] = (*Pair(past, layer, shape, 2, entry[0].dtype).sides, 0)
        return entries

    init_kv_cache.replaced = original  # type: ignore[attr-defined]
    return init_kv_cache


#: Tokens of a cache that is only looked at: no model has so few heads and channels.
_PROBE = 3


def _why_not(entry: Any) -> str | None:
    """Why a layer's cache can't be compressed, or None."""
    if not isinstance(entry, tuple):
        return f"{type(entry).__name__} is read without slices"
    if len(entry) != 3:
        return "grows by itself, or is another layer's"
    k, v, _ = entry
    if not all(isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == _PROBE for x in (k, v)):
        return "the state of a linear layer"
    return None


def _text_layer(settings: Settings, number: int, rope: Rope | None) -> Layer:
    sink = 32 if settings.sink < 0 else settings.sink
    recent = 128 if settings.recent < 0 else settings.recent
    method, calibration = method_of(settings.method), settings.calibration
    return Layer(method, sink, recent, number, rope=rope, calibration=calibration)


class References(MutableMapping[str, tuple[Tensor, Tensor]]):
    """K and V of reference pictures by block, written once and read at every step.

    Stands for the dict of ComfyUI's ``FluxKVCache``, which makes a fresh one when a run ends: the
    memory is then still that run's, to be shown until another begins.
    """

    def __init__(self, settings: Settings, memory: Memory):
        self._settings, self._memory = settings, memory
        self._held: dict[str, tuple[Layer, int]] = {}  # and the bytes that ComfyUI would hold

    @cached_property
    def _past(self) -> Past:
        return Past(self._memory)

    def begin(self) -> None:
        """Forget the run before, unless this one has written already."""
        if not self._held:
            self._memory.begin()

    def __setitem__(self, key: str, value: tuple[Tensor, Tensor]) -> None:
        if key in self._held:
            del self[key]
        sink = max(self._settings.sink, 0)
        layer = Layer(method_of(self._settings.method), sink, 0, len(self._held))
        layer.append(*value)
        layer.settle()
        host_bytes = sum(x.numel() * x.element_size() for x in value)
        self._held[key] = layer, host_bytes
        self._past.add(layer, host_bytes)
        self._past.measure()  # a run of one step never reads

    def __getitem__(self, key: str) -> tuple[Tensor, Tensor]:
        return self._past.read(self._held[key][0])

    def __delitem__(self, key: str) -> None:
        self._past.remove(*self._held.pop(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
