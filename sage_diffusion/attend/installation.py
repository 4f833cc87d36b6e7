"""What is wrong with this machine's installation, each in one line that says what to do.

PyTorch for CUDA pins its Triton on Linux, so that pip brings the two that belong together.  Builds
for the CPU pin none, and Windows has Triton as ``triton-windows``: :func:`triton_requirement` says
which one then belongs to PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import shutil
from pathlib import Path

import torch

Version = tuple[int, int]

#: The Triton that each PyTorch pins in its metadata.
TRITON_OF_TORCH: dict[Version, Version] = {
    (2, 10): (3, 6),
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
    (2, 15): (3, 9),
}


def triton_requirement(torch_version: str, system: str | None = None) -> str:
    """For pip, the Triton that belongs to a PyTorch; the newest to one newer than the table.

    Raises:
        ValueError: this PyTorch is older than any whose Triton the kernels can use.
    """
    torch_minor = _minor(torch_version)
    oldest = min(TRITON_OF_TORCH)
    if torch_minor < oldest:
        raise ValueError(f"torch must be {_text(oldest)} or newer, found {torch_version}")
    name = "triton-windows" if (system or platform.system()) == "Windows" else "triton"
    if torch_minor not in TRITON_OF_TORCH:
        return name
    return f"{name}=={_text(TRITON_OF_TORCH[torch_minor])}.*"


def refuse_triton(version: Version | None, needed: Version, kernels: str) -> str | None:
    """None if kernels can use the installed Triton, else what to install.

    Args:
        version: of the installed Triton, None without one.
        needed: the oldest that will do.
        kernels: the module that holds them; a Triton that lost a name that it uses is too new.
    """
    if version is None:
        return f"triton is not installed: {_remedy(needed)}"
    if version < needed:
        return f"needs triton {_text(needed)} or newer, found {_text(version)}: {_remedy(needed)}"
    return _broken(version, needed, kernels)


def problems(version: Version | None, needed: Version, kernels: str) -> list[str]:
    """What keeps kernels from running on this machine's GPU, the first thing to do first.

    ``version``, ``needed`` and ``kernels`` as in :func:`refuse_triton`.
    """
    if platform.system() == "Darwin":  # there is no Triton and nothing to do
        return []
    found = [_driver(), refuse_triton(version, needed, kernels), _cache()]
    return [line for line in found if line is not None]


def _remedy(needed: Version) -> str:
    """What brings a Triton that will do."""
    if torch.version.hip:
        return "PyTorch for ROCm brings its own, install that again"
    newest = max(TRITON_OF_TORCH)
    if TRITON_OF_TORCH.get(min(_minor(torch.__version__), newest), (0, 0)) < needed:
        fit = min(t for t, triton in TRITON_OF_TORCH.items() if triton >= needed)
        return f"pip install 'torch>={_text(fit)}', whose Triton is new enough"
    return f"pip install '{triton_requirement(torch.__version__)}'"


@functools.lru_cache(maxsize=8)
def _broken(version: Version, needed: Version, kernels: str) -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a library of C++ fails in many ways
        text = f"triton {_text(version)} is broken ({_one_line(error)})"
        return f"{text}: {_remedy(needed).replace('install', 'install --force-reinstall', 1)}"
    try:
        importlib.import_module(kernels)
    except Exception as error:
        text = f"triton {_text(version)} lacks what the kernels use ({_one_line(error)})"
        return f"{text}: {_remedy(needed)}"
    return None


def _driver() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        if shutil.which("nvidia-smi") is None:
            return None  # a machine without a GPU, and a PyTorch that wants none
        return f"torch {torch.__version__} has no CUDA: install PyTorch's build for CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # says whether there is no driver or one too old
        return f"torch {torch.__version__} finds no GPU: {_one_line(error)}"
    return f"torch {torch.__version__} finds no GPU"


def _cache() -> str | None:
    """Triton compiles into a folder; without one every process would stop at its first kernel."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    return f"triton cannot write to {folder}: set TRITON_CACHE_DIR to a folder that you can write"


def _minor(version: str) -> Version:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _one_line(error: Exception) -> str:
    """Type and first sentence."""
    text = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
