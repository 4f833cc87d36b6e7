"""What a comparison found: the rows and the questions that one asks of them.

Rows are the raw data, everything else is computed from them.  A missing row means that the call
never happened (a step cache skipped the block): such cells stay unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sage_diffusion.accuracy.records import (
    ROW_METRICS,
    Aggregate,
    EndToEnd,
    Limits,
    Picture,
    Row,
    Variant,
    Violation,
    mean,
)
from sage_diffusion.plan import PrecisionPlan


class ReportError(ValueError):
    """A report that can't be read."""


@dataclass(frozen=True)
class Findings:
    """What one plan cost, as data.

    Attributes:
        name: of the plan, for people.
        rows: in the order in which the calls happened.
        end_to_end: None if only calls were compared.
        environment: versions, device, backends that ran.
        summary: ``SessionSummary.to_dict()`` of the quantized run: what ran and what fell back.
        plan: what decided.
        variants: other plans against the same FP16 run, this one included.
        pictures: for the HTML only; the JSON leaves them out.
    """

    name: str
    rows: tuple[Row, ...]
    end_to_end: EndToEnd | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    plan: PrecisionPlan | None = None
    variants: tuple[Variant, ...] = ()
    pictures: tuple[Picture, ...] = field(default=(), repr=False, compare=False)

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The rows that have an error to speak of."""
        return tuple(row for row in self.rows if row.spec.quantized)

    @property
    def specs(self) -> dict[str, int]:
        """spec -> rows, most frequent first."""
        return dict(Counter(str(row.spec) for row in self.rows).most_common())

    @property
    def layers(self) -> tuple[str, ...]:
        """Names in order of first call."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that have a row, ascending."""
        return tuple(sorted({row.step for row in self.rows}))

    def worst(self, metric: str = "rel_l1") -> Row:
        """The quantized row with the worst value; NaN is worse than any number.

        Raises:
            ValueError: no such metric, or no quantized row.
        """
        if metric not in ROW_METRICS:
            raise ValueError(f"metric must be one of {', '.join(ROW_METRICS)}, got {metric!r}")
        rows = self.quantized
        if not rows:
            raise ValueError("no quantized call was compared")
        sign = -1 if ROW_METRICS[metric] else 1

        def badness(row: Row) -> float:
            value = getattr(row, metric)
            return math.inf if math.isnan(value) else sign * value

        return max(rows, key=badness)

    def mean(self, metric: str = "rel_l1") -> float | None:
        """Mean of a metric over the quantized rows, None without any."""
        return mean([getattr(row, metric) for row in self.quantized])

    def violations(self, limits: Limits) -> tuple[Violation, ...]:
        """Everything beyond a limit, calls first.  NaN is beyond every limit."""
        found = []
        for limit in fields(limits):
            bound = getattr(limits, limit.name)
            if bound is None:
                continue
            larger_is_better = ROW_METRICS.get(limit.name, True)
            for value, where in self._values(limit.name):
                if not (value >= bound if larger_is_better else value <= bound):
                    found.append(Violation(limit.name, value, bound, where))
        return tuple(found)

    def _values(self, metric: str) -> Iterable[tuple[float, str]]:
        if metric in ROW_METRICS:
            for row in self.quantized:
                branch = f", {row.branch}" if row.branch else ""
                yield getattr(row, metric), f"{row.layer}, step {row.step}{branch} ({row.spec})"
        elif self.end_to_end is not None:
            end = self.end_to_end
            if metric == "latent_cosine":
                for step, value in enumerate(end.latent_cosine):
                    yield value, f"latents after step {step}"
                return
            for label, picture in zip(end.labels, getattr(end, metric), strict=True):
                if picture is not None:
                    yield picture, f"picture {label!r}"

    def per_layer(self) -> tuple[Aggregate, ...]:
        """One aggregate per layer, in order of first call."""
        return tuple(
            _aggregate(name, [row for row in self.rows if row.layer == name])
            for name in self.layers
        )

    def per_step(self) -> tuple[Aggregate, ...]:
        """One aggregate per step, ascending."""
        return tuple(
            _aggregate(str(step), [row for row in self.rows if row.step == step])
            for step in self.steps
        )

    def cells(self) -> dict[tuple[str, int], tuple[Row, ...]]:
        """(layer, step) -> its rows: several where branches, seeds or calls repeat."""
        found: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.layer, row.step), []).append(row)
        return {key: tuple(rows) for key, rows in found.items()}

    def variant(self, predicted_time: float | None = None) -> Variant:
        """This report as a line of a side-by-side table."""
        end = self.end_to_end or EndToEnd()
        return Variant(
            self.name,
            end.mean_psnr,
            end.mean_ssim,
            end.final_cosine,
            self.mean("rel_l1"),
            self.specs,
            predicted_time,
        )


def _aggregate(name: str, rows: list[Row]) -> Aggregate:
    specs = dict(Counter(str(row.spec) for row in rows).most_common())
    measured = [row for row in rows if row.spec.quantized]
    if not measured:
        return Aggregate(name, len(rows), specs, *[None] * 6)
    return Aggregate(
        name,
        len(rows),
        specs,
        mean([row.cosine for row in measured]),
        _worst([row.cosine for row in measured], min),
        mean([row.rel_l1 for row in measured]),
        _worst([row.rel_l1 for row in measured], max),
        mean([row.rmse for row in measured]),
        _worst([row.max_abs for row in measured], max),
    )


def _worst(values: list[float], choose: Any) -> float:
    return math.nan if any(math.isnan(value) for value in values) else choose(values)
