"""Which attention layer of a ComfyUI model is being called, and reaching those that hide.

Names are the same in every run and every ComfyUI version: ``double.07`` is the first attention
of the eighth block of kind "double", ``double.07.1`` the second (a cross-attention, say),
``input.04.0.attn1`` a UNet's.  Parts of one attention that a model calls one after the other share
its name, so that it stays the same when a cache spares the earlier ones.  ComfyUI tells names in
``transformer_options`` for some models and versions only; elsewhere the same names come from hooks
on the block modules.  Only calls outside every block are numbered.

PixArt, HunyuanDiT and a few others call ``optimized_attention`` without ``transformer_options``, so
that no override is asked.  Their ``forward`` is rebuilt with another name in that one's place.

Other nodes patch the same modules: before a run, when ComfyUI loads the model in its course, or on
the bare model.  So nothing is remembered of what stood where.  Hooks leave ``forward`` alone, and
everything is put on when a model call begins and taken off when it ends.
"""

from __future__ import annotations

import contextlib
import dis
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

#: Attribute that holds a model's blocks -> kind of block, as newer ComfyUI versions name them in
#: ``transformer_options["block_type"]``.  Other lists go by their own attribute's name.
KINDS = {
    "blocks": "double",
    "double_blocks": "double",
    "double_layers": "double",
    "double_stream_blocks": "double",
    "joint_blocks": "double",
    "layers": "double",
    "transformer_blocks": "double",
    "visual_transformer_blocks": "double",
    "single_blocks": "single",
    "single_stream_blocks": "single",
    "single_layers": "single",
    "single_transformer_blocks": "single",
}

_HOST_FUNCTION = "optimized_attention"
_OUR_FUNCTION = "_sage_optimized_attention"


