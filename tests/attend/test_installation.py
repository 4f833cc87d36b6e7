"""One line for whatever is wrong with an installation."""

import subprocess
import sys

import pytest
import torch

from sage_diffusion import machine
from sage_diffusion.attend import backends, installation
from sage_diffusion.attend.installation import problems, refuse_triton, triton_requirement
from sage_diffusion.cli import main
from sage_diffusion.integrations.comfy.doctor import diagnosis

KERNELS = "sage_diffusion.kernels.attention.triton"


@pytest.fixture(autouse=True)
def forgotten():
    installation._broken.cache_clear()
    yield
    installation._broken.cache_clear()


@pytest.mark.parametrize(
    ("torch_version", "system", "found"),
    [
        ("2.10.0", "Linux", "triton==3.6.*"),
        ("2.13.0+cpu", "Linux", "triton==3.7.*"),
        ("2.14.1+cu130", "Windows", "triton-windows==3.8.*"),
        ("2.99.0.dev20270101", "Linux", "triton"),
    ],
)
def test_the_triton_that_belongs_to_a_torch(torch_version, system, found):
    assert triton_requirement(torch_version, system) == found


def test_a_torch_too_old_for_the_kernels_is_named():
    with pytest.raises(ValueError, match=r"torch must be 2.10 or newer, found 2.9.1"):
        triton_requirement("2.9.1+cu128")


@pytest.mark.parametrize(
    ("torch_version", "system", "version", "line"),
    [
        ("2.11.0", "Linux", None, "triton is not installed: pip install 'triton==3.6.*'"),
        ("2.11.0", "Windows", None, "not installed: pip install 'triton-windows==3.6.*'"),
        ("2.14.0", "Linux", (3, 5), "needs triton 3.6 or newer, found 3.5: pip install 'triton=="),
        ("2.9.1", "Linux", (3, 5), "found 3.5: pip install 'torch>=2.10', whose Triton is new"),
        ("2.8.0", "Windows", None, "pip install 'torch>=2.10', whose Triton is new enough"),
        ("2.99.0", "Linux", None, "triton is not installed: pip install 'triton'"),
    ],
)
def test_missing_or_old(monkeypatch, torch_version, system, version, line):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(installation.platform, "system", lambda: system)
    found = refuse_triton(version, (3, 6), KERNELS)
    assert line in found and "\n" not in found


def test_a_triton_that_does_not_import(tmp_path):
    (tmp_path / "triton").mkdir()
    text = "raise ImportError('libtriton.so: undefined symbol: _ZN4mlir.\\nAnd more')"
    (tmp_path / "triton" / "__init__.py").write_text(text)
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
torch.__version__ = "2.12.1"
from sage_diffusion.attend.installation import refuse_triton
print(refuse_triton((3, 7), (3, 6), {KERNELS!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == (
        "triton 3.7 is broken (ImportError: libtriton.so: undefined symbol: _ZN4mlir): "
        "pip install --force-reinstall 'triton==3.7.*'\n"
    )


def test_a_triton_without_a_name_that_the_kernels_use(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kernels_of_tomorrow.py").write_text("import triton\ntriton.gone\n")
    found = refuse_triton((9, 0), (3, 6), "kernels_of_tomorrow")
    assert "triton 9.0 lacks what the kernels use (AttributeError: module 'triton' has" in found
    assert "pip install 'triton==" in found


def test_a_triton_that_works():
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    assert machine.triton_version() == version
    assert refuse_triton(version, (3, 6), KERNELS) is None


@pytest.fixture
def with_cuda(monkeypatch):
    """A PyTorch for CUDA on a machine where it finds no GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")


@pytest.mark.parametrize(
    "said",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "The NVIDIA driver on your system is too old (found version 11040). Please update",
    ],
)
def test_a_driver_that_is_missing_or_too_old(monkeypatch, with_cuda, said):
    def init():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "init", init)
    first = problems((3, 7), (3, 6), KERNELS)[0]
    assert first == f"torch 2.13.0+cu130 finds no GPU: RuntimeError: {said.split('. ')[0]}"


def test_a_torch_for_the_cpu_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/usr/bin/{name}")
    first = problems((3, 7), (3, 6), KERNELS)[0]
    assert first == "torch 2.13.0+cpu has no CUDA: install PyTorch's build for CUDA"


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (line,) = [line for line in problems(None, (3, 6), KERNELS) if "TRITON_CACHE_DIR" in line]
    assert f"cannot write to {tmp_path / 'file' / 'cache'}" in line
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert not [line for line in problems(None, (3, 6), KERNELS) if "TRITON_CACHE_DIR" in line]


def test_the_doctors_say_it_first(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)  # so that there is no driver to miss
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "triton_version", lambda: None)
    assert main(["doctor", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("to do: triton is not installed: pip install 'triton==")
    assert diagnosis("cpu").splitlines()[0] == lines[0]
    monkeypatch.setattr(installation.platform, "system", lambda: "Darwin")
    assert backends.problems() == []
