"""diffusers: any pipeline's or model's attention through an ``AttentionSession``, and back."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sage_diffusion.integrations.diffusers needs diffusers: "
        "pip install 'sage-diffusion[diffusers]'"
    ) from error

from sage_diffusion.integrations.diffusers.control import (
    PipeControl,
    SageAttnProcessor,
    apply,
    enable,
)
from sage_diffusion.integrations.diffusers.patch import Patch, PatchSummary, model_name

__all__ = [
    "Patch",
    "PatchSummary",
    "PipeControl",
    "SageAttnProcessor",
    "apply",
    "enable",
    "model_name",
]
