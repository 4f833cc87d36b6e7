"""The user's file of verdicts: which kernel ``sage-diffusion verify`` found wrong on which card.

``backend="auto"`` leaves such a kernel out, with that reason; a backend that was named runs it.
A verdict holds for one card, driver and set of versions: after an update of any of them nothing is
known.  A file that can't be read is ignored with one warning.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sage_diffusion.files import user_cache, write_text
from sage_diffusion.kernels.formats import padded_dim
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.machine import driver_version, version

log = logging.getLogger("sage_diffusion")

VERSION = 1

#: Statuses of kernels that "auto" leaves out.  What does not compile it finds out call by call.
OFF = ("wrong", "failed")


class VerdictError(ValueError):
    """A file holds no verdicts; the message says what is wrong with it."""


@dataclass(frozen=True)
class Stand:
    """What a verdict holds for: a card and everything whose change may change a result."""

    card: str
    driver: str
    torch: str
    triton: str
    sage_diffusion: str


@dataclass(frozen=True)
class Known:
    """What is known of one kernel on one stand.

    Attributes:
        backend: one whose kernels are ours.
        formats: "int4/fp8-fast"; smoothing and rotation are not in an attention kernel.
        status: "right", "wrong", "failed", "not compiled" or "not run".
        reason: "" if it is right.
        head_dims: padded ones (64, 128, 256) that "auto" must leave to another backend.
    """

    backend: str
    formats: str
    status: str
    reason: str = ""
    head_dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Entry:
    """The verdicts on one stand, and the day of the last ones."""

    stand: Stand
    date: str
    kernels: tuple[Known, ...] = field(default_factory=tuple)

    @property
    def off(self) -> tuple[Known, ...]:
        """Kernels that "auto" leaves out."""
        return tuple(k for k in self.kernels if k.status in OFF and k.head_dims)


def default_path() -> Path:
    """Where the user's file lies."""
    return user_cache() / "verdicts.json"


def read(path: Path) -> list[Entry]:
    """Entries of a file; none if there is no file.

    Raises:
        VerdictError: the file holds no verdicts.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise VerdictError(f"{path} can't be read: {error}") from None
    try:
        if document["version"] != VERSION:
            raise ValueError(f"version must be {VERSION}, got {document['version']!r}")
        return [_entry(data) for data in document["cards"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise VerdictError(f"{path} holds no verdicts: {said}") from None


def _entry(data: dict[str, Any]) -> Entry:
    stand = Stand(**data["stand"])
    kernels = [Known(**{**k, "head_dims": tuple(k["head_dims"])}) for k in data["kernels"]]
    texts = [*vars(stand).values(), data["date"]]
    for known in kernels:
        texts += [known.backend, known.formats, known.status, known.reason]
        if not set(known.head_dims) <= {64, 128, 256}:
            raise ValueError(f"head_dims must be 64, 128 or 256, got {known.head_dims}")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a text must stand where {text!r} does")
    return Entry(stand, data["date"], tuple(kernels))


def write(path: Path, stand: Stand, date: str, kernels: Iterable[Known]) -> None:
    """Add verdicts on a stand; those on other kernels and cards stay.

    Raises:
        VerdictError: there is a file that holds no verdicts; it stays as it is.
        OSError: the folder can't be written to; nothing was.
    """
    entries = {entry.stand: entry for entry in read(path)}
    before = entries[stand].kernels if stand in entries else ()
    merged = {(k.backend, k.formats): k for k in (*before, *kernels)}
    entries[stand] = Entry(stand, date, tuple(merged.values()))
    cards = [asdict(entry) for entry in entries.values()]
    write_text(path, json.dumps({"version": VERSION, "cards": cards}, indent=1) + "\n")


@functools.lru_cache(maxsize=1)
def user_entries() -> tuple[Entry, ...]:
    """The user's file, read once; empty with one warning if it can't be read."""
    try:
        return tuple(read(default_path()))
    except VerdictError as error:
        log.warning("%s; no verdict is heeded (sage-diffusion verify makes new ones)", error)
        return ()


def formats(spec: AttentionSpec) -> str:
    """A kernel's variant: "int8/fp8-fast"."""
    fast = "-fast" if spec.pv_accumulator == "fp16" else ""
    return f"{spec.qk.value}/{spec.pv.value}{fast}"


def latest(card: str) -> Entry | None:
    """The verdicts that hold for a card as it stands now, None without any."""
    entries = [entry for entry in user_entries() if entry.stand.card == card]
    if not entries:  # the driver is not asked where nothing is known
        return None
    here = stand_of(card)
    return next((entry for entry in entries if entry.stand == here), None)


def describe(card: str) -> list[str]:
    """The last verdicts on a card in words: what was found when, or that nothing is known."""
    entry = latest(card)
    if entry is None:
        before = [entry for entry in user_entries() if entry.stand.card == card]
        if not before:
            return ["not verified yet: run sage-diffusion verify"]
        return [
            "last verified under another driver, PyTorch, Triton or version of this package "
            f"({before[-1].date}): run sage-diffusion verify again"
        ]
    right = [k for k in entry.kernels if k.status == "right"]
    lines = [f"verified {entry.date}: {len(right)} of {len(entry.kernels)} kernels right"]
    for known in entry.kernels:
        if known.status != "right":
            name = f"{known.backend} {known.formats}"
            off = ", left out by backend='auto'" if known in entry.off else ""
            lines.append(f"{name} {known.status}{off}: {known.reason}")
    return lines


def switched_off(card: str | None, backend: str, spec: AttentionSpec, head_dim: int) -> str | None:
    """Why "auto" must not take a kernel on this card, None if nothing speaks against it."""
    if card is None or not user_entries():
        return None
    entry = latest(card)
    for known in entry.off if entry else ():
        same = (known.backend, known.formats) == (backend, formats(spec))
        if same and padded_dim(head_dim) in known.head_dims:
            return f"sage-diffusion verify found it {known.status} here: {known.reason}"
    return None


def stand_of(card: str) -> Stand:
    """A card with today's driver and versions."""
    return Stand(
        card,
        driver_version(),
        str(torch.__version__),
        version("triton") or version("triton-windows") or "none",
        version("sage-diffusion") or "checkout",
    )
