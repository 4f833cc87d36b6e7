"""Subclasses of attention processors that run the same code with other attention functions.

Each function that calls attention is rebuilt from its own code object, in which a few globals bear
other names: those that lead to ``F.scaled_dot_product_attention`` or diffusers'
``dispatch_attention_fn``, and the functions that rotate Q and K (``_rotary``).  Under these names,
which nobody else reads, its module gets what stands for them.  Everything else is the module's own,
so that processors which keep state in globals share it with the rest of their module.  Nothing that
anybody else reads is patched, and no processor is written a second time.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models import attention_dispatch
from torch import nn

from sage_diffusion.integrations.diffusers.rotary import PAIRS, ROTARY, with_pairs_routed

SDPA = nn.functional.scaled_dot_product_attention
DISPATCH = attention_dispatch.dispatch_attention_fn
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
    """Every global and attribute that a function reads: its name, and the global's value."""
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL":
                yield name, function.__globals__.get(name)
            elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                yield name, None


def _calls(function: types.FunctionType) -> int:
    """How many places of a function call attention, helpers of its module included."""
    found = 0
    for helper in (function, *_helpers(function)):
        for name, value in _loads(helper):
            found += name in _NAMES or value is SDPA or value is DISPATCH
    return found


def _helpers(function: types.FunctionType) -> list[types.FunctionType]:
    """What a function reaches: through globals in its module, and what it decorates."""
    found: list[types.FunctionType] = []
    queue = [function]
    while queue:
        current = queue.pop()
        reached = [
            value
            for _, value in _loads(current)
            if isinstance(value, types.FunctionType) and value.__globals__ is current.__globals__
        ]
        for value in reached + _decorated(current):
            if value not in found and value is not function:
                found.append(value)
                queue.append(value)
    return found


def _decorated(function: types.FunctionType) -> list[types.FunctionType]:
    """The functions in a function's cells: what a decorator's wrapper calls."""
    return [
        value
        for value in map(_content, function.__closure__ or ())
        if isinstance(value, types.FunctionType)
    ]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


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


#: What a processor calls that computes the softmax by hand, or has xFormers do it.
_BY_HAND = frozenset(("get_attention_scores", "softmax", "memory_efficient_attention"))


def computes_softmax(cls: Any) -> bool:
    """Does a processor class compute softmax attention where nothing can be routed?"""
    return _computes_softmax(cls)


@functools.cache
def _computes_softmax(cls: type) -> bool:
    named: dict[str, list[types.FunctionType]] = {}  # the one that is called, then those below it
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, value in vars(base).items():
                if isinstance(value, types.FunctionType):
                    named.setdefault(name, []).append(value)
    return any(_by_hand(functions) for functions in named.values())


def _by_hand(functions: list[types.FunctionType]) -> bool:
    first, *below = functions
    reached = {name for each in (first, *_helpers(first)) for name, _ in _loads(each)}
    return bool(reached & _BY_HAND) or ("super" in reached and bool(below) and _by_hand(below))


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


# ---------------------------------------------------------------------- redirected globals
_PREFIX = "_sage_"


