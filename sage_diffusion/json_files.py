"""JSON that users hand in: read with care, and every refusal names the JSON path.

Python's reader takes what no standard allows and other readers refuse (NaN, a key that occurs
twice), and fails with errors of its own on what is only too much (nesting, long numbers).  What
passes here is plain data that can be computed with, shown and written again.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Files of more bytes are not read: the largest score tables have some ten million.
LARGEST = 256 << 20

#: Lists and objects inside of each other; plans and tables need six.
DEEPEST = 64

_DIGITS = 300  # of a whole number, which as a float must be finite

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}:,]', re.DOTALL)


class JSONError(ValueError):
    """A text is no JSON, or holds what no file of ours may; the message names the JSON path."""


class NotJSON(JSONError):
    """A text that does not even begin to be JSON, or breaks off."""


class _Twice(dict[str, Any]):
    """An object in which a key occurs more than once."""

    key = ""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def read_if_there(path: Path, error: type[Exception]) -> Any:
    """The JSON of a file; None if there is no file.

    Args:
        path: of the file.
        error: what is raised if it can't be read.
    """
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, JSONError) as reason:
        raise error(f"{path} can't be read: {reason}") from None
    if found is None:
        raise error(f"{path} can't be read: it holds null")
    return found


def shown(value: object) -> str:
    """What a message quotes of a value: its ``repr``, at most some eighty characters of it."""
    if isinstance(value, int) and value.bit_length() > 1000:  # which Python may refuse to write
        return f"a whole number of some {int(value.bit_length() * 0.30103)} digits"
    text = _short.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def json_path(location: Sequence[int | str], whole: str = "the document") -> str:
    """``rules[1].spec`` of the keys and indices that lead to a value; long ones are shortened."""
    parts: list[str] = []
    for part in location[:8]:
        name = f"[{part}]" if isinstance(part, int) else _printable(part)
        parts.append(name if isinstance(part, int) or not parts else f".{name}")
    more = ".." if len(location) > 8 else ""
    return "".join(parts) + more or whole


def _printable(key: str) -> str:
    short = key if len(key) <= 60 else f"{key[:57]}..."
    return short.encode("ascii", "backslashreplace").decode() if _lone(short) else short


def read_json(path: str | Path) -> Any:
    """What a file holds, see :func:`parse_json`.

    Raises:
        OSError: it can't be read.
        JSONError: it is too large, not UTF-8 or no JSON that is taken here.
    """
    with Path(path).open("rb") as file:  # no more is read, of an endless device neither
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise JSONError(f"must have at most {LARGEST >> 20} MiB, has more")
    try:
        return parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise JSONError("is not UTF-8 text") from None


def parse_json(text: str) -> Any:
    """Plain data of a JSON text; a byte-order mark before it is skipped.

    Raises:
        NotJSON: it is none, or breaks off; the message names line and column.
        JSONError: a number that is not finite or has more than 300 digits, half of a surrogate
            pair, a key that occurs twice, more than 64 lists and objects inside of each other.
    """
    text = text.removeprefix("\ufeff")
    try:
        data = json.loads(text, parse_int=_whole, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise NotJSON(f"is not JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise _too_deep(_deep_path(text)) from None
    _check(data)
    return data


def _whole(text: str) -> int | float:
    """Python refuses whole numbers of 4,300 digits without saying where they stand."""
    return int(text) if len(text) <= _DIGITS else math.inf


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = _Twice(found)
    twice.key = next(name for i, name in enumerate(names) if name in names[:i])
    return twice


def _check(data: Any) -> None:
    """Refuse what :func:`parse_json` names; without recursion, paths only where they are needed."""
    # (value, how deep, (where its parent stands, its key)); the first to be refused comes first.
    waiting: list[tuple[Any, int, Any]] = [(data, 0, None)]
    while waiting:
        value, depth, place = waiting.pop()
        kind = type(value)
        if kind is str:
            if not value.isascii() and _lone(value):
                raise JSONError(f"{_path(place)} must be Unicode text, got {shown(value)}")
        elif kind is float:
            if not math.isfinite(value):
                raise JSONError(
                    f"{_path(place)} must be a finite number of at most {_DIGITS} digits"
                )
        elif kind is list:
            if depth >= DEEPEST:
                raise _too_deep(_path(place))
            # Most numbers of a large table need no place of their own.
            kinds = set(map(type, value))
            if kinds <= {float, int, type(None)} and all(map(math.isfinite, filter(None, value))):
                continue
            waiting += [(x, depth + 1, (place, i)) for i, x in enumerate(value)][::-1]
        elif isinstance(value, dict):
            if depth >= DEEPEST:
                raise _too_deep(_path(place))
            if isinstance(value, _Twice):
                raise JSONError(f"{_path((place, value.key))} must occur once, occurs again")
            if not "".join(value).isascii() and any(map(_lone, value)):
                key = next(filter(_lone, value))
                raise JSONError(f"{_path((place, key))} must be a key of Unicode text")
            waiting += [(x, depth + 1, (place, key)) for key, x in value.items()][::-1]


def _lone(text: str) -> bool:
    """Is half of a surrogate pair in it, which no file can hold?"""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _path(place: Any) -> str:
    parts: list[int | str] = []
    while place is not None:
        place, key = place
        parts.append(key)
    return json_path(parts[::-1])


def _too_deep(path: str) -> JSONError:
    return JSONError(f"{path} must have at most {DEEPEST} lists and objects inside of each other")


def _deep_path(text: str) -> str:
    """Where a text is nested too deeply."""
    places: list[int | str] = []
    last = ""
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in "[{":
            if len(places) == DEEPEST:
                break
            places.append(0 if mark == "[" else "")
        elif mark in "]}":
            places.pop()
        elif mark == ":":
            places[-1] = last
        elif mark != ",":
            last = mark[1:-1]
        elif isinstance(places[-1], int):
            places[-1] += 1
    return json_path(places)
