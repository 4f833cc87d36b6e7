"""transformers: a compressed cache for any model that generates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from sage_diffusion.integrations.transformers.lazy import LazyPast
from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.method import Method
from sage_diffusion.kv.presets import method as by_name

#: Layers whose past is kept whole, and can be compressed.
_FULL = "full_attention"


class CompressedLayer(CacheLayerMixin):
    """A layer of transformers' cache that holds a compressed past."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, layer: Layer):
        super().__init__()
        self.past = layer

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
        if first:
            return key_states, value_states
        if self.past.method.exact:
            return self.past.read()
        tokens = self.past.tokens
        k, v = (
            LazyPast(self.past, side, (*x.shape[:2], tokens, x.shape[3]), x)
            for side, x in enumerate((key_states, value_states))
        )
        return k, v

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
        self.past.to("cpu")


class KVCache(Cache):
    """A cache whose layers of full attention are compressed; the others are transformers' own.

    Attributes:
        compressed: numbers of the layers that are compressed.
        left: number -> type of those that are left alone.
    """

    def __init__(self, layers: list[Any], kinds: list[str]):
        super().__init__(layers=layers)
        self.compressed = tuple(i for i, x in enumerate(layers) if isinstance(x, CompressedLayer))
        self.left = {i: kinds[i] for i in range(len(layers)) if i not in self.compressed}

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        preset: str | Method = "k3v2",
        calibration: Any = None,
        sink: int = 32,
        window: int = 128,
    ) -> KVCache:
        """An empty cache for a model of transformers.

        Args:
            preset: a name of :data:`sage_diffusion.kv.PRESETS`, or a method.
            calibration: of this model, where the method needs one.
            sink, window: first and last tokens that stay exact.

        Raises:
            ValueError: no layer can be compressed, or the preset is not known.
        """
        method = by_name(preset)
        config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        kinds, arguments = get_layer_types_and_kwargs(config)
        shared: dict[Any, Any] = {}
        layers: list[Any] = []
        for i, (kind, given) in enumerate(zip(kinds, arguments, strict=True)):
            if kind == _FULL:
                layer = Layer(method, sink, window, i, calibration=calibration, shared=shared)
                layers.append(CompressedLayer(layer))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**given))
        if _FULL not in kinds:
            found = ", ".join(sorted(set(kinds)))
            raise ValueError(
                f"a layer must be of {_FULL} to be compressed, {type(model).__name__} has {found}"
            )
        return cls(layers, kinds)

    @property
    def pasts(self) -> dict[int, Layer]:
        """Of the compressed layers, by their number."""
        return {i: x.past for i, x in enumerate(self.layers) if isinstance(x, CompressedLayer)}

    @property
    def nbytes(self) -> int:
        """Bytes that the compressed layers have allocated."""
        return sum(past.nbytes for past in self.pasts.values())


class Compressing:
    """A model that makes itself a compressed cache wherever it is given none.

    Attributes:
        cache: the one that was made last.
    """

    def __init__(self, model: nn.Module, make: Callable[[], KVCache]):
        self.cache: KVCache | None = None
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
    KVCache.for_model(model, preset, **settings)
    handle = Compressing(model, lambda: KVCache.for_model(model, preset, **settings))
    try:
        yield handle
    finally:
        handle.remove()


def argument(model: nn.Module) -> str:
    """What the model calls its cache: ``cache`` since transformers 5.24, before it another name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
