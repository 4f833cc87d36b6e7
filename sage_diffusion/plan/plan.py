"""``PrecisionPlan``: which spec each layer runs at each point of the sampling schedule, as JSON.

A plan is a list of rules, the first match wins::

    {"version": 1, "default": "int4/fp8-fast",
     "rules": [{"layers": "*", "start": 0.9, "spec": "int8/fp8"},
               {"layers": "transformer_blocks.0.*", "spec": {"qk": "int8", "smooth_v": true}}]}

``progress`` is the position in the sampling schedule: 0 at the first step, 1 at the last.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sage_diffusion.files import write_text
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan.fingerprint import mismatch
from sage_diffusion.plan.rules import VERSION, PlanError, Rule, progress, rule_to_dict


@dataclass(frozen=True)
class PrecisionPlan:
    """Rules, first match wins; ``default`` for everything else.

    Attributes:
        default: spec of every call that no rule names.
        rules: in order of priority.
        model: class name or other name of the model that the plan was made for.
        name: short title for people.
        schedule: descending sigmas (or timesteps) that the plan was made with; progress is
            looked up in it by sigma when the host runs another schedule (:meth:`remap`).
        fingerprint: what the model must look like (class, layer names, head dims); checked where
            it is present.
        calibration: where the plan comes from.  Provenance only, never read by the runtime.
    """

    default: AttentionSpec = field(default_factory=AttentionSpec)
    rules: tuple[Rule, ...] = ()
    model: str | None = None
    name: str | None = None
    schedule: tuple[float, ...] | None = None
    fingerprint: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", AttentionSpec.parse(self.default))
        object.__setattr__(self, "rules", tuple(self.rules))
        for i, rule in enumerate(self.rules):
            for j, earlier in enumerate(self.rules[:i]):
                if earlier.covers(rule):
                    raise PlanError(f"rules[{i}] can never apply: rules[{j}] covers it")
        if self.schedule is not None:
            values = tuple(float(x) for x in self.schedule)
            if len(values) < 2 or any(b >= a for a, b in itertools.pairwise(values)):
                raise PlanError("schedule must have at least two strictly descending values")
            object.__setattr__(self, "schedule", values)

    @classmethod
    def of(cls, source: PrecisionPlan | AttentionSpec | str | Path) -> PrecisionPlan:
        """A plan from whatever users write: a plan, a spec, a spec's name, or a path of JSON."""
        if isinstance(source, PrecisionPlan):
            return source
        if isinstance(source, AttentionSpec):
            return cls(source)
        if isinstance(source, Path):
            return cls.load(source)
        if not isinstance(source, str):
            raise TypeError(
                f"need a spec, a plan or a path, got {type(source).__name__}: {source!r}"
            )
        if source.endswith(".json"):
            return cls.load(Path(source))
        return cls(AttentionSpec.parse(source))

    def resolve(
        self,
        layer: str,
        progress: float,
        *,
        branch: str | None = None,
        tokens: int | None = None,
    ) -> AttentionSpec:
        """The spec of one call."""
        for rule in self.rules:
            if rule.matches(layer, progress, branch, tokens):
                return rule.spec
        return self.default

    @property
    def constant(self) -> bool:
        """True if no rule exists: the same spec everywhere."""
        return not self.rules

    def unmatched(self, layers: Iterable[str]) -> list[int]:
        """Indices of the rules whose glob matches none of ``layers``."""
        names = list(layers)
        return [
            i
            for i, rule in enumerate(self.rules)
            if not any(fnmatchcase(name, rule.layers) for name in names)
        ]

    def check(
        self, layers: Sequence[str], *, model: str | None = None, strict: bool = False
    ) -> list[str]:
        """Does the plan fit a model with these layers?

        Args:
            layers: names.
            model: class name, where the host knows it.
            strict: every warning is an error.

        Returns:
            Warnings: one per rule that matches nothing, and one if there are layers that the plan's
            fingerprint does not know (an adapter's, say).

        Raises:
            PlanError: a plan for another model: no rule with a glob of its own matches a layer, or
                the fingerprint's class or one of its layers is not here.
        """
        missed = self.unmatched(layers)
        named = [i for i, rule in enumerate(self.rules) if rule.layers.strip("*")]
        shown = ", ".join(list(layers)[:3]) + (", .." if len(layers) > 3 else "")
        if named and set(named) <= set(missed):
            globs = ", ".join(repr(self.rules[i].layers) for i in named[:4])
            raise PlanError(
                f"the plan was made for another model{f' ({self.model})' if self.model else ''}: "
                f"its rules name {globs}, the layers here are {shown}"
            )
        warnings = [
            f"rules[{i}].layers {self.rules[i].layers!r} matches no layer (there are {shown})"
            for i in missed
        ]
        if self.fingerprint is not None:
            here = {"layers": list(layers), "model": model}
            reason = mismatch(self.fingerprint, here)
            if reason is not None:
                reason = f"the plan was calibrated on another model: {reason}"
                known = set(self.fingerprint.get("layers") or layers)
                here["layers"] = [name for name in layers if name in known]
                if mismatch(self.fingerprint, here) is not None:
                    raise PlanError(f"{reason}; without its fingerprint it is not checked")
                warnings.append(reason)
        if strict and warnings:
            raise PlanError(warnings[0])
        return warnings

    def remap(self, sigma: float) -> float:
        """Progress in the plan's own schedule of a sigma met under another schedule."""
        if self.schedule is None:
            raise PlanError("the plan stores no schedule to look a sigma up in")
        return progress(sigma, self.schedule)

    # ------------------------------------------------------------------ JSON
    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order in which people read it."""
        data: dict[str, Any] = {"version": VERSION}
        for key in ("name", "model"):
            if getattr(self, key) is not None:
                data[key] = getattr(self, key)
        data["default"] = str(self.default)
        data["rules"] = [rule_to_dict(rule) for rule in self.rules]
        if self.schedule is not None:
            data["schedule"] = list(self.schedule)
        for key in ("fingerprint", "calibration"):
            if getattr(self, key) is not None:
                data[key] = dict(getattr(self, key))
        return data

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads back to an equal plan."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PrecisionPlan:
        """Read a plan.

        Raises:
            PlanError: no JSON, a later version, an unknown key or a wrong value; the message names
                the JSON path (``rules[1].spec.qk: ...``).
        """
        from sage_diffusion.plan.plan_json import parse_plan

        return cls(**parse_plan(text))

    @classmethod
    def load(cls, path: str | Path) -> PrecisionPlan:
        """Read a plan file; :class:`PlanError` names the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PlanError(f"{path}: is not UTF-8 text") from None
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, through a temporary name."""
        write_text(Path(path), self.to_json())

    def with_rules(self, rules: Iterable[Rule]) -> PrecisionPlan:
        """The same plan with other rules."""
        return replace(self, rules=tuple(rules))
