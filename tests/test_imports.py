"""The one-way arrow, the order of folders, the name trap, and what an import may cost."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Folders in their order: each imports only what stands in a row above its own, or itself.
ORDER = (
    ("kernels",),
    ("sage_diffusion.files", "sage_diffusion.json_files", "sage_diffusion.machine"),
    ("sage_diffusion.plan",),
    ("sage_diffusion.attend",),
    ("sage_diffusion.accuracy", "sage_diffusion.speed"),
    ("sage_diffusion.adapt", "sage_diffusion.kv", "sage_diffusion.verify", "sage_diffusion.vq"),
    (
        "sage_diffusion.integrations.comfy",
        "sage_diffusion.integrations.diffusers",
        "sage_diffusion.integrations.transformers",
    ),
    ("sage_diffusion.commands", "nodes"),
    ("sage_diffusion.cli",),
    ("sage_diffusion.__main__",),
    ("sage_diffusion",),  # the public names, which nothing inside imports
)

#: What may lie beside the folders in ``sage_diffusion/``; anything else belongs into one.
BESIDE = {
    *("__init__.py", "__main__.py", "cli.py", "files.py", "json_files.py", "machine.py"),
    "py.typed",
}

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


def module_of(path):
    """Dotted name of a file; a package's is its folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    """Every module of the project -> its file."""
    files = (path for folder in FORBIDDEN for path in (ROOT / folder).rglob("*.py"))
    return {module_of(path): path for path in files}


def imported(path, known):
    """Modules of the project that a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # As they lie in a checkout: beside the package, not inside it.
            for folder in ("kernels", "nodes"):
                name = name.replace(f"sage_diffusion.{folder}", folder)
            while name and name not in known:  # `from a.b import C`: C may be a name of a.b
                name = name.rpartition(".")[0]
            if name:
                yield name


def graph():
    """Module -> the modules that it imports."""
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def folder_of(module):
    """The entry of :data:`ORDER` that a module belongs to, the most exact one."""
    entries = [entry for row in ORDER for entry in row]
    fitting = [e for e in entries if module == e or module.startswith(e + ".")]
    return max(fitting, key=len)


def circle(edges):
    """Nodes of a circle, first and last equal; None without one."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_file_imports_itself_by_a_detour():
    assert circle(graph()) is None


def test_no_folder_imports_itself_by_a_detour():
    """The kernels' own folders too: each file counts as its folder, a file beside folders alone."""
    packages = {module_of(path) for path in modules().values() if path.name == "__init__.py"}
    tops = packages - {name.rpartition(".")[0] for name in packages}

    def home(module):
        return (
            module
            if module in tops
            else max((p for p in tops if module.startswith(p + ".")), key=len, default=module)
        )

    edges = {}
    for module, targets in graph().items():
        edges.setdefault(home(module), set()).update(home(t) for t in targets)
    assert circle({name: targets - {name} for name, targets in edges.items()}) is None


def test_folders_import_only_what_stands_before_them():
    rank = {entry: i for i, row in enumerate(ORDER) for entry in row}
    wrong = [
        f"{module} imports {target}"
        for module, targets in sorted(graph().items())
        for target in sorted(targets)
        if folder_of(module) != folder_of(target)
        and rank[folder_of(target)] >= rank[folder_of(module)]
    ]
    assert not wrong


def test_no_kernel_imports_a_twin():
    """What both must know stands beside them, in a third file."""
    assert not [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if module.startswith("kernels.") and target.endswith(".reference")
        if not module.endswith(".reference")
    ]


def test_every_entry_of_the_order_exists():
    known = modules()
    assert all(entry in known for row in ORDER for entry in row)


def test_nothing_lies_flat_in_the_package():
    beside = {path.name for path in (ROOT / "sage_diffusion").iterdir() if path.is_file()}
    assert beside == BESIDE


def test_importing_anything_leaves_the_public_names_what_they_are(tmp_path):
    """A module named like a public name would take its place: ``attention`` must stay callable."""
    rooms = ("plan", "attend", "accuracy", "speed", "adapt", "kv", "verify", "vq")
    names = sorted(
        n for n in modules() if n.startswith(tuple(f"sage_diffusion.{r}." for r in rooms))
    )
    assert names
    code = f"""
import importlib, types
import sage_diffusion
import sage_diffusion.kv
import sage_diffusion.vq
for name in {names!r}:
    importlib.import_module(name)
for package in (sage_diffusion, sage_diffusion.kv, sage_diffusion.vq):
    here = vars(package)
    taken = [name for name in package.__all__ if isinstance(here.get(name), types.ModuleType)]
    assert not taken, taken
assert callable(sage_diffusion.attention)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


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


def test_a_host_that_is_not_installed_is_named_with_its_remedy(tmp_path):
    code = """
import sys
sys.modules["transformers"] = None  # as where it is not installed
import sage_diffusion.kv
try:
    sage_diffusion.kv.KVCache
except ImportError as error:
    print(error)
"""
    done = run(code, tmp_path)
    asked = "sage_diffusion.kv.KVCache needs transformers: pip install 'sage-diffusion[kv]'"
    assert done.stdout.strip() == asked, done.stderr


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
from sage_diffusion import AttentionSession, attention
from sage_diffusion.attend import backends
(triton,) = (record for record in backends.BACKENDS if record.name == "triton")
assert triton.load().args[0].__name__ == "attention"
table = Path.cwd() / ".cache" / "sage-diffusion" / "tuning.json"
table.parent.mkdir(parents=True)
table.write_text("{}")
from sage_diffusion.attend import launches
launches.user_entries.cache_clear()
assert launches.user_entries() == ()
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tuning.json can't be read: import of pydantic halted" in done.stderr


def test_import_time_beyond_torch(tmp_path):
    code = """
import time
start = time.process_time()
import torch
own = time.process_time()
import sage_diffusion
print((time.process_time() - own) / (own - start))
"""
    assert float(run(code, tmp_path).stdout) < 0.1  # 0.001 measured


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