@dataclass
class LayerCursor:
    """Where one model call stands.  One per device: they run in threads of their own."""

    block: str | None = None  # from the modules, None outside blocks
    nth: dict[str, int] = field(default_factory=dict)  # attentions so far, by block
    queries: dict[str, int] = field(default_factory=dict)  # of the block's first attention so far

    def reset(self) -> None:
        """A model call begins."""
        self.block = None
        self.nth.clear()
        self.queries.clear()

    def name(
        self,
        options: Mapping[str, Any],
        cross: bool = False,
        tokens: tuple[int, int] | None = None,
    ) -> str:
        """The layer of the call that happens now; counts it.

        Args:
            options: the call's ``transformer_options``, may be empty.
            cross: the keys are other tokens than the queries.
            tokens: queries and keys of the call.
        """
        unet = options.get("block")
        if isinstance(unet, (tuple, list)) and len(unet) == 2:
            return self._unet(unet, options, cross)
        kind, index = options.get("block_type"), options.get("block_index")
        if isinstance(kind, str) and isinstance(index, int):
            block: str | None = f"{kind}.{index:02d}"
        else:
            block = self.block
        if block is None:
            return f"call.{self._count('call'):02d}"
        if tokens is not None and self._continues(block, *tokens):
            return block
        n = self._count(block)
        return block if n == 0 else f"{block}.{n}"

    def _continues(self, block: str, queries: int, keys: int) -> bool:
        """Is the call a further part of the block's first attention?

        Of one that is causal by parts - text, references, then the picture (Qwen-Image 2.1) - each
        has the keys of all parts up to its own.
        """
        before = self.queries.get(block, 0)
        if self.nth.get(block, 0) > 1 or (before and keys != before + queries):
            return False
        self.queries[block] = before + queries
        return before > 0

    def _unet(self, unet: Any, options: Mapping[str, Any], cross: bool) -> str:
        block = f"{unet[0]}.{int(unet[1]):02d}.{options.get('block_index', 0)}"
        n = self._count(block)
        # A patch may replace attn1: a call with other keys is attn2 even when it comes first.
        return f"{block}.attn{2 if cross or n % 2 else 1}"

    def _count(self, block: str) -> int:
        n = self.nth.get(block, 0)
        self.nth[block] = n + 1
        return n


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Block name -> module: the members of every outermost ``ModuleList``, or of a ``ModuleDict``
    whose keys are numbered (Cosmos's ``block0``, ``block1``, ..).

    Lists of one kind in different places (a refiner's ``blocks`` beside the model's) keep the path
    that leads to them: ``txt_in.blocks.00``.
    """
    found: dict[str, nn.Module] = {}
    for name, block in _blocks(_original(model), ""):
        found.setdefault(name, block)
    return found


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    # No function inside `blocks_of`: one that calls itself is a cycle, and would keep its modules
    # until Python's cycle collector runs.
    for attribute, child in module.named_children():
        members = _numbered(child)
        if members is None:
            yield from _blocks(child, f"{path}{attribute}.")
            continue
        kind = KINDS.get(attribute, attribute) if not path else path + attribute
        for i, block in members:
            yield f"{kind}.{i:02d}", block


def layer_names(model: nn.Module) -> list[str]:
    """Names that a run will use, as far as the modules tell before it."""
    model = _original(model)
    if not hasattr(model, "input_blocks"):
        # Some classes have a `forward` with attention that their own model never calls (SD3's):
        # where a file asks for overrides anywhere, what does not is taken to be such.
        reach = reach_of(model)
        hidden = [n for n, module in reach.hidden.items() if not _file_asks(type(module))]
        names = []
        for name, block in blocks_of(model).items():
            if not any(n == name or n.startswith(f"{name}.") for n in hidden):
                names += [name, *(f"{name}.{i}" for i in range(1, _calls(block)))]
        return names + hidden
    names = []
    for kind, parts in (
        ("input", model.input_blocks),
        ("middle", [model.middle_block]),
        ("output", model.output_blocks),
    ):
        for i, part in enumerate(parts):  # type: ignore[arg-type]
            lists = [
                m.transformer_blocks for m in part.modules() if hasattr(m, "transformer_blocks")
            ]
            for blocks in lists:
                for j in range(len(blocks)):
                    names += [f"{kind}.{i:02d}.{j}.attn1", f"{kind}.{i:02d}.{j}.attn2"]
    return names


def _calls(block: nn.Module) -> int:
    """Attention calls of a block that ask for overrides, one at least."""
    found = 0
    for kind in map(type, block.modules()):
        code = getattr(getattr(kind, "forward", None), "__code__", None)
        found += code is not None and {_HOST_FUNCTION, "transformer_options"} <= _names(code)
    return found or 1


def _file_asks(module_type: type) -> bool:
    """Does any function of a class's file call the host's attention with options?"""
    functions: list[Any] = []
    for member in vars(sys.modules[module_type.__module__]).values():
        functions += vars(member).values() if isinstance(member, type) else [member]
    codes = (getattr(f, "__code__", None) for f in functions)
    names = (_names(code) for code in codes if code is not None)
    return any({_HOST_FUNCTION, "transformer_options"} <= found for found in names)


def _numbered(module: nn.Module) -> list[tuple[int, nn.Module]] | None:
    """Index and member, None where the module is no numbered container."""
    if isinstance(module, nn.ModuleList):
        return list(enumerate(module))
    if isinstance(module, nn.ModuleDict) and len(module):
        found = [(re.search(r"\d+$", key), member) for key, member in module.items()]
        if all(match is not None for match, _ in found):
            return [(int(match[0]), member) for match, member in found if match is not None]
    return None


@dataclass(frozen=True)
class Reach:
    """What no override of a model's attention gets to see.

    Attributes:
        hidden: layer name -> module whose ``forward`` calls ``optimized_attention`` without
            ``transformer_options``; these can be reached.
        closed: layer name -> module that calls PyTorch's attention directly; these can't.
    """

    hidden: Mapping[str, nn.Module]
    closed: Mapping[str, nn.Module]


def reach_of(model: nn.Module) -> Reach:
    """Look at the code of every module below ``model``, once per class."""
    model = _original(model)
    names = {id(block): name for name, block in blocks_of(model).items()}
    hidden: dict[str, nn.Module] = {}
    closed: dict[str, nn.Module] = {}
    seen: dict[type, str] = {}
    inside: dict[str, str] = {}  # module path -> name of its block
    for path, module in model.named_modules():
        if id(module) in names:
            inside[path] = names[id(module)]
        kind = seen.get(type(module))
        if kind is None:
            kind = seen[type(module)] = _classify(type(module))
        if kind == "hidden":
            hidden[_module_name(path, inside)] = module
        elif kind == "closed":
            closed[_module_name(path, inside)] = module
    return Reach(hidden, closed)


def _module_name(path: str, inside: Mapping[str, str]) -> str:
    best = max(
        (block for block in inside if path == block or path.startswith(f"{block}.")),
        key=len,
        default=None,
    )
    if best is None:
        return path
    return f"{inside[best]}{path[len(best) :]}"


def _classify(module_type: type) -> str:
    forward = getattr(module_type, "forward", None)
    code = getattr(forward, "__code__", None)
    if code is None:
        return "open"
    names = _names(code)
    if _HOST_FUNCTION in getattr(forward, "__globals__", {}) and _HOST_FUNCTION in names:
        if "transformer_options" in names:
            return "open"
        return "hidden" if _only_global(code) else "closed"
    return "closed" if "scaled_dot_product_attention" in names else "open"


def _only_global(code: types.CodeType) -> bool:
    """Is the host's function read as a global and nothing else of its name?"""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return all(map(_only_global, inner)) and all(
        i.opname == "LOAD_GLOBAL"
        for i in dis.get_instructions(code)
        if i.opcode in dis.hasname and i.argval == _HOST_FUNCTION
    )


