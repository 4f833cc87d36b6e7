"""What one sampling run did, and what that says of its host: did sampling move, did anything run
quantized?  Counted by differences at the steps, so that an attention call pays nothing for it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sage_diffusion.plan import PrecisionPlan

#: No sampler calls a model more often than this at one noise level, unless it does so at all.
MANY_CALLS = 64
#: .. or this many times as often as at its other noise levels.
MANY_TIMES = 8


class Counts(Protocol):
    """What a layer counts; see :class:`sage_diffusion.attend.session.Layer`."""

    ran: Counter[tuple[str, str]]
    declined: Counter[str]
    tokens: int
    further: int
    further_quantized: int


@dataclass
class RunLog:
    """One sampling run of a session.

    Attributes:
        steps: of the run as the host announced it.
        layers: the session's, live.
        visits: model calls at each noise level (a step, or a sigma within it) that had any.
        visited: steps in which the model was called.
        progress: values at which the model was called.
        branches: branches of guidance that the host named.
        called: names of the layers that had any.
        calls, quantized: of all layers.
        declined: reason -> calls.
    """

    steps: int
    layers: Mapping[str, Counts]
    visits: list[int] = field(default_factory=list)
    visited: set[int] = field(default_factory=set)
    progress: set[float] = field(default_factory=set)
    branches: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    calls: int = 0
    quantized: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    _at: tuple[int, float | None, float] = (-1, None, 0.0)

    def __post_init__(self) -> None:
        self._before = self._totals()
        self._first = self._sums()

    def _totals(self) -> dict[str, int]:
        return {
            name: sum(layer.ran.values()) + sum(layer.declined.values()) - layer.further
            for name, layer in self.layers.items()
        }

    def _sums(self) -> tuple[int, Counter[str]]:
        ran = sum(
            count
            for layer in self.layers.values()
            for (spec, _), count in layer.ran.items()
            if spec != "fp16"
        ) - sum(layer.further_quantized for layer in self.layers.values())
        declined: Counter[str] = Counter()
        for layer in self.layers.values():
            declined.update(layer.declined)
        return ran, declined

    def visit(self, step: int, sigma: float | None, progress: float) -> None:
        """Sampling is at this noise level from now on."""
        if (step, sigma) == self._at[:2]:
            return
        now = self._totals()
        made = {name: n - self._before.get(name, 0) for name, n in now.items()}
        self._before = now
        most = max(made.values(), default=0)
        if most > 0:
            self.calls += sum(made.values())
            self.called.update(name for name, n in made.items() if n > 0)
            self.visits.append(most)
            self.visited.add(self._at[0])
            self.progress.add(self._at[2])
        self._at = step, sigma, progress

    def close(self) -> None:
        """The run is over: count what came after the last step began."""
        self.visit(-1, None, 0.0)
        ran, declined = self._sums()
        self.quantized = ran - self._first[0]
        self.declined = declined - self._first[1]

    def _so_far(self) -> tuple[list[int], set[int]]:
        """Visits and visited steps with those of the present noise level."""
        now = self._totals()
        most = max((n - self._before.get(name, 0) for name, n in now.items()), default=0)
        if most <= 0:
            return self.visits, self.visited
        return [*self.visits, most], self.visited | {self._at[0]}

    def stuck(self) -> str | None:
        """A warning where sampling did not move as the host's steps should have, else None."""
        visits, visited = self._so_far()
        if not visits:
            return None
        most, others = max(visits), sorted(visits)[:-1]
        remedy = (
            "the plan and the guard took all of them for that step. Tell the session where "
            "sampling stands (begin_step), or use a plan without start and end"
        )
        if self.steps > 1 and len(visited) == 1 and sum(visits) >= max(3, self.steps):
            return (
                f"sampling never left step {min(visited)} of {self.steps} although the model "
                f"was called {sum(visits)} times: {remedy}"
            )
        usual = statistics.median(others) if others else 1
        if most > MANY_CALLS and most > MANY_TIMES * usual:
            return f"the model was called {most} times at one step: {remedy}"
        return None


@dataclass(frozen=True)
class Nothing:
    """Why a plan that quantizes did so nowhere in a run; ``str()`` is a sentence.

    Attributes:
        calls: of the run.
        cause: one.
        remedy: what helps.
    """

    calls: int
    cause: str
    remedy: str

    def __str__(self) -> str:
        if not self.calls:
            return f"{self.cause}, so nothing was quantized; {self.remedy}"
        return f"nothing was quantized in {self.calls} calls: {self.cause}; {self.remedy}"


def nothing_quantized(plan: PrecisionPlan, logs: Sequence[RunLog]) -> Nothing | None:
    """Why a plan that quantizes did so nowhere in a run, and what helps; None where it did.

    Args:
        plan: of the run.
        logs: closed ones of every device.
    """
    if not quantizes(plan) or any(log.quantized for log in logs):
        return None
    calls = sum(log.calls for log in logs)
    if not calls:
        return Nothing(
            0,
            "no attention call was intercepted: the model computes its attention where nothing "
            "can be routed",
            "another model family, or none of this",
        )
    declined: Counter[str] = Counter()
    for log in logs:
        declined.update(log.declined)
    if declined:
        reason, _ = declined.most_common(1)[0]
        return Nothing(calls, reason, "Sage Doctor says what this machine can run")
    return Nothing(calls, *_why_planned(plan, logs))


def quantizes(plan: PrecisionPlan) -> bool:
    """Does a plan quantize anything, anywhere?"""
    return plan.default.quantized or any(rule.spec.quantized for rule in plan.rules)


def _why_planned(plan: PrecisionPlan, logs: Sequence[RunLog]) -> tuple[str, str]:
    """The plan itself said fp16 of every call: cause and remedy."""
    names = [name for log in logs for name in log.layers]
    tokens = max((layer.tokens for log in logs for layer in log.layers.values()), default=0)
    times = {at for log in logs for at in log.progress}
    branches = {branch for log in logs for branch in log.branches}
    rules = {i: rule for i, rule in enumerate(plan.rules) if rule.spec.quantized}
    missed = set(plan.unmatched(names))
    here = [rule for i, rule in rules.items() if i not in missed]
    if not here and not plan.default.quantized:
        globs = ", ".join(repr(rule.layers) for rule in [*rules.values()][:3])
        return f"its rules name {globs}, the layers are {', '.join(names[:3])}", "rename the rules"
    long = [rule for rule in here if rule.min_tokens <= tokens]
    if here and not long:
        least = min(rule.min_tokens for rule in here)
        return (
            f"min_tokens is {least}, and the longest call has {tokens} keys",
            "lower min_tokens, or sample a larger picture",
        )
    timely = [r for r in long if any(r.applies(at, r.branch) for at in times)]
    if long and not timely:
        return (
            f"the run had {len(times)} steps from progress {min(times):.2f} to {max(times):.2f}, "
            f"none of them where the plan quantizes, from {min(r.start for r in long):.2f} to "
            f"{max(r.end for r in long):.2f}",
            "widen start and end, or take more steps",
        )
    named = [rule for rule in timely if rule.branch in (None, *branches)]
    if timely and not named:
        return (
            "its rules name a branch of guidance, and this run had none of it",
            "remove branch",
        )
    return (
        "rules that stand first, or a guard that stepped the layers up, say fp16 everywhere",
        "look at the plan's first rules",
    )
