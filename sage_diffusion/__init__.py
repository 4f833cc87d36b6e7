"""Quantized attention whose precision adapts per layer and timestep, with proof of what it costs.

    from sage_diffusion import enable
    enable(pipe).set_attn_processor("int8/fp8")     # any diffusers pipeline

Importing this package imports neither Triton nor diffusers nor ComfyUI.
"""

from pathlib import Path as _Path

# In a checkout `kernels/` and `nodes/` stand beside this folder.  They are imported under this
# package's name only: as top-level modules they would shadow other projects' of the same name.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels" / "__init__.py").is_file():
    __path__.append(str(_root))
