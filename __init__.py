"""Entry point of ComfyUI, which loads this folder from ``custom_nodes``."""

import importlib.util
import sys
from pathlib import Path

WEB_DIRECTORY = "./web"

if __package__:  # pytest imports this file too, as a module without a package
    # The library beside this file, unless somebody has imported an installed one already.  Nothing
    # goes on `sys.path`: `nodes` is ComfyUI's own module there.
    if "sage_diffusion" not in sys.modules:
        _file = Path(__file__).resolve().parent / "sage_diffusion" / "__init__.py"
        _spec = importlib.util.spec_from_file_location("sage_diffusion", _file)
        sys.modules["sage_diffusion"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["sage_diffusion"])

    async def comfy_entrypoint():
        """The pack's nodes, imported when ComfyUI asks for them."""
        from sage_diffusion.nodes import SageExtension

        return SageExtension()
