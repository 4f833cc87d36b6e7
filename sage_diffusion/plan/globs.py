"""Layer names as few globs, globs found by name, and step ranges as progress."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase, translate

_NUMBER = re.compile(r"(\d+)")

#: What stands between the literal pieces of a glob.
_WILD = re.compile(r"\[!?\]?[^]]*\]|[*?]")


class GlobIndex:
    """Many globs, found by a text that they match without trying each of them.

    What a glob matches contains all of the glob's literal pieces, so each is tried only where its
    rarest piece occurs.  Patterns are compiled once, when they are first tried: ``fnmatch`` forgets
    all but the last 256 before Python 3.13.
    """

    def __init__(self, globs: Iterable[str]):
        pieces = {glob: [x for x in _WILD.split(glob) if x] for glob in globs}
        common = Counter(x for each in pieces.values() for x in set(each))
        self._by_piece: dict[str, list[str]] = defaultdict(list)
        #: Those without a literal piece, by the length of what they match; None of any length.
        self._by_length: dict[int | None, list[str]] = defaultdict(list)
        self._patterns: dict[str, re.Pattern[str]] = {}
        for glob, each in pieces.items():
            if each:
                self._by_piece[min(each, key=lambda x: (common[x], -len(x)))].append(glob)
            else:
                parts = _WILD.findall(glob)
                self._by_length[None if "*" in parts else len(parts)].append(glob)
        self._lengths = sorted(set(map(len, self._by_piece)))

    @property
    def vague(self) -> list[str]:
        """Those of any length without a literal piece, which are tried on every text."""
        return self._by_length.get(None, [])

    def match(self, text: str, glob: str) -> bool:
        """``fnmatchcase``, which remembers every glob."""
        pattern = self._patterns.get(glob)
        if pattern is None:
            if not _WILD.search(glob):
                return text == glob
            pattern = self._patterns[glob] = re.compile(translate(glob))
        return pattern.match(text) is not None

    def candidates(self, text: str) -> list[str]:
        """The globs that may match a text, each once; no other does."""
        by_piece = self._by_piece
        if len(text) * len(self._lengths) > len(by_piece):
            found = [piece for piece in by_piece if piece in text]
        else:
            parts = (
                text[i : i + length]
                for length in self._lengths
                for i in range(len(text) - length + 1)
            )
            found = [part for part in dict.fromkeys(parts) if part in by_piece]
        anywhere = self._by_length.get(None, ()), self._by_length.get(len(text), ())
        return [*anywhere[0], *anywhere[1], *(glob for piece in found for glob in by_piece[piece])]


def escape(name: str) -> str:
    """A glob that matches this name only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def cover(names: Collection[str], every: Sequence[str]) -> list[str]:
    """Globs that match exactly ``names`` among ``every``, few and short.

    Layer names differ by their block's number, so names that agree outside one number are joined:
    ``a.0.b``, ``a.1.b``, ``a.3.b`` -> ``a.[013].b``.
    """
    chosen, rest = set(names), set(every) - set(names)
    if not rest:
        return ["*"]
    found: list[str] = []
    families: dict[str, set[str]] = defaultdict(set)
    for name in every:
        families[_NUMBER.sub("#", name)].add(name)
    for members in families.values():
        mine = sorted(chosen & members)
        if not mine:
            continue
        whole = _star(members)
        if len(mine) > 1 and whole and _exact(whole, mine, every):
            found.append(whole)
            continue
        found += _by_digits(mine, every)
    return found


def _exact(glob: str, names: Collection[str], every: Sequence[str]) -> bool:
    return {name for name in every if fnmatchcase(name, glob)} == set(names)


def _star(names: Collection[str]) -> str | None:
    """One glob with ``*`` in place of the numbers in which the names differ."""
    parts = [_NUMBER.split(name) for name in names]
    if len({len(p) for p in parts}) != 1:
        return None
    columns = zip(*parts, strict=True)
    return "".join(escape(c[0]) if len(set(c)) == 1 else "*" for c in columns)


def _by_digits(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """Join names that differ in one digit, digit by digit; names are sorted."""
    globs: list[tuple[str, set[str]]] = [(escape(name), {name}) for name in names]
    joined: dict[tuple[str, str], list[str]] = defaultdict(list)
    left = set(names)
    # The last digit of the number that differs: `1[0-3]`; the numbers before it are equal.
    for name in names:
        for match in _NUMBER.finditer(name):
            digit = match.end() - 1
            joined[name[:digit], name[match.end() :]].append(name)
    globs = []
    for (head, tail), members in sorted(joined.items(), key=lambda item: -len(item[1])):
        members = [m for m in members if m in left]
        if len(members) < 2:
            continue
        digits = "".join(sorted({m[len(head)] for m in members}))
        glob = f"{escape(head)}[{_ranges(digits)}]{escape(tail)}"
        if _exact(glob, members, every):
            globs.append((glob, set(members)))
            left -= set(members)
    globs += [(escape(name), {name}) for name in names if name in left]
    return [glob for glob, _ in globs]


def _ranges(digits: str) -> str:
    """``0123`` -> ``0-3``, ``013`` stays."""
    if len(digits) > 2 and int(digits[-1]) - int(digits[0]) == len(digits) - 1:
        return f"{digits[0]}-{digits[-1]}"
    return digits


def step_range(first: int, stop: int, steps: int) -> tuple[float, float]:
    """Progress range ``(start, end)`` that holds exactly the steps ``first .. stop - 1``.

    Boundaries lie half-way between two steps, so that rounding never moves one.
    """
    if not 0 <= first < stop <= steps:
        raise ValueError(f"need 0 <= first < stop <= {steps}, got {first} and {stop}")
    start = 0.0 if first == 0 else round((first - 0.5) / (steps - 1), 6)
    end = 1.0 if stop == steps else round((stop - 0.5) / (steps - 1), 6)
    return start, end
