"""Reference tokens in few bits: diffusers' caches that are stored to once and read at every step.

    with compressed_references(pipe.transformer, "k8v8") as handle:
        pipe(prompt, image=references)
    handle.nbytes, handle.exact_bytes

Flux.2 (Klein KV), Qwen-Image 2.1, GLM-Image and Wan-Animate 2 keep K and V of reference pictures,
or of the prompt, in caches of one interface: ``store(k, v)`` and ``get()`` of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.method import Method
from sage_diffusion.kv.presets import method as method_of

#: Where a layer's cache keeps K and V, by the name of its class; GLM-Image has a list of each.
_SIDES = {
    "Flux2KVLayerCache": ("k_ref", "v_ref"),
    "QwenImage21KVLayerCache": ("k", "v"),
    "GlmImageLayerKVCache": ("k_caches", "v_caches"),
    "WanAnimate2KVLayerCache": ("key", "value"),
}

#: Where a container keeps its layers.
_LISTS = ("double_block_caches", "single_block_caches", "layer_caches", "caches")


class _Packed:
    """K and V of one picture set, ``[B, T, H, D]`` outside and compressed inside."""

    def __init__(self, method: Method, number: int, k: Tensor, v: Tensor):
        self._layer = Layer(method, 0, 0, number)
        self._layer.append(k.transpose(1, 2), v.transpose(1, 2))
        self._layer.settle()
        self.exact = sum(x.numel() * x.element_size() for x in (k, v))

    def read(self) -> tuple[Tensor, Tensor]:
        k, v = self._layer.read()
        return k.transpose(1, 2), v.transpose(1, 2)

    @property
    def nbytes(self) -> int:
        return self._layer.nbytes


class _LayerCache:
    """Stands before the ``store``, ``get`` and ``clear`` of one layer's cache."""

    def __init__(self, cache: Any, method: Method, number: int):
        self.cache, self._method, self._number = cache, method, number
        self._names = _SIDES[type(cache).__name__]
        self._many = self._names[0].endswith("caches")
        self.packed: list[_Packed] = []
        self._originals: dict[str, Callable[..., Any]] = {
            name: getattr(cache, name) for name in ("store", "get", "clear") if hasattr(cache, name)
        }
        self._pack()  # what is there already
        for name in self._originals:
            setattr(cache, name, getattr(self, f"_{name}"))

    def _sides(self) -> tuple[list[Tensor], list[Tensor]]:
        k, v = (getattr(self.cache, name) for name in self._names)
        if self._many:
            return k, v
        return ([], []) if k is None else ([k], [v])

    def _put(self, sides: tuple[list[Tensor], list[Tensor]] | None) -> None:
        for index, name in enumerate(self._names):
            held: Any = [] if self._many else None
            if sides is not None and sides[index]:
                held = sides[index] if self._many else sides[index][0]
            setattr(self.cache, name, held)

    def _pack(self) -> None:
        k, v = self._sides()
        if k:
            pairs = zip(k, v, strict=True)
            self.packed = [_Packed(self._method, self._number, *pair) for pair in pairs]
        self._put(None)

    def _unpack(self) -> None:
        pairs = [one.read() for one in self.packed]
        self._put(([k for k, _ in pairs], [v for _, v in pairs]))

    def _store(self, *args: Any, **kwargs: Any) -> Any:
        # GLM-Image adds to a picture that it has: then that one is packed once more.
        if self._many:
            self._unpack()
        try:
            return self._originals["store"](*args, **kwargs)
        finally:
            self._pack()

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        self._unpack()
        try:
            return self._originals["get"](*args, **kwargs)
        finally:
            self._put(None)

    def _clear(self) -> None:
        self.packed = []
        self._originals["clear"]()

    def remove(self) -> None:
        """Give the cache its own methods back, with what it holds decoded."""
        for name in self._originals:
            delattr(self.cache, name)
        self._unpack()


class CompressedReferences:
    """Caches whose layers keep their K and V compressed, until :meth:`remove`."""

    def __init__(self, method: str | Method):
        self.method = method_of(method)
        if self.method.pre_rope:
            raise ValueError(
                f"{type(self.method).__name__} compresses K before RoPE, and how these caches "
                "rotate is not known"
            )
        if self.method.heavy:
            raise ValueError(
                f"{type(self.method).__name__} keeps the tokens that queries attend to most, and "
                "these caches see no queries"
            )
        self._layers: list[_LayerCache] = []
        self._hooks: list[Any] = []

    def add(self, cache: Any) -> None:
        """Compress what a container holds and will hold; one that is known already is left alone.

        Raises:
            ValueError: it is none of the caches that are known.
        """
        layers = list(_layers(cache))
        if not layers:
            raise ValueError(
                f"{type(cache).__name__} is not a cache of {', '.join(sorted(_SIDES))}"
            )
        known = {id(layer.cache) for layer in self._layers}
        for layer in layers:
            if id(layer) not in known:
                self._layers.append(_LayerCache(layer, self.method, len(self._layers)))

    def follow(self, transformer: Any) -> None:
        """Compress every cache that a transformer is called with, or makes."""

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            for name in ("kv_cache", "kv_caches"):
                if kwargs.get(name) is not None:
                    self.add(kwargs[name])

        def after(module: Any, args: Any, output: Any) -> None:
            made = [getattr(output, "kv_cache", None)]
            made += [x for x in output if any(_layers(x))] if isinstance(output, tuple) else []
            for cache in made:
                if cache is not None:
                    self.add(cache)

        self._hooks = [
            transformer.register_forward_pre_hook(before, with_kwargs=True),
            transformer.register_forward_hook(after),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for what is held now."""
        return sum(one.nbytes for layer in self._layers for one in layer.packed)

    @property
    def exact_bytes(self) -> int:
        """Bytes that the same K and V took when they were stored."""
        return sum(one.exact for layer in self._layers for one in layer.packed)

    def remove(self) -> None:
        """Leave every cache and transformer as it was; more than once does no harm."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            layer.remove()
        self._hooks, self._layers = [], []

    def __enter__(self) -> CompressedReferences:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _layers(cache: Any) -> Iterator[Any]:
    for name in _LISTS:
        for layer in getattr(cache, name, ()):
            if type(layer).__name__ in _SIDES:
                yield layer


def compressed_references(target: Any, method: str | Method = "k8v8") -> CompressedReferences:
    """Compress the reference tokens of a transformer, or of one cache.

    Args:
        target: a transformer of diffusers, whose caches are found when it is called, or a cache.
        method: a preset's name or a method.

    Raises:
        ValueError: the cache or the method is not known, or the method wants K before RoPE, or
            queries.
    """
    handle = CompressedReferences(method)
    if hasattr(target, "register_forward_hook"):
        handle.follow(target)
    else:
        handle.add(target)
    return handle
