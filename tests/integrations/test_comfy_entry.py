"""The file that ComfyUI loads from `custom_nodes`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# A fresh process without the installed package, loading the folder as ComfyUI does.
LOAD = f"""
import importlib.util, inspect, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
path = list(sys.path)
for name in ("comfy", "comfy_api", "triton", "matplotlib", "diffusers"):
    sys.modules[name] = None
name = {str(ROOT / "pack")!r}.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
"""


def run(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_loading_the_folder_makes_the_library_importable_and_touches_no_path(tmp_path):
    run(
        LOAD
        + f"""
assert sys.path == path
assert "nodes" not in sys.modules and "kernels" not in sys.modules
assert "torch" not in sys.modules  # nothing heavy before ComfyUI asks for the nodes
assert inspect.iscoroutinefunction(module.comfy_entrypoint)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")  # with both, ComfyUI would ignore the nodes
import sage_diffusion.nodes, sage_diffusion.kernels.spec
assert sage_diffusion.__file__.startswith({str(ROOT)!r})
""",
        tmp_path,
    )


def test_a_library_that_is_loaded_already_is_kept(tmp_path):
    run(
        "import sys, types\nsys.modules['sage_diffusion'] = mine = types.ModuleType('mine')\n"
        + LOAD
        + "assert sys.modules['sage_diffusion'] is mine\n",
        tmp_path,
    )


def test_outside_comfyui_the_file_does_nothing(tmp_path):
    run(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "module = __import__('__init__')\n"
        "assert not hasattr(module, 'comfy_entrypoint')\n"
        "assert 'sage_diffusion' not in sys.modules\n",
        tmp_path,
    )
