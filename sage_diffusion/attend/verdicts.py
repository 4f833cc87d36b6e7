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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from sage_diffusion.files import user_cache, write_text
from sage_diffusion.json_files import json_path, read_if_there, shown
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
    document = read_if_there(path, VerdictError)
    if document is None:
        return []
    try:
        found = _object(document, {"version": int, "cards": list})
        if found["version"] != VERSION:
            raise VerdictError(f"version must be {VERSION}, got {shown(found['version'])}")
        return [_entry(data, ("cards", i)) for i, data in enumerate(found["cards"])]
    except VerdictError as error:
        raise VerdictError(f"{path} holds no verdicts: {error}") from None


def _entry(data: Any, at: tuple[str | int, ...]) -> Entry:
    entry = _object(data, {"stand": dict, "date": str, "kernels": list}, at)
    stand = _object(entry["stand"], dict.fromkeys(_names(Stand), str), (*at, "stand"))
    kernels = []
    for i, each in enumerate(entry["kernels"]):
        here = (*at, "kernels", i)
        known = _object(each, {**dict.fromkeys(_names(Known), str), "head_dims": list}, here)
        for j, dim in enumerate(known["head_dims"]):
            if type(dim) is not int or dim not in (64, 128, 256):
                where = json_path((*here, "head_dims", j))
                raise VerdictError(f"{where} must be 64, 128 or 256, got {shown(dim)}")
        kernels.append(Known(**{**known, "head_dims": tuple(known["head_dims"])}))
    return Entry(Stand(**stand), entry["date"], tuple(kernels))


def _names(kind: type[Stand] | type[Known]) -> list[str]:
    return [each.name for each in fields(kind)]


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def _object(
    data: Any, kinds: dict[str, type[Any]], at: tuple[str | int, ...] = ()
) -> dict[str, Any]:
    """An object of exactly these keys, whose values are of these types."""
    if not isinstance(data, dict):
        raise VerdictError(f"{json_path(at)} must be an object, got {shown(data)}")
    for key in (*kinds, *data):
        where = json_path((*at, key))
        if key not in kinds:
            raise VerdictError(f"{where} must not be there: unknown key")
        if key not in data:
            raise VerdictError(f"{where} is missing")
        if type(data[key]) is not kinds[key]:
            raise VerdictError(f"{where} must be {_KINDS[kinds[key]]}, got {shown(data[key])}")
    return data


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
        same = (known.backend, known.formats) == (backend, spec.formats)
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
