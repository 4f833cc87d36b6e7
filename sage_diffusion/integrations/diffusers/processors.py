"""Attention processors of diffusers whose attention calls come to a session.

A module's own processor is shallow-copied into a subclass of its class that runs the same
code with our attention functions (``_rebind``).  So one mechanism serves every model family and
third-party processors, parameters (IP-Adapter) stay shared, and putting the original processor back
restores the model bit for bit.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.attend import ops
from sage_diffusion.attend.calls import Call, Native
from sage_diffusion.attend.layer import Layer
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers.rebind import (
    DISPATCH,
    Routers,
    attention_sites,
    dispatches,
    rebound_class,
)
from sage_diffusion.integrations.diffusers.rotary import (
    ROTARY,
    as_rotated,
    pair_tables,
    rotate_pairs,
    taken_apart,
    with_tables,
)
from sage_diffusion.integrations.diffusers.standin import Alike
from sage_diffusion.integrations.diffusers.weak import WeakLink
from sage_diffusion.kernels.rope import Rope
from sage_diffusion.plan.names import LayerName

try:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
except ImportError:  # another diffusers
    AttentionScoreSkipFunctionMode = None


# ---------------------------------------------------------------------- dynamic classes
class _Routed:
    """Marks the classes made here."""


_lock = threading.RLock()


def routed_class(cls: type) -> type:
    """The subclass of a processor class whose attention goes through the instance's slot."""
    with _lock:  # two threads must not make two classes of one
        return _routed_class(cls)


@functools.cache
def _routed_class(cls: Any) -> type:
    core = rebound_class(cls, Routers(_sdpa, _dispatch, _rotary, _rotate_pairs))
    namespace = {
        "__module__": cls.__module__,
        "__call__": _publishing(core.__call__),
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
        "_sage_slot": None,
        "_sage_base": cls,
    }
    meta: Any = Alike if type(cls) is type else type(cls)
    return meta("Sage" + cls.__name__, (core, _Routed), namespace)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # Dynamic classes can't be imported: pickle (and copy) the original class and make it again.
    return _restore, (self._sage_base,), _state(self)


def _restore(cls: type) -> Any:
    return object.__new__(routed_class(cls))


def _slots(cls: type) -> set[str]:
    members = ((name, x) for base in cls.__mro__ for name, x in vars(base).items())
    return {name for name, x in members if isinstance(x, types.MemberDescriptorType)}


def _state(processor: Any) -> dict[str, Any]:
    """Everything that is set on a processor, in slots or not."""
    found = {
        name: getattr(processor, name)
        for name in _slots(type(processor))
        if hasattr(processor, name)
    }
    return {**found, **getattr(processor, "__dict__", {})}


def _set_state(processor: Any, state: dict[str, Any]) -> None:
    """Set these and nothing else; of frozen classes too."""
    slots, own = _slots(type(processor)), getattr(processor, "__dict__", None)
    for name in _state(processor).keys() - state.keys():
        object.__delattr__(processor, name)
    for name, value in state.items():
        if name in slots:
            object.__setattr__(processor, name, value)
        elif own is not None:  # else the host has set it on our copy, and the class has no place
            own[name] = value


def _as(cls: type, processor: Any) -> Any:
    """A shallow copy of a processor in another class."""
    new: Any = object.__new__(cls)
    _set_state(new, _state(processor))
    return new


def is_routed(processor: Any) -> bool:
    """Is this processor one of ours?"""
    return issubclass(type(processor), _Routed)