class _ModuleView(types.ModuleType):
    """A module as rebuilt code sees it: the same at any time, but for a few attributes."""

    def __init__(self, module: types.ModuleType, **changed: Any):
        super().__init__(module.__name__)
        self.__dict__.update(changed, _sage_module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sage_module"], name)


@functools.cache
def _views(routers: Routers) -> dict[types.ModuleType, _ModuleView]:
    """The modules through which code spells an attention function out."""
    functional = _ModuleView(nn.functional, scaled_dot_product_attention=routers.sdpa)
    nn_view = _ModuleView(nn, functional=functional)
    dispatcher = _ModuleView(attention_dispatch, dispatch_attention_fn=routers.dispatch)
    models = _ModuleView(diffusers.models, attention_dispatch=dispatcher)
    return {
        nn.functional: functional,
        nn: nn_view,
        torch: _ModuleView(torch, nn=nn_view),
        attention_dispatch: dispatcher,
        diffusers.models: models,
        diffusers: _ModuleView(diffusers, models=models),
    }


def _substitutes(function: types.FunctionType, routers: Routers) -> dict[str, Any]:
    """What the function's code shall find in place of some globals, by their names."""
    found: dict[str, Any] = {}
    functions = {SDPA: routers.sdpa, DISPATCH: routers.dispatch, ROTARY: routers.rotary}
    loads = dict(_loads(function))
    for name, value in loads.items():
        if isinstance(value, types.ModuleType) and any(each in _NAMES for each in loads):
            found[name] = _views(routers).get(value)
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            found[name] = functions.get(value)
    return {name: value for name, value in found.items() if value is not None}


def _rebuild(function: types.FunctionType, routers: Routers) -> types.FunctionType:
    """The function with its attention redirected, and so that of the helpers which it reaches."""
    own = function.__globals__
    names = {}
    for name, value in _substitutes(function, routers).items():
        names[name] = _PREFIX + name
        own[_PREFIX + name] = value
    helpers = _helpers(function)
    for name, value in dict(_loads(function)).items():
        if isinstance(value, types.FunctionType) and value in helpers and _calls(value):
            names[name] = _PREFIX + name
            if getattr(own.get(_PREFIX + name), "_sage_of", None) is not value:
                own[_PREFIX + name] = types.SimpleNamespace(
                    _sage_of=value
                )  # helpers may call each other
                own[_PREFIX + name] = _rebuild(value, routers)
                own[_PREFIX + name]._sage_of = value
    code = with_pairs_routed(function.__code__)
    if code is not function.__code__:
        own[PAIRS] = routers.rotate_pairs
    cells = tuple(_rebuilt_cell(cell, routers) for cell in function.__closure__ or ())
    new = types.FunctionType(
        _renamed(code, names), own, function.__name__, function.__defaults__, cells
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__ = function.__qualname__
    new.__dict__.update(function.__dict__)
    return new


def _rebuilt_cell(cell: types.CellType, routers: Routers) -> types.CellType:
    """A decorator's cell with the function that it decorates; any other stays the very same."""
    inner = _content(cell)
    if isinstance(inner, types.FunctionType) and _calls(inner):
        return types.CellType(_rebuild(inner, routers))
    return cell


def _renamed(code: types.CodeType, names: Mapping[str, str]) -> types.CodeType:
    """The code with other names for some globals, in the functions inside of it too."""
    own = [names.get(name, name) for name in code.co_names]
    raw = bytearray(code.co_code)
    for i in dis.get_instructions(code):
        if i.opcode not in dis.hasname or i.opname == "LOAD_GLOBAL" or i.argval not in names:
            continue
        # The name is also an attribute's, say, which keeps it: `self.attention` beside `attention`.
        if i.argval not in own:
            own.append(i.argval)
        raw[i.offset + 1] = _with_name(i, own.index(i.argval))
    consts = (_renamed(c, names) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_code=bytes(raw), co_names=tuple(own), co_consts=tuple(consts))


def _with_name(instruction: dis.Instruction, index: int) -> int:
    """The argument of an instruction that is to name another entry of the code's names."""
    assert instruction.arg is not None
    flags = 0  # in the argument's lowest bits, below the index
    if instruction.opname == "LOAD_ATTR" and sys.version_info >= (3, 12):
        index, flags = index << 1, instruction.arg & 1
    elif instruction.opname == "LOAD_SUPER_ATTR":
        index, flags = index << 2, instruction.arg & 3
    if index | flags > 255:
        raise ValueError("a function with so many names can't be rebuilt")
    return index | flags


@functools.cache
def rebound_class(cls: type, routers: Routers) -> type:
    """``cls`` with its attention calls rerouted; ``cls`` itself where it makes none.

    Inherited functions are rebound in their own place of the method resolution order, so an
    override that reaches attention through ``super()`` keeps working.
    """
    namespace: dict[str, Any] = {}
    for name, function, kind in _own(cls):
        new = _rebuild(function, routers)
        namespace[name] = kind(new) if kind else new
    bases = [rebound_class(base, routers) for base in cls.__bases__ if attention_sites(base)]
    if not namespace and not bases:
        return cls
    namespace["__module__"] = cls.__module__
    return type(cls)(cls.__name__, (cls, *bases), namespace)
