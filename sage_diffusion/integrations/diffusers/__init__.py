"""diffusers: any pipeline's or model's attention through an :class:`AttentionSession`.

from sage_diffusion import enable
enable(pipe).set_attn_processor("int8/fp8")     # a spec, a plan or the path of one
image = pipe("a cat").images[0]
print(pipe.sage.summary())                      # which layer ran what
pipe.set_attn_processor(None)                   # as it was, bit for bit
"""

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
