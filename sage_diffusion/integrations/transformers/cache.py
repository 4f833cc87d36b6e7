"""transformers: a compressed cache for any model that generates."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from sage_diffusion.integrations.transformers.lazy import LazyPast
from sage_diffusion.integrations.transformers.rope import model_rope, text_config
from sage_diffusion.kv import report as _report
from sage_diffusion.kv import trial
from sage_diffusion.kv.calibration import Calibration, fingerprint
from sage_diffusion.kv.kept import QUERIES
from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.method import Method
from sage_diffusion.kv.presets import method as by_name
from sage_diffusion.kv.report import Report
from sage_diffusion.kv.scratch import Scratch

#: Layers whose past is kept whole, and can be compressed.
_FULL = "full_attention"

#: Query rows of a KV head up to which attention reads codes tile by tile; more share the scratch.
_FEW = 32


class CompressedLayer(CacheLayerMixin):
    """A layer of transformers' cache that holds a compressed past."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, layer: Layer, scratch: Scratch):
        super().__init__()
        self.past, self._scratch = layer, scratch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; what is returned stands for all of them and reads only what is asked."""
        self.is_initialized = True
        first = self.past.tokens == 0
        positions = (kwargs.get("kwargs") or {}).get("position_ids")
        self.past.append(key_states, value_states, positions)
        method = self.past.method
        if first and not method.heavy:
            return key_states, value_states
        if method.exact:
            return self.past.read()
        tokens = self.past.tokens
        k, v = (
            LazyPast(self, side, (*x.shape[:2], tokens, x.shape[3]), x)
            for side, x in enumerate((key_states, value_states))
        )
        return k, v

    def read(self) -> tuple[Tensor, Tensor]:
        """All K and V, in the scratch that all layers share: until the next layer asks."""
        return self._scratch.fill(self.past)

    def attend(self, q: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of ``q [B, Hq, L, D]`` as ``scaled_dot_product_attention`` computes it."""
        kv_heads = self.past.heads
        few = q.shape[1] // kv_heads * q.shape[2] <= _FEW or self.past.method.evicts
        if few and not causal and self.past.compressed:
            self._scratch.clear()
            return self.past.attend(q, scale, mask)
        k, v = self.read()
        out = scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != kv_heads
        )
        if causal:
            mask = _last_rows(q.shape[2], k.shape[2], q.device)
        self.past.observe(q, scale, mask)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.past.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.past.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must not be positive, got {tokens_to_remove}")
        self.past.crop(self.past.tokens + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.past.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.past.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.past.tokens:
            self.past.select(torch.arange(self.past.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        if not self.past.parked:
            self.past.park("cpu")

    def prefetch(self) -> None:
        self.past.unpark()


def _last_rows(rows: int, tokens: int, device: torch.device) -> Tensor:
    """A causal mask's last rows, as many as observing looks at; ``[1, 1, n, T]``."""
    row = torch.arange(max(rows - QUERIES, 0), rows, device=device)[:, None]
    return (torch.arange(tokens, device=device) <= row)[None, None]


def _why(kind: str) -> str:
    """Why layers of a type are left alone."""
    if "sliding" in kind or "chunked" in kind:
        return "keeps no more than its window"
    return "has no K and V of its own that grow"


def _shape(model: nn.Module, config: Any) -> trial.Shape | None:
    """Of K and V, where all layers have the same and the configuration says which."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    other = ("kv_lora_rank", "global_head_dim", "num_global_key_value_heads", "v_head_dim")
    if any(getattr(config, name, None) for name in other):
        return None
    if not isinstance(heads, int) or not isinstance(dim, int):
        return None
    weight = next(x for x in model.parameters() if x.is_floating_point())
    if weight.device.type == "meta":
        return None
    return trial.Shape(heads, dim, dim, weight.dtype, weight.device)


class KVCache(Cache):
    """A cache whose layers of full attention are compressed; the others are transformers' own.

    The tokens of one call see each other and the window exactly; a layer compresses what has left
    its window when the next layer is called, so that never more than one holds a long prompt.

    Attributes:
        preset: name of the method.
        pasts: of the compressed layers, by their number.
        compressed: these numbers.
        left: number -> type of those that are left alone, known before anything runs.
        peak_bytes: most that the compressed layers and their scratch had allocated at once.
    """

    def __init__(
        self,
        layers: list[Any],
        kinds: list[str],
        preset: str,
        scratch: Scratch,
        context: int | None = None,
    ):
        super().__init__(layers=layers)
        self._context = context
        self.preset, self.peak_bytes = preset, 0
        self.pasts = {i: x.past for i, x in enumerate(layers) if isinstance(x, CompressedLayer)}
        self.compressed = tuple(self.pasts)
        self.left = {i: kinds[i] for i in range(len(layers)) if i not in self.compressed}
        self._scratch, self._open = scratch, -1
        self._bytes = dict.fromkeys(self.compressed, 0)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        preset: str | Method = "k3v2",
        calibration: Calibration | None = None,
        sink: int = 32,
        window: int = 128,
        context: int | None = None,
    ) -> KVCache:
        """An empty cache for a model of transformers.

        Args:
            preset: a name of :data:`sage_diffusion.kv.PRESETS`, or a method.
            calibration: of this model, where the method needs one.
            sink, window: first and last tokens that stay exact.
            context: tokens that will be held; a basis that takes more than it saves there is
                refused with the two numbers.

        Raises:
            ValueError: no layer can be compressed, the preset is not known, it does not fit a
                layer's heads and channels, its basis does not pay, or it wants K before RoPE of a
                model whose RoPE is not known; calibration or context are none.
        """
        method = by_name(preset)
        config = text_config(model)
        kinds, arguments = get_layer_types_and_kwargs(config)
        if _FULL not in kinds:
            why = "; ".join(f"{kind}, which {_why(kind)}" for kind in sorted(set(kinds)))
            raise ValueError(
                f"a layer must be of {_FULL} to be compressed, all {len(kinds)} of "
                f"{type(model).__name__} are of {why}"
            )
        rope = model_rope(model) if method.pre_rope else None
        if calibration is not None:
            if not isinstance(calibration, Calibration):
                raise ValueError(
                    "calibration must be what Calibration.load or calibrate returns, got "
                    f"{calibration!r}"
                )
            calibration.check(fingerprint(model))
        if context is not None and context < 1:
            raise ValueError(f"context must be at least 1 token, got {context}")

        def pasts() -> dict[int, Layer]:
            given: dict[str, Any] = {"rope": rope, "calibration": calibration, "shared": {}}
            full = (i for i, kind in enumerate(kinds) if kind == _FULL)
            return {i: Layer(method, sink, window, i, **given) for i in full}

        shape = _shape(model, config)
        if shape is not None:
            trial.check(list(pasts().values()), shape, context)
        made, scratch = pasts(), Scratch()
        layers: list[Any] = [
            CompressedLayer(made[i], scratch)
            if kind == _FULL
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**given)
            for i, (kind, given) in enumerate(zip(kinds, arguments, strict=True))
        ]
        name = preset if isinstance(preset, str) else repr(preset)
        return cls(layers, kinds, name, scratch, context)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As every cache's; the layer before compresses what has left its window."""
        if self._open not in (-1, layer_idx):
            self._close()
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self._bytes:
            self._open = layer_idx
            self._count(layer_idx)
        return given

    def _close(self) -> None:
        if self._open != -1:
            past = self.pasts[self._open]
            past.settle()
            if self._context is not None and self._open == self.compressed[-1]:
                _report.check_constants(list(self.pasts.values()), self._context)
            self._count(self._open)
            self._open = -1

    def _count(self, layer: int) -> None:
        past = self.pasts[layer]
        self._bytes[layer] = past.nbytes
        room = sum(x.nbytes for x in past.shared.values() if isinstance(x, Tensor))
        now = sum(self._bytes.values()) + self._scratch.nbytes + room
        self.peak_bytes = max(self.peak_bytes, now)

    def reset(self) -> None:
        """Forget every token, and the peak."""
        super().reset()
        self._open, self.peak_bytes = -1, 0
        self._bytes = dict.fromkeys(self.compressed, 0)
        self._scratch.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the compressed layers have allocated."""
        self._close()
        return sum(past.nbytes for past in self.pasts.values())

    def bits(self, tokens: int | None = None) -> float:
        """All-in bits of an element of K or V: codes, steps, bases, sink, window and all else.

        Args:
            tokens: in the cache; None: those that are. Another number is extrapolated from what
                the bodies take now.

        Raises:
            ValueError: the cache is empty, or nothing is compressed yet that would be.
        """
        self._close()
        pasts = list(self.pasts.values())
        return self.report().bits if tokens is None else _report.bits(pasts, tokens)

    def report(self) -> Report:
        """What the cache takes, measured.

        Raises:
            ValueError: the cache is empty.
        """
        self._close()
        left = Counter(self.left.values())
        return _report.measure(self.preset, list(self.pasts.values()), left, self.peak_bytes)

    def park(self, device: torch.device | str = "cpu", level: int = 0) -> None:
        """Lay the compressed layers aside until :meth:`unpark`.

        Args:
            device: where to.
            level: of zlib's deflate, 1 to 9, into the host's memory; 0: as they are.

        Raises:
            RuntimeError: they are parked already.
        """
        self._close()
        self._scratch.clear()
        for past in self.pasts.values():
            past.park(device, level)

    def unpark(self) -> None:
        """Bring them back, bit for bit."""
        for past in self.pasts.values():
            past.unpark()


class Compressing:
    """A model that makes itself a compressed cache wherever it is given none.

    Attributes:
        cache: the one that was made last; before anything runs an empty one, which says what it
            will compress.
    """

    def __init__(self, model: nn.Module, make: Callable[[], KVCache]):
        self.cache = make()
        self._model, self._make = model, make
        self._name = argument(model)
        own = vars(model).get("generate")
        generate: Any = model.generate

        def compressed(*args: Any, **kwargs: Any) -> Any:
            if not self._given(kwargs) and kwargs.get("use_cache", True):
                kwargs[self._name] = self._new()
            return generate(*args, **kwargs)

        def undo() -> None:
            if own is None:
                del model.generate
            else:
                model.generate = own

        model.generate = compressed  # type: ignore[assignment]
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._undo: list[Callable[[], None]] = [undo, self._hook.remove]

    def _new(self) -> KVCache:
        self.cache = self._make()
        return self.cache

    @staticmethod
    def _given(kwargs: dict[str, Any]) -> bool:
        return any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        used = kwargs.get("use_cache")
        if used is None:
            used = getattr(model.config, "use_cache", True)
        if self._given(kwargs) or not used:
            return None
        return args, {**kwargs, self._name: self._new()}

    def remove(self) -> None:
        """Leave the model as it was; a second call does nothing."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def compress(
    model: nn.Module, preset: str | Method = "k3v2", **settings: Any
) -> Iterator[Compressing]:
    """Let ``model`` use a compressed cache in ``generate`` and in plain forward passes.

    Args:
        model, preset, settings: as :meth:`KVCache.for_model` takes them.

    Raises:
        ValueError: as there, before anything is changed.
    """
    handle = Compressing(model, lambda: KVCache.for_model(model, preset, **settings))
    try:
        yield handle
    finally:
        handle.remove()


def argument(model: nn.Module) -> str:
    """What the model calls its cache: ``cache`` since transformers 5.24, before it another name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
