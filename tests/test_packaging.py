"""The wheel and the folder dropped somewhere: both must import under one name only."""

import subprocess
import sys
import zipfile

import pytest
from wheels import ROOT, build_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


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
    assert "sage_diffusion/assets/causal_video/transformer/config.json" in names
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
