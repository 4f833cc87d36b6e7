"""The first rule that matches, and the rules that can never apply, without trying every rule."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan.globs import GlobIndex
from sage_diffusion.plan.names import LayerName, means, texts
from sage_diffusion.plan.rules import Rule, wider

#: Names, and tables of a group, that are kept; beyond, all are made anew.
_KEPT = 10_000


class _Spans(NamedTuple):
    """What applies from each of ``starts`` on, up to the next; None is the plan's default."""

    starts: list[float]
    specs: list[AttentionSpec | None]


class _Group(NamedTuple):
    """Layers that the same rules name."""

    rules: tuple[int, ...]
    #: (branch, class of sizes) -> what applies when
    tables: dict[tuple[str | None, int], _Spans]


class Lookup:
    """Finds the first of many rules that matches a call.

    Layers that the same rules name share a table for each branch and each class of sizes: the
    progress at which the spec changes.  It is made at the first such call.
    """

    def __init__(self, rules: Sequence[Rule]):
        self._rules = rules
        self._by_glob: dict[str, list[int]] = defaultdict(list)
        for i, rule in enumerate(rules):
            self._by_glob[re.sub(r"\*+", "*", rule.layers)].append(i)
        self._globs = GlobIndex(self._by_glob)
        self._sizes = sorted({rule.min_tokens for rule in rules})
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._group_of: dict[tuple[str, ...], _Group] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Lookup, (self._rules,)  # copies and pickles find again what they need

    def named(self, layer: str) -> tuple[int, ...]:
        """Indices of the rules whose glob means a layer, in their order."""
        return self._group(layer).rules

    def _group(self, layer: str) -> _Group:
        place = (layer.component, layer.path) if isinstance(layer, LayerName) else ()
        key = (layer, *place)
        found = self._group_of.get(key)
        if found is None:
            globs = {glob for text in texts(layer) for glob in self._globs.candidates(text)}
            match = self._globs.match
            named = [self._by_glob[glob] for glob in globs if means(glob, layer, match)]
            rules = tuple(sorted(i for each in named for i in each))
            found = self._groups.setdefault(rules, _Group(rules, {}))
            _keep(self._group_of, key, found)
        return found

    def find(
        self, layer: str, progress: float, branch: str | None, tokens: int | None
    ) -> AttentionSpec | None:
        """The spec of the first rule that matches, None if none does."""
        group = self._group(layer)
        size = len(self._sizes) if tokens is None else bisect_right(self._sizes, tokens)
        spans = group.tables.get((branch, size))
        if spans is None:
            spans = self._spans(group.rules, branch, size)
            _keep(group.tables, (branch, size), spans)
        at = bisect_right(spans.starts, progress) - 1
        return spans.specs[at] if at >= 0 and progress == progress else None

    def _spans(self, indices: tuple[int, ...], branch: str | None, size: int) -> _Spans:
        least = self._sizes[size - 1] if size else -1
        rules = [self._rules[i] for i in indices]
        rules = [r for r in rules if r.branch in (None, branch) and r.min_tokens <= least]
        points = sorted({r.start for r in rules} | {r.end for r in rules if r.end < 1})
        specs: list[AttentionSpec | None] = [None] * len(points)
        # The first rule takes its span, later ones what is left: free[i] leads to the next place
        # from i on that no rule has taken.
        free = list(range(len(points) + 1))
        for rule in rules:
            stop = len(points) if rule.end == 1 else bisect_left(points, rule.end)
            at = _next(free, bisect_left(points, rule.start))
            while at < stop:
                specs[at] = rule.spec
                free[at] = at + 1
                at = _next(free, at + 1)
        changes = [i for i in range(len(points)) if i == 0 or specs[i] != specs[i - 1]]
        return _Spans([points[i] for i in changes], [specs[i] for i in changes])

    def vague(self) -> list[str]:
        """Different globs with a ``*`` and without a letter of their own, as ``??[ab]*``."""
        return self._globs.vague

    def shadowed(self) -> list[tuple[int, int]]:
        """``(i, j)`` of every rule ``i`` that can never apply, and the first ``j`` that covers it.

        What :meth:`.Rule.covers` says of each pair of rules.
        """
        rules = self._rules
        start, end = (np.array([getattr(r, key) for r in rules]) for key in ("start", "end"))
        tokens = np.array([rule.min_tokens for rule in rules])
        branch = np.array([rule.branch or "" for rule in rules])
        found = []
        for glob, mine in self._by_glob.items():
            others = (g for g in self._globs.candidates(glob) if g != glob)
            over = [glob, *(g for g in others if wider(g, glob, self._globs.match))]
            if over == [glob] and len(mine) == 1:
                continue
            every = np.array(sorted(i for g in over for i in self._by_glob[g]))
            for i in mine:
                before = every[: np.searchsorted(every, i)]
                covers = (start[before] <= start[i]) & (end[before] >= end[i])
                covers &= (tokens[before] <= tokens[i]) & np.isin(branch[before], ("", branch[i]))
                if covers.any():
                    found.append((i, int(before[covers.argmax()])))
        return sorted(found)


def _next(free: list[int], at: int) -> int:
    while free[at] != at:
        free[at] = free[free[at]]  # halves the way of the next who comes along
        at = free[at]
    return at


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    if len(kept) >= _KEPT:
        kept.clear()
    kept[key] = value


def without_shadowed(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules that can apply."""
    rules = tuple(rules)
    gone = {i for i, _ in Lookup(rules).shadowed()}
    return tuple(rule for i, rule in enumerate(rules) if i not in gone)
