"""The one-way arrow, the name trap, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: What each layer must not import: the arrow is kernels <- core <- integrations <- nodes.
FORBIDDEN = {
    "kernels": ("sage_diffusion", "diffusers", "comfy", "nodes"),
    "sage_diffusion": ("sage_diffusion.nodes", "diffusers", "comfy", "comfy_api", "nodes"),
    "nodes": ("diffusers", "kernels"),
}


def imports(path):
    """Absolute names that a file imports anywhere, relative ones resolved inside the package."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join(base + ([node.module] if node.module else []))


def sources():
    for folder, banned in FORBIDDEN.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield pytest.param(path, folder, banned, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize(("path", "folder", "banned"), list(sources()))
def test_the_arrow(path, folder, banned):
    in_adapter = "integrations" in path.parts
    for name in imports(path):
        for bad in banned:
            if in_adapter and bad in ("diffusers", "comfy", "comfy_api", "nodes"):
                continue
            if name == bad or name.startswith(bad + "."):
                pytest.fail(f"{path.relative_to(ROOT)} imports {name}")


def run(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_imports_no_heavy_or_foreign_module(tmp_path):
    code = """
import sys
for name in ("triton", "diffusers", "comfy", "matplotlib", "scipy"):
    sys.modules[name] = None  # importing it would fail
import sage_diffusion
from sage_diffusion import AttentionSpec, AttentionSession, PrecisionPlan, Rule, attention
import torch
attention(*[torch.randn(1, 1, 4, 8)] * 3, "int4/fp8-fast")
assert "kernels" not in sys.modules and "nodes" not in sys.modules
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_kernels_load_with_nothing_but_pytorch_and_triton(tmp_path):
    """Only a table of launches needs what checks it."""
    pytest.importorskip("triton")
    code = """
import sys
from pathlib import Path
for name in ("pydantic", "typer", "rich", "safetensors", "scipy", "diffusers", "transformers"):
    sys.modules[name] = None  # importing it would fail
Path.home = classmethod(lambda cls: cls.cwd())
from sage_diffusion import AttentionSession, attention, backends
(triton,) = (record for record in backends.BACKENDS if record.name == "triton")
assert triton.load().__name__ == "attention"
table = Path.cwd() / ".cache" / "sage-diffusion" / "tuning.json"
table.parent.mkdir(parents=True)
table.write_text("{}")
from sage_diffusion import launches
launches.user_entries.cache_clear()
assert launches.user_entries() == ()
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tuning.json can't be read: import of pydantic halted" in done.stderr


def test_import_time_beyond_torch(tmp_path):
    code = """
import time, torch
start = time.process_time()
import sage_diffusion
print(time.process_time() - start)
"""
    assert float(run(code, tmp_path).stdout) < 0.1


def test_a_checkout_works_without_installation(tmp_path):
    code = f"""
import sys
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})] + [{str(ROOT)!r}]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import sage_diffusion.kernels.formats, sage_diffusion.kernels.attention.reference
assert "kernels" not in sys.modules
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_unknown_attributes_raise():
    import sage_diffusion

    with pytest.raises(AttributeError, match="no attribute 'sage'"):
        sage_diffusion.sage  # noqa: B018
    assert set(sage_diffusion.__all__) <= set(dir(sage_diffusion))
