"""The wheel and the folder dropped somewhere: both must import under one name only."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in tracked:  # a copy: a build in the tree would leave build/ and egg-info behind
        path = ROOT / name
        if path.is_file() and not name.startswith(("tests/", "docs/", "workflows/")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"sage_diffusion"}
    for folder, prefix in (
        ("kernels", "sage_diffusion/kernels"),
        ("nodes", "sage_diffusion/nodes"),
        ("sage_diffusion", "sage_diffusion"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "sage_diffusion" / "plan" / "shipped").glob("*.json"):
        assert f"sage_diffusion/plan/shipped/{path.name}" in names
    assert "sage_diffusion/assets/emoji_dit/transformer/config.json" in names
    assert "sage_diffusion/accuracy/report.html.j2" in names


def test_the_wheel_imports_and_attends(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, {str(tmp_path / "site")!r})
import torch, sage_diffusion
assert sage_diffusion.__file__.startswith({str(tmp_path)!r}), sage_diffusion.__file__
sage_diffusion.attention(*[torch.randn(1, 1, 4, 8)] * 3, "int8/fp8")
assert "kernels" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
