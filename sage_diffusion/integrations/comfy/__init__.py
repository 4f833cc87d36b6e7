"""ComfyUI: a MODEL's attention through an ``AttentionSession``, and back."""

from sage_diffusion.integrations.comfy.model import (
    OVERRIDE,
    ModelAttention,
    attach,
    attached,
    marked_off,
    patch,
    status,
    without,
)

__all__ = [
    "OVERRIDE",
    "ModelAttention",
    "attach",
    "attached",
    "marked_off",
    "patch",
    "status",
    "without",
]
