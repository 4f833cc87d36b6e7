"""Subclasses of attention processors that run the same code with other attention functions.

Each function that calls attention is rebuilt from its own code object with private globals, where
``F.scaled_dot_product_attention`` and diffusers' ``dispatch_attention_fn`` are replaced, and so are
the functions that rotate Q and K (``_rotary``).  Nothing global is patched, and no processor is
written a second time.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from sage_diffusion.integrations.diffusers.rotary import PAIRS, ROTARY, with_pairs_routed

SDPA = nn.functional.scaled_dot_product_attention
DISPATCH = dispatch_attention_fn
_NAMES = (SDPA.__name__, DISPATCH.__name__)


class Routers(NamedTuple):
    """What the rebuilt code calls instead."""

    sdpa: Callable[..., Any]
    dispatch: Callable[..., Any]
    rotary: Callable[..., Any]
    rotate_pairs: Callable[..., Any]


# ---------------------------------------------------------------------- which code calls attention
def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _loads(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Every global and attribute that a function reads: name, and the global of that name."""
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL")):
                name = instruction.argval
                yield name, function.__globals__.get(name)


def _calls(function: types.FunctionType) -> int:
    """How many places of a function call attention, helpers of its module included."""
    found = 0
    for helper in (function, *_helpers(function)):
        for name, value in _loads(helper):
            found += name in _NAMES or value is SDPA or value is DISPATCH
    return found


def _helpers(function: types.FunctionType) -> list[types.FunctionType]:
    """Functions of the same module that a function reaches through its globals."""
    found: list[types.FunctionType] = []
    queue = [function]
    while queue:
        for _, value in _loads(queue.pop()):
            if (
                isinstance(value, types.FunctionType)
                and value.__globals__ is function.__globals__
                and value not in found
                and value is not function
            ):
                found.append(value)
                queue.append(value)
    return found


@functools.cache
def _own(cls: type) -> tuple[tuple[str, types.FunctionType, Any], ...]:
    """A class's own functions that call attention: name, function, staticmethod or the like."""
    found: list[tuple[str, types.FunctionType, Any]] = []
    if cls is object or cls.__module__.partition(".")[0] == "torch":
        return ()
    for name, value in vars(cls).items():
        kind = type(value) if isinstance(value, (staticmethod, classmethod)) else None
        function = value.__func__ if kind else value
        if isinstance(function, types.FunctionType) and _calls(function):
            found.append((name, function, kind))
    return tuple(found)


def attention_sites(cls: Any) -> int:
    """How many places of a processor class call attention; 0 if it can't be routed."""
    return _attention_sites(cls)


@functools.cache
def _attention_sites(cls: type) -> int:
    return sum(_calls(function) for base in cls.__mro__ for _, function, _ in _own(base))


def dispatches(cls: Any) -> bool:
    """Does the class call diffusers' dispatcher (``[B, L, H, D]``) and not PyTorch?"""
    return _dispatches(cls)


@functools.cache
def _dispatches(cls: type) -> bool:
    return any(
        name == DISPATCH.__name__ or value is DISPATCH
        for base in cls.__mro__
        for _, function, _ in _own(base)
        for each in (function, *_helpers(function))
        for name, value in _loads(each)
    )


# ---------------------------------------------------------------------- private globals
class _ModuleView(types.ModuleType):
    """A module as another module's code sees it: the same, but for a few attributes."""

    def __init__(self, module: types.ModuleType, **changed: Any):
        super().__init__(module.__name__)
        self.__dict__.update(vars(module))
        self.__dict__.update(changed, _sage_module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sage_module"], name)


_serial = itertools.count(1)


def _private_globals(cls: type, function: types.FunctionType, routers: Routers) -> dict[str, Any]:
    # The namespace of a module in sys.modules: Dynamo looks the globals that it guards up there
    # by __name__, and would find those of the real module otherwise.
    name = f"sage_diffusion_rebound_{next(_serial)}_{cls.__name__}"
    module = types.ModuleType(name)
    own = vars(module)
    own.update(function.__globals__)
    own.update(__name__=name, __spec__=None, __loader__=None)
    functional = _ModuleView(nn.functional, scaled_dot_product_attention=routers.sdpa)
    for key, value in function.__globals__.items():
        if value is nn.functional:
            own[key] = functional
        elif value is SDPA:
            own[key] = routers.sdpa
        elif value is DISPATCH:
            own[key] = routers.dispatch
        elif value is ROTARY:
            own[key] = routers.rotary
    own[PAIRS] = routers.rotate_pairs
    reached = (function, *_helpers(function))
    if any(name == "functional" for each in reached for name, _ in _loads(each)):
        # Spelled torch.nn.functional.scaled_dot_product_attention.
        nn_view = _ModuleView(nn, functional=functional)
        for key, value in function.__globals__.items():
            if value is nn:
                own[key] = nn_view
            elif value is torch:
                own[key] = _ModuleView(torch, nn=nn_view)
    for helper in reached[1:]:
        if _calls(helper):
            for key, value in function.__globals__.items():
                if value is helper:
                    own[key] = _with_globals(helper, own)
    sys.modules[name] = module
    return own


def _with_globals(function: types.FunctionType, own: dict[str, Any]) -> types.FunctionType:
    code = with_pairs_routed(function.__code__)
    new = types.FunctionType(
        code, own, function.__name__, function.__defaults__, function.__closure__
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__ = function.__qualname__
    new.__dict__.update(function.__dict__)
    return new


@functools.cache
def rebound_class(cls: type, routers: Routers) -> type:
    """``cls`` with its attention calls rerouted; ``cls`` itself where it makes none.

    Inherited functions are rebound in their own place of the method resolution order, so an
    override that reaches attention through ``super()`` keeps working.
    """
    namespace: dict[str, Any] = {}
    for name, function, kind in _own(cls):
        new = _with_globals(function, _private_globals(cls, function, routers))
        namespace[name] = kind(new) if kind else new
    bases = [rebound_class(base, routers) for base in cls.__bases__ if attention_sites(base)]
    if not namespace and not bases:
        return cls
    namespace["__module__"] = cls.__module__
    return type(cls)(cls.__name__, (cls, *bases), namespace)
