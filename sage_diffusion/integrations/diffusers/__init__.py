"""diffusers: any pipeline's or model's attention through an ``AttentionSession``, and back."""

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
