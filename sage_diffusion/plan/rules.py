"""``Rule``: where a spec applies, and how progress counts the steps of a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from sage_diffusion.json_files import shown
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan.names import means

#: Of the JSON.  1 knew no :attr:`.PrecisionPlan.sign_seed`: its rotations have the same signs at
#: every step.  Up to 2 names of specs are of edition 1, in which 8 bit did not rotate; in 3 of
#: edition 2, in which V was read twice; in 4 of edition 3, in which clipping shrank scores; in 5 of
#: edition 4, in which a channel of an INT8 V had one scale.
VERSION = 6

#: Edition of the names of specs in a plan, by its version (``kernels.spec.EDITION``).
EDITIONS = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5}

#: What the numbers of a schedule may be, see :mod:`sage_diffusion.plan.noise`.
UNITS = ("timesteps", "sigmas", "flow-sigmas", "log-snr")

#: Branches of classifier-free guidance that a rule can name.
BRANCHES = ("cond", "uncond")

#: Letters of a glob: matching takes time with them, and no layer has so long a name.
LONGEST = 256


class PlanError(ValueError):
    """A plan that can't be read, or that does not fit the model it is applied to."""


@dataclass(frozen=True)
class Rule:
    """Where ``spec`` applies.  All conditions must hold.

    Attributes:
        spec: an :class:`AttentionSpec` or its name.
        layers: case-sensitive glob on layer names (``fnmatch``: ``*``, ``?``, ``[seq]``); in a
            pipeline on the path inside of a component, the component's name before it is optional
            (:class:`.names.LayerName`).
        start, end: half-open range of progress; ``end`` = 1 includes the last step.
        branch: "cond" or "uncond" where the host tells them apart, None for both.
        min_tokens: the call must have at least this many keys.
    """

    spec: AttentionSpec
    layers: str = "*"
    start: float = 0.0
    end: float = 1.0
    branch: str | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", AttentionSpec.parse(self.spec))
        if not isinstance(self.layers, str) or not 0 < len(self.layers) <= LONGEST:
            raise PlanError(
                f"layers must be a glob of 1 to {LONGEST} letters, got {shown(self.layers)}"
            )
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise PlanError(f"{name} must be a number between 0 and 1, got {shown(value)}")
            if not 0 <= value <= 1:
                raise PlanError(f"{name} must be between 0 and 1, got {shown(value)}")
        if self.start >= self.end:
            raise PlanError(f"start must be less than end, got start {self.start}, end {self.end}")
        if self.branch is not None and self.branch not in BRANCHES:
            raise PlanError(f"branch must be cond, uncond or null, got {shown(self.branch)}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int):
            raise PlanError(f"min_tokens must be a whole number, got {shown(self.min_tokens)}")
        if not 0 <= self.min_tokens < 2**53:
            raise PlanError(
                f"min_tokens must not be negative, and below 2**53, got {shown(self.min_tokens)}"
            )

    def applies(
        self, progress: float, branch: str | None = None, tokens: int | None = None
    ) -> bool:
        """Does the rule apply to its layers?  Unknown ``tokens`` satisfy every ``min_tokens``."""
        if self.branch is not None and branch != self.branch:
            return False
        if tokens is not None and tokens < self.min_tokens:
            return False
        return self.start <= progress < self.end or (self.end == 1.0 and progress >= 1.0)

    def matches(
        self, layer: str, progress: float, branch: str | None = None, tokens: int | None = None
    ) -> bool:
        """Does the rule apply to this layer?  What :class:`.lookup.Lookup` finds quickly."""
        return self.applies(progress, branch, tokens) and means(self.layers, layer)

    def covers(self, other: Rule) -> bool:
        """True if this rule, standing first, leaves nothing for ``other``."""
        return (
            self.start <= other.start
            and other.end <= self.end
            and self.branch in (None, other.branch)
            and self.min_tokens <= other.min_tokens
            and wider(self.layers, other.layers)
        )


def wider(glob: str, other: str, match: Callable[[str, str], bool] = fnmatchcase) -> bool:
    """Does a glob match all that another one matches?  False where it can't be told by matching.

    A glob that matches the other's text matches no more than single letters of what the other's
    ``*`` stands for, unless it also matches with nothing and with two letters there.
    """
    if glob == other:
        return True
    texts = (other, other.replace("*", ""), other.replace("*", "**")) if "*" in other else (other,)
    return all(match(text, glob) for text in texts)


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Plain data of one rule, in the order in which people read it; defaults are left out."""
    data: dict[str, Any] = {"layers": rule.layers}
    for key, default in (("start", 0.0), ("end", 1.0), ("branch", None), ("min_tokens", 0)):
        if getattr(rule, key) != default:
            data[key] = getattr(rule, key)
    data["spec"] = str(rule.spec)
    return data


def progress(t: float, schedule: Sequence[float]) -> float:
    """Position of ``t`` in a descending schedule, 0 at its first value, 1 at its last.

    Values between two entries (second-order samplers) are interpolated; values outside are clamped.
    """
    if len(schedule) < 2:
        return 0.0
    if not math.isfinite(t):
        raise ValueError(f"t must be finite, got {t}")
    if t >= schedule[0]:
        return 0.0
    for i in range(1, len(schedule)):
        if t >= schedule[i]:
            gap = schedule[i - 1] - schedule[i]
            inside = (schedule[i - 1] - t) / gap if gap else 0.0
            return (i - 1 + inside) / (len(schedule) - 1)
    return 1.0


def step_progress(step: int, steps: int) -> float:
    """Progress of step ``step`` of ``steps``: 0 for the first, 1 for the last."""
    return 0.0 if steps <= 1 else min(max(step / (steps - 1), 0.0), 1.0)
