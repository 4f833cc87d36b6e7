"""Where other people's machine code comes from: read, unpacked, never imported or executed.

It is a file (cubin, shared library, wheel) or a package by name: the one that is installed, else
its wheel in a folder, by default this package's cache, else, only if that is asked for, its wheel
from the package index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from sage_diffusion.files import user_cache

#: Files that may hold machine code for a GPU.
SUFFIXES = (".so", ".pyd", ".dll", ".cubin")


class LibraryError(ValueError):
    """There is no such file or package, or no machine code in it; the message says which."""


def default_folder() -> Path:
    """Where wheels are kept."""
    return user_cache() / "wheels"


@contextmanager
def libraries(
    target: str, wheels: Path | None = None, download: bool = False
) -> Iterator[tuple[str, list[Path]]]:
    """A package's name and its files with machine code for NVIDIA cards.

    Args:
        target: a path, or a package's name.
        wheels: folder to look for a package's wheel, the cache if None.
        download: fetch a wheel that is in neither place into that folder, with pip.

    Raises:
        LibraryError: there is nothing of the kind.
    """
    path = Path(target)
    if path.suffix.lower() == ".whl" or path.is_file():
        if not path.is_file():
            raise LibraryError(f"{target} must be a file, there is none")
        if path.suffix.lower() != ".whl":
            yield path.name.split(".")[0], [path]
            return
    else:
        package = _normal(target)
        if not re.fullmatch(r"\w+", package) or path.suffix in SUFFIXES:
            raise LibraryError(
                f"{target} must be a file or a package's name, there is no such file"
            )
        installed = _installed(package)
        if installed is not None:
            yield package, _with_device_code(installed, target)
            return
        path = _wheel(package, wheels or default_folder(), download)
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with zipfile.ZipFile(path) as wheel:
                inside = [name for name in wheel.namelist() if name.endswith(SUFFIXES)]
                paths = [Path(wheel.extract(name, unpacked)) for name in inside]
        except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
            raise LibraryError(f"{path} must be a wheel, it is no zip file: {error}") from None
        yield _normal(path.name.split("-")[0]), _with_device_code(paths, target)


def _normal(name: str) -> str:
    """How a wheel's file name spells a package: "comfy-kitchen" -> "comfy_kitchen"."""
    return re.sub(r"[-_.]+", "_", name).lower()


def _installed(package: str) -> list[Path] | None:
    """Files of an installed package, None if it isn't."""
    try:
        files = metadata.files(package.replace("_", "-")) or []
    except metadata.PackageNotFoundError:
        return None
    return [Path(str(file.locate())) for file in files if file.suffix in SUFFIXES]


def _wheel(package: str, folder: Path, download: bool) -> Path:
    """The package's wheel in a folder, the one that came last if there are several."""

    def here() -> list[Path]:
        return [p for p in folder.glob("*.whl") if _normal(p.name.split("-")[0]) == package]

    if not here() and download:
        _download(package, folder)
    if not here():
        raise LibraryError(
            f"{package} must be installed, or its wheel be in {folder}: neither is so "
            "(--download fetches the wheel and runs none of its code)"
        )
    return max(here(), key=lambda path: path.stat().st_mtime)


def _download(package: str, folder: Path) -> None:
    """Fetch a wheel with pip.  Wheels only: building a source distribution would run its code."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as partial:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", partial]
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
        arrived = list(Path(partial).glob("*.whl"))
        if done.returncode or not arrived:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            why = next((line for line in said if line.startswith("ERROR")), "\n".join(said[-1:]))
            raise LibraryError(
                f"pip could not download a wheel of {package}: {why or 'no wheel came'}"
            )
        for wheel in arrived:
            os.replace(wheel, folder / wheel.name)


def _with_device_code(paths: Iterable[Path], target: str) -> list[Path]:
    """Of a package's libraries those for NVIDIA cards: HIP's say so in their path."""
    found = [path for path in paths if "hip" not in path.parts]
    if not found:
        raise LibraryError(f"{target} must hold machine code, found no {', '.join(SUFFIXES)} in it")
    return found
