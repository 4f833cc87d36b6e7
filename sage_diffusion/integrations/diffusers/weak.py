"""Links that own nothing: what hangs on a pipeline must not keep it, or its weights, alive."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any


class WeakLink:
    """A weak reference that is copied and pickled along with what it refers to."""

    def __init__(self, target: Any):
        self._ref: Callable[[], Any] = _gone if target is None else weakref.ref(target)

    def __call__(self) -> Any:
        """What it refers to, None once that is gone."""
        return self._ref()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakLink:
        return WeakLink(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakLink, (self(),)


class WeakCall:
    """A method of an object that is not owned; nothing happens once that is gone."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = WeakLink(owner), name

    def __call__(self) -> None:
        """Call it without arguments."""
        owner = self.owner()
        if owner is not None:
            getattr(owner, self.name)()


def _gone() -> None:
    return None
