"""Files that are never half-written, and where the user's lie."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """This package's folder for what can be made again; it need not exist."""
    caches = Path("AppData/Local") if sys.platform == "win32" else Path(".cache")
    return Path.home() / caches / "sage-diffusion"


def write_bytes(path: Path, data: bytes) -> None:
    """Write through a temporary name in the same folder, then rename over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give the result the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))
