"""Classes that stand for a host's class, for as long as something is patched."""

from __future__ import annotations


class Alike(type):
    """Makes a class equal to the class that it stands for, ``_sage_base``.

    Hosts look objects up by their exact class.
    """

    _sage_base: type

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is cls._sage_base

    def __hash__(cls) -> int:
        return hash(cls._sage_base)