# ---------------------------------------------------------------------- slot
class HostAttention:
    """A layer's own attention where a compiled graph asks for it: ``[B, H, L, D]``.

    Outside of ``torch.compile`` the router hands the original call over instead.
    """

    def __init__(self, dispatches: bool, slot: Slot | None = None):
        self.dispatches = dispatches
        self._slot = None if slot is None else weakref.ref(slot)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float | None
    ) -> Tensor:
        """The original call, with the dispatcher's backend as it is set at this moment."""
        gqa = q.shape[1] != k.shape[1]
        if not self.dispatches:
            return nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa
            )
        slot = None if self._slot is None else self._slot()
        out = DISPATCH(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=gqa,
            backend=None if slot is None else slot.backend,
        )
        return out.transpose(1, 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return HostAttention, (self.dispatches,)


class Slot:
    """What a routed processor carries: its session, its layers and the processor it stands for.

    Args:
        session: decides and runs.
        path: name of the attention module; later calls within the module get ``.1``, ``.2``, ..
        original: the processor that the module had.
        processor: the routed copy of it.
    """

    def __init__(self, session: AttentionSession, path: str, original: Any, processor: Any):
        self.session = session
        self.path = path
        self.original = original
        self._processor = WeakLink(processor)
        self.live = True
        self.layers: list[Layer] = []
        for name in layer_names(path, type(original)):
            native = HostAttention(dispatches(type(original)), self)
            known = session.layers.get(name)
            if known is None:
                known = Layer(session, name, native, listed=not self.layers)
            else:
                known.native = native
            self.layers.append(known)

    @property
    def backend(self) -> Any:
        """diffusers' attention backend of this module, None for the active one."""
        return getattr(self._processor(), "_attention_backend", None)

    def layer(self, call: int) -> Layer:
        """The layer of the n-th attention call of one forward."""
        return self.layers[min(call, len(self.layers) - 1)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        new = Slot.__new__(Slot)
        memo[id(self)] = new
        vars(new).update({key: copy.deepcopy(value, memo) for key, value in vars(self).items()})
        new._relink()
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._relink()

    def _relink(self) -> None:
        for layer in self.layers:
            layer.native = HostAttention(dispatches(type(self.original)), self)


def layer_names(path: str, cls: type) -> list[LayerName]:
    """Names of the layers of one attention module, the certain one first."""
    name = path if isinstance(path, LayerName) else LayerName(path)
    return [name if i == 0 else name.sub(i) for i in range(attention_sites(cls))]


def route(processor: Any, session: AttentionSession, path: str) -> Any:
    """A copy of ``processor`` whose attention comes to ``session``; parameters stay shared."""
    routed = _as(routed_class(type(processor)), processor)
    vars(routed)["_sage_slot"] = Slot(session, path, processor, routed)
    return routed


def unroute(processor: Any) -> Any:
    """The original of a routed processor, with what the host has set on the copy since."""
    slot = processor._sage_slot
    if slot is None:  # the host made a new one of a routed processor's class
        return _as(processor._sage_base, processor)
    slot.live = False
    state = _state(processor)
    del state["_sage_slot"]
    _set_state(slot.original, state)
    return slot.original


# ---------------------------------------------------------------------- the running processor
class _Frame:
    """One forward of one routed processor."""

    __slots__ = ("calls", "slot")

    def __init__(self, slot: Slot | None):
        self.slot = slot
        self.calls = 0

    def next_layer(self) -> Layer:
        layer = self.slot.layer(self.calls)  # type: ignore[union-attr]
        self.calls += 1
        return layer


class _Running(threading.local):
    """The frame of this thread: two pipes may sample at once."""

    frame: _Frame | None = None


_running = _Running()
# Dynamo can't trace thread locals; it traces one frame at a time, so a plain object serves there.
_traced = _Frame(None)


def _publishing(call: Callable[..., Any]) -> Callable[..., Any]:
    """``__call__`` that tells the routers which slot is running.

    Hosts filter keyword arguments by this function's signature: it must remain the original's.
    """

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        slot = self._sage_slot
        if slot is None or not slot.live:
            # A host kept this processor and put it back after removal.
            return call(self, *args, **kwargs) if slot is None else slot.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            _traced.slot = slot
            _traced.calls = 0
            out = call(self, *args, **kwargs)
            _traced.slot = None
            return out
        before = _running.frame
        _running.frame = _Frame(slot)
        try:
            return call(self, *args, **kwargs)
        finally:
            _running.frame = before

    return __call__


# ---------------------------------------------------------------------- the routers
def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands for ``F.scaled_dot_product_attention``: ``[B, H, L, D]``."""

    layer = _next_layer()
    more = {"enable_gqa": True} if enable_gqa else {}

    def original(*_: Any) -> Tensor:
        q, k = as_rotated(query), as_rotated(key)
        return nn.functional.scaled_dot_product_attention(
            q, k, value, attn_mask, dropout_p, is_causal, scale=scale, **more
        )

    if layer is None:
        return original()
    reason = _refusal(query, key, value, attn_mask, dropout_p)
    if reason is not None:
        _bypass(layer, key.shape[-2], reason)
        return original()
    (q, rope_q), (k, rope_k) = taken_apart(query, 1), taken_apart(key, 1)
    call = Call(q, k, value, attn_mask, is_causal, scale, rope_q, rope_k)
    return _attend(layer, call, original)


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
    **unknown: Any,
) -> Tensor:
    """Stands for ``dispatch_attention_fn``: ``[B, L, H, D]``."""

    layer = _next_layer()

    def original() -> Any:
        return DISPATCH(
            as_rotated(query),
            as_rotated(key),
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            attention_kwargs=attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
            **unknown,
        )

    if layer is None:
        return original()
    reason: str | None
    if parallel_config is not None:
        reason = "context parallelism is the host's own"
    elif attention_kwargs:
        reason = f"arguments of one backend only: {', '.join(sorted(attention_kwargs))}"
    elif unknown:
        reason = f"unknown arguments: {', '.join(sorted(unknown))}"
    else:
        reason = _refusal(query, key, value, attn_mask, dropout_p)
    if reason is not None:
        _bypass(layer, key.shape[1], reason)
        return original()
    mask = attn_mask
    if mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
        mask = mask[:, None, None, :]  # key padding, as diffusers' native backend reads it
    (query_, rope_q), (key_, rope_k) = taken_apart(query, 2), taken_apart(key, 2)
    q, k, v = query_.transpose(1, 2), key_.transpose(1, 2), value.transpose(1, 2)

    def native(*_: Any) -> Tensor:
        return original().transpose(1, 2)

    call = Call(q, k, v, mask, is_causal, scale, rope_q, rope_k)
    return _attend(layer, call, native).transpose(1, 2)


def _rotary(
    x: Tensor,
    freqs_cis: Any,
    use_real: bool = True,
    use_real_unbind_dim: int = -1,
    sequence_dim: int = 2,
) -> Tensor:
    """Stands for ``apply_rotary_emb``."""

    def original() -> Tensor:
        return ROTARY(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)

    if not use_real or use_real_unbind_dim not in (-1, -2) or not _folds(x, sequence_dim):
        return original()
    cos, sin = freqs_cis
    put = with_tables(x, Rope(cos, sin, use_real_unbind_dim == -1), 3 - sequence_dim, original)
    return original() if put is None else put


def _rotate_pairs(x: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """Stands for the inner function of the Wan family: ``[B, L, H, D]``."""

    def original() -> Tensor:
        return rotate_pairs(x, freqs_cos, freqs_sin)

    rope = pair_tables(freqs_cos, freqs_sin) if _folds(x, 1) else None
    put = None if rope is None else with_tables(x, rope, 2, original)
    return original() if put is None else put


def _folds(x: Tensor, sequence_dim: int) -> bool:
    """Will the attention call that comes next be quantized, so that it may rotate Q and K too?"""
    if torch.compiler.is_compiling() or x.ndim != 4 or sequence_dim not in (1, 2):
        return False  # one graph serves every precision: it rotates
    frame = _running.frame
    if frame is None or frame.slot is None or (torch.is_grad_enabled() and x.requires_grad):
        return False
    slot = frame.slot
    layer, tokens = slot.layer(frame.calls), x.shape[sequence_dim]
    return slot.session.quantizes(layer.name, tokens, whole=True)


def _next_layer() -> Layer | None:
    """The layer of this call, None outside of a routed processor."""
    frame = _traced if torch.compiler.is_compiling() else _running.frame or _traced
    return None if frame.slot is None else frame.next_layer()


def _refusal(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float) -> str | None:
    """Why a call can't be ours, None if it can."""
    if mask is not None and not isinstance(mask, Tensor):
        return f"a mask of type {type(mask).__name__}"
    if dropout_p:
        return "attention dropout"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        return f"tensors of {q.ndim} dimensions"
    if not torch.compiler.is_compiling():  # the session itself looks at gradients then
        return "a layer-skip hook replaces the attention" if _scores_are_skipped() else None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "gradients are asked for, quantized attention is forward only"
    return None


def _scores_are_skipped() -> bool:
    """Is one of diffusers' hooks around that turns attention into a copy of V?"""
    if AttentionScoreSkipFunctionMode is None or not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


def _bypass(layer: Layer, tokens: int, reason: str) -> None:
    if torch.compiler.is_compiling():
        ops.bypass(layer.handle, tokens, reason)
    else:
        layer.bypass(tokens, reason)


def _attend(layer: Layer, call: Call, native: Native) -> Tensor:
    if torch.compiler.is_compiling():
        return ops.by_layer(call, layer.handle)
    return layer.attend(call, native)
