"""Who computes the attention calls that are left alone: other nodes, ComfyUI's own, the checkpoint.

ComfyUI 0.31 and newer have more than one attention of their own.  A node of theirs, *Model
Attention Backend*, stands where overrides of other packs stand (``set_model_optimized_attention``),
and a checkpoint may name a function for each of its layers (``ComfyAttention``, given to the call
as ``preferred_attention``), which ComfyUI takes only where no override is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

#: The function of ComfyUI's ``ModelPatcher`` that makes the override of its own node.
_CORES_OWN = "set_model_optimized_attention.<locals>"


def beside(
    previous: Callable[..., Any] | None, preferred: Sequence[int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a report says of those who serve the calls that we leave alone: warnings, and notes.

    Args:
        previous: the override below ours, if any.
        preferred: on each device, the number of layers whose checkpoint names a function.
    """
    alarms, notes = [], []
    name = getattr(previous, "__qualname__", type(previous).__name__)
    if previous is not None and _CORES_OWN in name:
        choice = _chosen(previous)
        notes.append(f"calls left alone here run as ComfyUI's Model Attention Backend says{choice}")
    elif previous is not None:
        alarms.append(f"calls left alone here go to another node's override ({name})")
    layers = max(preferred, default=0)
    if layers:
        notes.append(f"the checkpoint names an attention of its own for {layers} layers")
        notes[-1] += ": it computes those that are left alone" if previous is None else ""
    return tuple(alarms), tuple(notes)


def _chosen(override: Callable[..., Any]) -> str:
    """The function that ComfyUI's own node put there, by its name in brackets."""
    code, cells = getattr(override, "__code__", None), getattr(override, "__closure__", None) or ()
    found = dict(zip(getattr(code, "co_freevars", ()), cells, strict=False))
    function = found.get("optimized_attention")
    name = None if function is None else getattr(function.cell_contents, "__name__", None)
    return f" ({name})" if name else ""


def preferred_of(blocks: Mapping[str, nn.Module]) -> dict[str, Callable[..., Any]]:
    """Block name -> the function that its checkpoint names for its attention.

    Args:
        blocks: of the model; one with several such attentions does not say which is which.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name, block in blocks.items():
        named = [m for m in block.modules() if type(m).__name__ == "ComfyAttention"]
        function = getattr(named[0], "function", None) if len(named) == 1 else None
        if callable(function):
            found[name] = function
    return found
