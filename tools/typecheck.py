"""mypy over the package as it is installed: `kernels/` and `nodes/` under `sage_diffusion`.

mypy does not follow the import hook that joins the folders in a checkout, so they are laid out in
a temporary folder first.  Errors are printed with the checkout's paths.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "sage_diffusion"
        ignore = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(ROOT / "sage_diffusion", package, ignore=ignore)
        for name in ("kernels", "nodes"):
            shutil.copytree(ROOT / name, package / name, ignore=ignore)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        # No cache: it would remember the temporary folder of the run before.
        command += ["--cache-dir", os.devnull, "-p", "sage_diffusion"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    for name in ("kernels", "nodes"):
        done.stdout = done.stdout.replace(f"sage_diffusion/{name}/", f"{name}/")
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
