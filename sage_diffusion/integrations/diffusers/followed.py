"""Schedulers whose calls are heard, with nothing of ours in their ``__dict__``.

Pipelines deep-copy their scheduler in mid-call (one per frame, one for sound), and some save its
``__dict__`` and put it back: a wrapper among its attributes would come back after its time, or call
another scheduler.  So a followed scheduler gets a subclass of its class, whose methods tell a
listener; copies are heard by the same one.  Whatever somebody else sets in a method's place is
called, and is still there when we have gone.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from sage_diffusion.integrations.diffusers.standin import Alike

#: The methods that are heard, where a scheduler has them.
METHODS = ("set_timesteps", "set_begin_index", "scale_model_input", "step")


class Listener(Protocol):
    """Hears what is called on a scheduler."""

    def hear(
        self, scheduler: Any, name: str, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A method is called: run the original and give its result."""

    def copied(self, scheduler: Any, memo: dict[int, Any]) -> None:
        """A copy of a followed scheduler exists; ``memo`` is the deep copy's."""


# A scheduler's listener must not lie in its `__dict__`: this lies beside it, by identity, and goes
# when it goes.  Classes of schedulers need not be hashable.
_listeners: dict[int, tuple[Listener, weakref.finalize]] = {}


def follow(scheduler: Any, listener: Listener) -> bool:
    """Let ``listener`` hear a scheduler, instead of another one; False if its class is closed."""
    if not isinstance(scheduler, _Followed):
        try:
            cls: Any = type(scheduler)
            _set_class(scheduler, _followed_class(cls))
        except TypeError:
            return False
        end = weakref.finalize(scheduler, _listeners.pop, id(scheduler), None)
        end.atexit = False
    else:
        _, end = _listeners[id(scheduler)]
    _listeners[id(scheduler)] = listener, end
    return True


def unfollow(scheduler: Any, listener: Listener) -> None:
    """Give a scheduler its class back, if this listener is the one who hears it."""
    if listener_of(scheduler) is listener:
        _, end = _listeners.pop(id(scheduler))
        end.detach()
        _set_class(scheduler, type(scheduler)._sage_base)


def listener_of(scheduler: Any) -> Listener | None:
    """Who hears a scheduler, None if nobody does."""
    return _listeners.get(id(scheduler), (None, None))[0]


def _set_class(scheduler: Any, cls: type) -> None:
    vars(object)["__class__"].__set__(scheduler, cls)  # ours claims to be the original


class _Followed:
    """Marks the classes made here."""


class _Call:
    """A method of a followed scheduler; pipelines look for optional arguments in its signature."""

    def __init__(self, scheduler: Any, name: str, original: Callable[..., Any], listener: Listener):
        self.scheduler = scheduler
        self.name = name
        self.listener = listener
        self.__wrapped__ = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.listener.hear(self.scheduler, self.name, self.__wrapped__, args, kwargs)


class _Method:
    """Stands for a method in the class, before what anybody sets on the instance."""

    def __init__(self, base: type, name: str):
        self.base = base
        self.name = name

    def __get__(self, scheduler: Any, owner: type) -> Any:
        if scheduler is None:
            return getattr(self.base, self.name)
        original = vars(scheduler).get(self.name)
        if original is None:
            original = getattr(super(owner, scheduler), self.name)
        listener = listener_of(scheduler)
        return original if listener is None else _Call(scheduler, self.name, original, listener)

    def __set__(self, scheduler: Any, value: Any) -> None:
        vars(scheduler)[self.name] = value

    def __delete__(self, scheduler: Any) -> None:
        if self.name not in vars(scheduler):
            raise AttributeError(self.name)
        del vars(scheduler)[self.name]


@functools.cache
def _followed_class(cls: Any) -> type:
    def deep_copy(self: Any, memo: dict[int, Any]) -> Any:
        theirs = getattr(super(made, self), "__deepcopy__", None)
        if theirs is not None:
            new = theirs(memo)
        else:
            new = memo[id(self)] = object.__new__(cls)
            vars(new).update(copy.deepcopy(vars(self), memo))
        listener = listener_of(self)
        if listener is not None:
            listener.copied(new, memo)
        return new

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        build, arguments, *state = super(made, self).__reduce_ex__(protocol)
        return build, tuple(cls if each is made else each for each in arguments), *state

    namespace: dict[str, Any] = {name: _Method(cls, name) for name in _heard(cls)}
    namespace |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__class__": property(lambda self: cls),
        "__deepcopy__": deep_copy,
        "__reduce_ex__": reduce,
        "_sage_base": cls,
    }
    meta: Any = Alike if type(cls) is type else type(cls)
    made = meta(cls.__name__, (cls, _Followed), namespace)
    return made


def _heard(cls: type) -> Iterator[str]:
    return (name for name in METHODS if callable(getattr(cls, name, None)))
