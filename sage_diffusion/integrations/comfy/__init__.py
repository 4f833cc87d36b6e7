"""ComfyUI: a MODEL's attention through an ``AttentionSession``, and back."""

from sage_diffusion.integrations.comfy.model import (
    ModelAttention,
    attach,
    attached,
    patch,
    without,
)

__all__ = ["ModelAttention", "attach", "attached", "patch", "without"]
