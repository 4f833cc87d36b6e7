"""The user's table of launch configurations: which one was found best on which card.

``sage-diffusion tune`` writes it, the backends read it once.  Kernels know no files: they are
handed a function that looks a launch up.  A table that can't be read is ignored with one warning.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sage_diffusion.attend.launch import Entry, TableError
from sage_diffusion.files import user_cache, write_text
from sage_diffusion.json_files import read_if_there
from sage_diffusion.kernels.attention import tuning
from sage_diffusion.kernels.attention.record import Kernels
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.machine import version

log = logging.getLogger("sage_diffusion")


def default_path() -> Path:
    """Where the user's table lies."""
    return user_cache() / "tuning.json"


def read(path: Path) -> list[Entry]:
    """Entries of a table; none if there is no file.

    Raises:
        TableError: the file is no table.
    """
    data = read_if_there(path, TableError)
    if data is None:
        return []
    # Only who has a table needs what checks it: PyTorch and Triton alone run every kernel.
    try:
        from sage_diffusion.attend.launches_json import parse_table
    except ImportError as error:
        raise TableError(f"{path} can't be read: {error}") from None
    try:
        return parse_table(data)
    except TableError as error:
        raise TableError(f"{path} is no table of launches: {error}") from None


def write(path: Path, entries: list[Entry]) -> None:
    """Add entries to a table, replacing those of the same card, Triton and kernel.

    Raises:
        TableError: there is a file that is no table; it stays as it is.
    """
    from sage_diffusion.attend.launches_json import format_table

    merged = {entry.key: entry for entry in (*read(path), *entries)}
    write_text(path, format_table(list(merged.values())))


def as_launch(kernels: Kernels, arch: str, head_dim: int, knobs: dict[str, int]) -> Any:
    """A launch with these knobs; the rest is the architecture's own.

    Args:
        kernels: whose.
        arch: "sm_89".
        head_dim: padded.
        knobs: values of :attr:`.Kernels.knobs`.
    """
    return kernels.launch(arch, head_dim, None)._replace(**knobs)


def knobs_of(kernels: Kernels, launch: NamedTuple) -> dict[str, int]:
    """The other way round."""
    return {name: getattr(launch, name) for name in kernels.knobs}


@functools.lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """PyTorch's name of a GPU, the device's type elsewhere."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def lookup(entries: list[Entry], kernels: Kernels) -> Callable[..., Any] | None:
    """What a kernel's entry takes as ``tuned``; None where nothing is known of the backend.

    A launch that was measured on a card of this very name comes first, then one that was predicted
    for its kind: "rtx4090" stands for "NVIDIA GeForce RTX 4090" and its variants.
    """
    here = version("triton") or version("triton-windows")
    known = [
        e for e in entries if (e.backend, e.triton) == (kernels.name, here) and _fits(e, kernels)
    ]
    if not known:
        return None

    @functools.lru_cache(maxsize=256)
    def tuned(device: torch.device, spec: AttentionSpec, head_dim: int) -> Any:
        arch, name = tuning.architecture(device), device_name(device)
        kind = re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
        predicted = None
        for entry in known:
            if (entry.arch, entry.formats, entry.head_dim) != (arch, spec.formats, head_dim):
                continue
            if entry.source == "measured" and entry.gpu == name:
                return as_launch(kernels, arch, head_dim, entry.launch)
            if entry.source == "predicted bound" and kind.startswith(entry.gpu):
                predicted = as_launch(kernels, arch, head_dim, entry.launch)
        return predicted

    return tuned


def _fits(entry: Entry, kernels: Kernels) -> bool:
    """Whether a launch has the backend's knobs; a warning where it hasn't."""
    if set(entry.launch) == set(kernels.knobs):
        return True
    log.warning(
        "a launch of %s must have %s, got %s; it is not used",
        kernels.name,
        ", ".join(kernels.knobs),
        ", ".join(entry.launch),
    )
    return False


@functools.lru_cache(maxsize=1)
def user_entries(path: Path | None = None) -> tuple[Entry, ...]:
    """The user's table, read once; empty with one warning if it can't be read."""
    try:
        return tuple(read(path or default_path()))
    except TableError as error:
        log.warning("%s; the built-in launches are used", error)
        return ()


def bound(run: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """A kernel's entry that uses the user's table."""
    tuned = lookup(list(user_entries()), kernels)
    return run if tuned is None else functools.partial(run, tuned=tuned)
