"""What is kept of a verification: the user's verdicts, and a document that can be sent."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sage_diffusion.attend import backends, verdicts
from sage_diffusion.verify.kernels import Kernel
from sage_diffusion.verify.places import ROOT, Place
from sage_diffusion.verify.run import Verdict

#: Version of the document.
VERSION = 1


def today() -> str:
    """The day, "2025-01-31"."""
    return datetime.date.today().isoformat()


def remember(
    place: Place, found: Iterable[Verdict], kernels: Iterable[Kernel], path: Path | None = None
) -> Path:
    """Store the verdicts on attention kernels in the user's cache; "auto" heeds them from now on.

    Raises:
        VerdictError, OSError: they can't be stored; nothing was written.
    """
    path = path or verdicts.default_path()
    known = {kernel.name: kernel for kernel in kernels}
    kept = []
    for verdict in found:
        kernel = known.get(verdict.kernel)
        if kernel is None or verdict.status == "not run":
            continue
        kept.append(
            verdicts.Known(
                kernel.backend,
                kernel.spec.formats,
                verdict.status,
                verdict.reason,
                verdict.head_dims,
            )
        )
    verdicts.write(path, verdicts.stand_of(place.name), today(), kept)
    verdicts.user_entries.cache_clear()
    backends.select.cache_clear()
    return path


def document(
    place: Place,
    found: Iterable[Verdict],
    refused: dict[str, str],
    timings: Iterable[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Everything as plain data for JSON, without names of people, machines and folders."""
    whole = {
        "version": VERSION,
        "date": today(),
        "seconds": round(seconds, 1),
        "machine": machine(place),
        "verdicts": [verdict.as_dict() for verdict in found],
        "refused": refused,
        "timings": list(timings),
    }
    cleaned: dict[str, Any] = scrubbed(whole)
    return cleaned


def machine(place: Place) -> dict[str, Any]:
    """The card, the driver and the versions that a result may depend on."""
    stand = verdicts.stand_of(place.name)
    found: dict[str, Any] = {
        **vars(stand),
        "architecture": place.arch,
        "emulated": place.emulated,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }
    if place.device.type == "cuda":
        card = torch.cuda.get_device_properties(place.device)
        found |= {
            "memory_gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
        }
    return found


def commit() -> str | None:
    """The checkout's commit, "+" behind it where files were changed; None where it is none."""
    if not (ROOT / ".git").exists():
        return None
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(ROOT), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] + ("+" if said[1] else "")


#: Absolute paths of POSIX and of Windows: everything up to the last folder's end.
_FOLDERS = re.compile(r"(?<![\w./:])(?:~|/|[A-Za-z]:[\\/])(?:[^\s'\":;,()/\\]+[\\/])+")


def scrubbed(value: Any) -> Any:
    """Texts without folders: a compiler's message tells where the user's home is."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, dict):
        return {key: scrubbed(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(inner) for inner in value]
    return value
