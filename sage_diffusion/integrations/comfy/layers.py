"""Which attention layer of a ComfyUI model is being called, and reaching those that hide.

Names are the same in every run and every ComfyUI version: ``double.07`` is the first attention
call of the eighth block of kind "double", ``double.07.1`` the second (a cross-attention, say),
``input.04.0.attn1`` a UNet's.  ComfyUI tells them in ``transformer_options`` for some models and
versions only; elsewhere the same names come from the block modules themselves, whose ``forward`` is
replaced for the duration of one model call.  Only calls outside every block are numbered.

PixArt, HunyuanDiT and a few others call ``optimized_attention`` without ``transformer_options``, so
that no override is asked.  Their ``forward`` runs with private globals in which that one name is
ours, for the duration of one model call too.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class LayerCursor:
    """Where one model call stands.  One per device: they run in threads of their own."""

    block: str | None = None  # from the modules, None outside blocks
    nth: dict[str, int] = field(default_factory=dict)  # calls so far, by block

    def reset(self) -> None:
        """A model call begins."""
        self.block = None
        self.nth.clear()

    def name(self, options: Mapping[str, Any], cross: bool = False) -> str:
        """The layer of the call that happens now; counts it.

        Args:
            options: the call's ``transformer_options``, may be empty.
            cross: the keys are other tokens than the queries.
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
        n = self._count(block)
        return block if n == 0 else f"{block}.{n}"

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

    def visit(module: nn.Module, path: str) -> None:
        for attribute, child in module.named_children():
            members = _numbered(child)
            if members is None:
                visit(child, f"{path}{attribute}.")
                continue
            kind = KINDS.get(attribute, attribute) if not path else path + attribute
            for i, block in members:
                found.setdefault(f"{kind}.{i:02d}", block)

    visit(_original(model), "")
    return found


def layer_names(model: nn.Module) -> list[str]:
    """Names that a run will use, as far as the modules tell before it: first calls of blocks."""
    model = _original(model)
    if not hasattr(model, "input_blocks"):
        return [
            *blocks_of(model),
            *(n for n in reach_of(model).hidden if n not in blocks_of(model)),
        ]
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
        closed: paths of modules that call PyTorch's attention directly; these can't.
    """

    hidden: Mapping[str, nn.Module]
    closed: tuple[str, ...]


def reach_of(model: nn.Module) -> Reach:
    """Look at the code of every module below ``model``, once per class."""
    model = _original(model)
    names = {id(block): name for name, block in blocks_of(model).items()}
    hidden: dict[str, nn.Module] = {}
    closed: list[str] = []
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
            closed.append(path)
    return Reach(hidden, tuple(closed))


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
        return "open" if "transformer_options" in names else "hidden"
    return "closed" if "scaled_dot_product_attention" in names else "open"


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


class ModulePatch:
    """``forward`` of blocks and of hidden attention, replaced inside :meth:`applied` only.

    Replacing is an entry in the instance's ``__dict__``, so that what is left behind is exactly
    what was there, also after an error.
    """

    def __init__(self, model: nn.Module, cursor: LayerCursor, call: HiddenCall):
        self.reach = reach_of(model)
        self._forwards: list[tuple[nn.Module, Callable[..., Any], Callable[..., Any] | None]] = []
        hidden = {id(module) for module in self.reach.hidden.values()}
        for name, module in self.reach.hidden.items():
            self._add(module, _with_private_attention(module, name, call))
        if not hasattr(_original(model), "input_blocks"):  # a UNet says where it is
            for name, block in blocks_of(model).items():
                if id(block) not in hidden:
                    self._add(block, _in_block(block, name, cursor))

    def fits(self, model: nn.Module | None) -> bool:
        """False once blocks were replaced, or patched by somebody else, since this was made."""
        if model is None:
            return False
        mine = {id(module) for module, _, _ in self._forwards}
        unet = hasattr(_original(model), "input_blocks")
        return (unet or all(id(block) in mine for block in blocks_of(model).values())) and all(
            module.__dict__.get("forward") is before for module, _, before in self._forwards
        )

    def _add(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._forwards.append((module, forward, module.__dict__.get("forward")))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Modules are patched inside the block."""
        for module, forward, _ in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _, before in self._forwards:
                if before is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = before


def _in_block(block: nn.Module, name: str, cursor: LayerCursor) -> Callable[..., Any]:
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        before = cursor.block
        cursor.block = name
        out = inner(*args, **kwargs)
        # No `finally`: every model call begins with a reset, and torch.compile can't resume
        # inside a `try`.
        cursor.block = before
        return out

    return forward


def _with_private_attention(module: nn.Module, name: str, call: HiddenCall) -> Callable[..., Any]:
    original = type(module).forward
    host = original.__globals__[_HOST_FUNCTION]

    def attention(*args: Any, **kwargs: Any) -> Any:
        return call(name, host, args, kwargs)

    private = types.FunctionType(
        original.__code__,
        {**original.__globals__, _HOST_FUNCTION: attention},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    private.__kwdefaults__ = original.__kwdefaults__
    return types.MethodType(private, module)
