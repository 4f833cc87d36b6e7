"""ComfyUI nodes: schemas, and one call into the library each.  This file imports no ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage_diffusion.nodes.extension import SageExtension

__all__ = ["SageExtension"]


def __getattr__(name: str) -> Any:
    if name != "SageExtension":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sage_diffusion.nodes.extension import SageExtension

    return SageExtension