def _names(code: types.CodeType) -> set[str]:
    """Every name, and every keyword of a call, in a function and the functions inside it."""
    names = {*code.co_names, *code.co_varnames, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
        elif isinstance(constant, tuple):
            names |= {x for x in constant if isinstance(x, str)}
    return names


def _original(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


#: ``call(name, host_function, args, kwargs)``
HiddenCall = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

DIRECT = "it calls PyTorch's attention directly"
FOREIGN = "another node's patch stands on its forward; bypass that node"


class ModulePatch:
    """What is put on a model's modules inside :meth:`applied`, and on none of them outside.

    Modules are held weakly: a model that nobody else holds is freed at once.

    Args:
        model: whose attention is to be named and reached.
        cursor: is told which block runs.
        unreached: gets why attention was not reached -> modules in which it happened.
    """

    def __init__(self, model: nn.Module, cursor: LayerCursor, unreached: dict[str, set[str]]):
        reach = reach_of(model)
        self._model = weakref.ref(model)
        self._cursor, self._unreached = cursor, unreached
        # A UNet says where it is.
        blocks = {} if hasattr(_original(model), "input_blocks") else blocks_of(model)
        self._blocks = [(name, weakref.ref(block)) for name, block in blocks.items()]
        self._hidden = [(name, weakref.ref(module)) for name, module in reach.hidden.items()]
        self._closed = [(name, weakref.ref(module)) for name, module in reach.closed.items()]

    def fits(self, model: nn.Module) -> bool:
        """False for another model, and once blocks were replaced since this was made."""
        if self._model() is not model:
            return False
        if not self._blocks:
            return True
        return [ref() for _, ref in self._blocks] == list(blocks_of(model).values())

    @contextlib.contextmanager
    def applied(self, call: HiddenCall) -> Iterator[None]:
        """Modules are patched inside the block; what others do to them meanwhile stays.

        Args:
            call: serves attention that no override is asked about.
        """
        undo: list[Callable[[], Any]] = []
        try:
            for name, ref in self._blocks:
                if (block := ref()) is not None:
                    undo += _in_block(block, name, self._cursor)
            for name, ref in self._closed:
                if (module := ref()) is not None:
                    undo.append(self._watched(module, name))
            for name, ref in self._hidden:
                if (module := ref()) is None:
                    continue
                if "forward" in module.__dict__:
                    self._miss(FOREIGN, name)
                else:
                    undo.append(_reached(module, name, call))
            yield
        finally:
            for done in reversed(undo):
                done()

    def _watched(self, module: nn.Module, name: str) -> Callable[[], Any]:
        def called(module: nn.Module, args: Any) -> None:
            self._miss(DIRECT, name)

        return module.register_forward_pre_hook(called).remove

    def _miss(self, why: str, name: str) -> None:
        self._unreached.setdefault(why, set()).add(name)


def _in_block(block: nn.Module, name: str, cursor: LayerCursor) -> list[Callable[[], Any]]:
    def enter(block: nn.Module, args: Any) -> None:
        cursor.block = name

    def leave(block: nn.Module, args: Any, out: Any) -> None:
        cursor.block = None  # not after an error, but every model call begins with a reset

    return [
        block.register_forward_pre_hook(enter).remove,
        block.register_forward_hook(leave).remove,
    ]


# ---------------------------------------------------------------------- attention that hides
class _Running(threading.local):
    """The hidden attention that this thread is in: its name, and who serves its calls."""

    module: tuple[str, HiddenCall] | None = None


_running = _Running()


def _reached(module: nn.Module, name: str, call: HiddenCall) -> Callable[[], Any]:
    rebuilt = _rebuilt(cast(types.FunctionType, type(module).forward))
    serving: list[tuple[str, HiddenCall]] = [(name, call)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        before = _running.module
        _running.module = serving[0] if serving else None
        try:
            return rebuilt(module, *args, **kwargs)
        finally:
            _running.module = before

    def undo() -> None:
        serving.clear()  # somebody may have wrapped it meanwhile
        if module.__dict__.get("forward") is forward:
            del module.__dict__["forward"]

    module.__dict__["forward"] = forward
    return undo


def _rebuilt(function: types.FunctionType) -> types.FunctionType:
    """The function, calling our name where it calls the host's; all other globals are its own."""
    own = function.__globals__
    if _OUR_FUNCTION not in own:

        def attention(*args: Any, **kwargs: Any) -> Any:
            host = own[_HOST_FUNCTION]
            if _running.module is None:
                return host(*args, **kwargs)
            name, call = _running.module
            return call(name, host, args, kwargs)

        own[_OUR_FUNCTION] = attention
    new = types.FunctionType(
        _renamed(function.__code__),
        own,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _renamed(code: types.CodeType) -> types.CodeType:
    return code.replace(
        co_names=tuple(_OUR_FUNCTION if n == _HOST_FUNCTION else n for n in code.co_names),
        co_consts=tuple(
            _renamed(c) if isinstance(c, types.CodeType) else c for c in code.co_consts
        ),
    )
