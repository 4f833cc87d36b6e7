"""A covering design: few calls in which every pair of parameter values occurs.

The full product of kernels, shapes, masks and switches is out of reach; most faults need the
meeting of two values (Kuhn et al., "Software fault interactions and implications for software
testing", 2004).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

from targets import ATTENTION, LARGEST_HEAD_DIM


class Kernel(NamedTuple):
    """One attention kernel on one of the cards that the simulated one can be."""

    backend: str
    spec: str
    cc: int

    @property
    def largest_head_dim(self) -> int:
        """What its backend takes."""
        return LARGEST_HEAD_DIM.get((self.backend, self.spec.split("/")[0]), 256)


class Call(NamedTuple):
    """One call; H / Hkv is 3 or 1, and a "fused" tensor is a view of a fused QKV projection."""

    kernel: Kernel
    head_dim: int
    q_len: int
    k_len: int
    mask: str
    is_causal: bool
    group: int
    strides: str
    return_lse: bool
    switch: str
    dtype: str

    @property
    def name(self) -> str:
        """As a test's id."""
        kernel = self.kernel
        rest = (x for x in self[1:] if x not in ("", False))
        return "-".join(map(str, (kernel.backend, kernel.spec, f"sm{kernel.cc}", *rest)))


#: Targets as the simulated card names them.
CARDS = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_120": 120}

KERNELS = tuple(
    Kernel(backend, spec, CARDS[target])
    for (backend, spec), native in ATTENTION.items()
    for target in native
    if target in CARDS
)

#: Values by field of :class:`Call`.
VALUES: dict[str, tuple[Any, ...]] = {
    "kernel": KERNELS,
    "head_dim": (64, 128, 1, 40, 72, 80, 96, 160, 256),
    "q_len": (1, 63, 64, 65, 127, 200, 257),
    "k_len": (200, 1, 63, 64, 65, 127, 257),
    # Of all queries or per query ("rows"), boolean or added; "queries" is an additive [Lq, 1].
    "mask": ("none", "keys", "key-bias", "rows", "row-bias", "queries"),
    "is_causal": (False, True),
    "group": (1, 3),
    "strides": ("fused", "contiguous"),
    "return_lse": (True, False),
    "switch": ("", "+smooth_v", "-smooth_k"),
    "dtype": ("float16", "bfloat16"),
}

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def allowed(a: tuple[str, Any], b: tuple[str, Any]) -> bool:
    """Whether two values may meet: a backend refuses head dims beyond its largest."""
    pair = dict((a, b))
    if pair.keys() == {"kernel", "head_dim"}:
        return pair["head_dim"] <= pair["kernel"].largest_head_dim
    return True


def every_pair() -> dict[Pair, None]:
    """All pairs of values of two fields that may meet, those with a kernel first."""
    found: dict[Pair, None] = {}
    for f, g in itertools.combinations(VALUES, 2):
        for pair in itertools.product(((f, x) for x in VALUES[f]), ((g, y) for y in VALUES[g])):
            if allowed(*pair):
                found[pair] = None
    return found


def pairs_of(call: Call) -> set[Pair]:
    """Pairs that a call covers."""
    return set(itertools.combinations(call._asdict().items(), 2))


@functools.cache
def calls() -> tuple[Call, ...]:
    """A greedy covering design, the same on every machine.

    The first calls take each kernel once and every other value; from then on each begins with the
    first pair that is left, and the other fields take the value that covers most of what is left.
    """
    left, found = every_pair(), []
    for turn in itertools.count():
        if not left:
            return tuple(found)
        fields: dict[str, Any] = {}
        if turn < len(KERNELS):
            fields["kernel"] = KERNELS[turn]
        else:
            fields.update(next(iter(left)))
        for field, values in VALUES.items():
            if field in fields:
                continue
            fits = [
                x for x in values if all(allowed(known, (field, x)) for known in fields.items())
            ]
            turned = fits[turn % len(fits) :] + fits[: turn % len(fits)]

            def news(x: Any, field: str = field, fields: dict[str, Any] = fields) -> int:
                meets = ((known, (field, x)) for known in fields.items())
                return sum(pair in left or pair[::-1] in left for pair in meets)

            fields[field] = max(turned, key=news)
        call = Call(**{field: fields[field] for field in VALUES})
        found.append(call)
        for pair in pairs_of(call):
            left.pop(pair, None)


def slice_of_calls() -> tuple[Call, ...]:
    """What ``make test`` runs: each kernel once."""
    return calls()[: len(KERNELS)]
