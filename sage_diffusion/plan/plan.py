"""``PrecisionPlan``: which spec each layer runs at each point of the sampling schedule, as JSON.

A plan is a list of rules, the first match wins::

    {"version": 6, "default": "int4/fp8-fast",
     "rules": [{"layers": "*", "start": 0.9, "spec": "int8/fp8"},
               {"layers": "transformer_blocks.0.*", "spec": {"qk": "int8", "smooth_v": true}}]}

``progress`` is the position in the sampling schedule: 0 at the first step, 1 at the last.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sage_diffusion.files import write_text
from sage_diffusion.json_files import JSONError, parse_json, read_json, shown
from sage_diffusion.kernels.spec import DEFAULT, AttentionSpec
from sage_diffusion.plan.catalog import FOLDER, shipped
from sage_diffusion.plan.fingerprint import mismatch
from sage_diffusion.plan.lookup import Lookup
from sage_diffusion.plan.names import LayerName, inside
from sage_diffusion.plan.rules import (
    BRANCHES,
    UNITS,
    VERSION,
    PlanError,
    Rule,
    progress,
    rule_to_dict,
)
from sage_diffusion.plan.signs import SEEDS

#: Globs such as ``??[ab]*`` are tried on every name and held against each other.
_MOST_VAGUE = 200


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
        schedule_unit: what its numbers are, one of :data:`UNITS`, so that
            they can be compared with another sampler's; None in old plans.
        fingerprint: what the model must look like (class, layer names, head dims); checked where
            it is present.
        calibration: where the plan comes from.  Provenance only, never read by the runtime.
        sign_seed: sequence of the rotations' signs, other signs at every step
            (:func:`.signs.step_seed`); None has the same at all steps, as plans of version 1.  A
            calibrated plan knows how the errors of its own sequence add up.
    """

    default: AttentionSpec = DEFAULT
    rules: tuple[Rule, ...] = ()
    model: str | None = None
    name: str | None = None
    schedule: tuple[float, ...] | None = None
    fingerprint: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    schedule_unit: str | None = None
    sign_seed: int | None = 0
    #: What stands before the first dot of a layer that the plan names: components, perhaps.
    _heads: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())
    _lookup: Lookup = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", AttentionSpec.parse(self.default))
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "_lookup", Lookup(self.rules))
        if len(vague := self._lookup.vague()) > _MOST_VAGUE:
            raise PlanError(
                f"rules must have at most {_MOST_VAGUE} different globs of wildcards alone, "
                f"got {len(vague)}"
            )
        for i, j in self._lookup.shadowed():
            raise PlanError(f"rules[{i}] can never apply: rules[{j}] covers it")
        known = (self.fingerprint or {}).get("layers") or ()
        globs = [rule.layers for rule in self.rules]
        heads = frozenset(name.partition(".")[0] for name in (*globs, *known))
        object.__setattr__(self, "_heads", heads)
        if self.schedule is not None:
            values = _numbers(self.schedule)
            rises = self.schedule_unit == "log-snr"
            steps = itertools.pairwise(values[::-1] if rises else values)
            if len(values) < 2 or any(b >= a for a, b in steps):
                order = "ascending" if rises else "descending"
                raise PlanError(f"schedule must have at least two strictly {order} values")
            object.__setattr__(self, "schedule", values)
        seed = self.sign_seed
        if seed is not None and (type(seed) is not int or not 0 <= seed < SEEDS):
            raise PlanError(
                f"sign_seed must be a whole number from 0 to {SEEDS - 1} or null, got {shown(seed)}"
            )
        if self.schedule_unit not in (None, *UNITS):
            raise PlanError(
                f"schedule_unit must be one of {', '.join(UNITS)}, got {shown(self.schedule_unit)}"
            )

    @classmethod
    def of(cls, source: PrecisionPlan | AttentionSpec | str | Path) -> PrecisionPlan:
        """A plan from whatever users write: a plan, a spec, a spec's name, a path of JSON, or the
        name of a plan that comes with the package ("wan").

        Raises:
            PlanError: the file can't be read, or is no plan.
            ValueError: the text is none of these.
            TypeError: ``source`` is of another type.
        """
        if isinstance(source, PrecisionPlan):
            return source
        if isinstance(source, AttentionSpec):
            return cls(source)
        if isinstance(source, Path):
            return cls.load(source)
        if not isinstance(source, str):
            raise TypeError(
                f"need a spec, a plan or a path, got {type(source).__name__}: {shown(source)}"
            )
        if source.endswith(".json"):
            return cls.load(Path(source))
        if source in shipped():
            return cls.load(FOLDER / f"{source}.json")
        try:
            return cls(AttentionSpec.parse(source))
        except ValueError as error:
            raise ValueError(f"{error}; plans by name are {', '.join(shipped())}") from None

    def _named(self, layer: str) -> str:
        """A layer as this plan means it: a plan that names a component names its layers in full."""
        if isinstance(layer, LayerName) and layer.path != layer and layer.component in self._heads:
            return str(layer)
        return layer

    def resolve(
        self,
        layer: str,
        progress: float,
        *,
        branch: str | None = None,
        tokens: int | None = None,
    ) -> AttentionSpec:
        """The spec of one call."""
        return self._lookup.find(self._named(layer), progress, branch, tokens) or self.default

    def may_quantize(self, layer: str) -> bool:
        """Is there a step, a branch or a size at which the plan quantizes this layer?"""
        for rule in map(self.rules.__getitem__, self._lookup.named(self._named(layer))):
            if rule.spec.quantized:
                return True
            if (rule.start, rule.end, rule.branch, rule.min_tokens) == (0, 1, None, 0):
                return False  # nothing passes it
        return self.default.quantized

    @property
    def timed(self) -> bool:
        """Does what runs depend on where sampling stands?"""
        return any((rule.start, rule.end) != (0, 1) for rule in self.rules)

    def steady(self, layer: str, tokens: int) -> bool:
        """Does a layer get one spec at all steps and in all branches?"""
        edges = {0.0, *(rule.start for rule in self.rules), *(rule.end for rule in self.rules)}
        specs = {
            self.resolve(layer, at, branch=branch, tokens=tokens)
            for at in edges
            for branch in (None, *BRANCHES)
        }
        return len(specs) == 1

    @property
    def constant(self) -> bool:
        """True if no rule exists: the same spec everywhere."""
        return not self.rules

    def unmatched(self, layers: Iterable[str]) -> list[int]:
        """Indices of the rules whose glob matches none of ``layers``."""
        named = {i for name in layers for i in self._lookup.named(self._named(name))}
        return [i for i in range(len(self.rules)) if i not in named]

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
                components = {name.component for name in layers if isinstance(name, LayerName)}
                known = {inside(name, components) for name in self.fingerprint.get("layers") or ()}
                here["layers"] = [
                    name for name in layers if not known or inside(name, components) in known
                ]
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
        if self.schedule_unit == "log-snr":
            return progress(-sigma, [-value for value in self.schedule])
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
        if self.schedule_unit is not None:
            data["schedule_unit"] = self.schedule_unit
        data["sign_seed"] = self.sign_seed
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
        from sage_diffusion.plan.plan_json import plan_fields

        try:
            return cls(**plan_fields(parse_json(text)))
        except JSONError as error:
            raise PlanError(str(error)) from None

    @classmethod
    def load(cls, path: str | Path) -> PrecisionPlan:
        """Read a plan file; :class:`PlanError` names the file."""
        from sage_diffusion.plan.plan_json import plan_fields

        try:
            return cls(**plan_fields(read_json(path)))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
        except (JSONError, PlanError) as error:
            raise PlanError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, through a temporary name."""
        write_text(Path(path), self.to_json())

    def with_rules(self, rules: Iterable[Rule]) -> PrecisionPlan:
        """The same plan with other rules."""
        return replace(self, rules=tuple(rules))


def _numbers(schedule: Iterable[Any]) -> tuple[float, ...]:
    """Of any kind that stands for a number, tensors too; text and truth values do not."""
    found: list[float] = []
    for i, value in enumerate(schedule):
        try:
            found.append(math.nan if isinstance(value, (str, bytes, bool)) else float(value))
        except (TypeError, ValueError, OverflowError):
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise PlanError(f"schedule[{i}] must be a finite number, got {shown(value)}")
    return tuple(found)
