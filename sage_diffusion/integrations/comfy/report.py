"""What a patched MODEL did in one sampling run, in the words that its node shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sage_diffusion.attend.summary import LayerSummary, SessionSummary


def merged(summaries: Sequence[SessionSummary]) -> SessionSummary:
    """One summary of several devices' sessions, layers in the order in which they were met."""
    layers: dict[str, LayerSummary] = {}
    failures: Counter[str] = Counter()
    for summary in summaries:
        failures.update(summary.compilation_failures)
        for layer in summary.layers:
            before = layers.get(layer.name)
            if before is not None:
                layer = LayerSummary(
                    layer.name,
                    dict(Counter(before.ran) + Counter(layer.ran)),
                    dict(Counter(before.declined) + Counter(layer.declined)),
                    tuple(sorted({*before.non_finite, *layer.non_finite})),
                    before.stepped_up + layer.stepped_up,
                    max((x for x in (before.drift, layer.drift) if x is not None), default=None),
                )
            layers[layer.name] = layer
    return SessionSummary(tuple(layers.values()), dict(failures))


@dataclass(frozen=True)
class RunReport:
    """One run; ``str()`` is what the node shows.

    Attributes:
        summary: calls by layer.
        title: name of the plan.
        model: class of the model.
        forwards: model calls.
        warnings: what the user should know.
        closed: modules that compute attention where no override reaches.
    """

    summary: SessionSummary
    title: str
    model: str
    forwards: int
    warnings: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()

    @property
    def alarms(self) -> tuple[str, ...]:
        """Warnings, those that follow from the counts included."""
        found = list(self.warnings)
        if self.forwards and not self.summary.calls:
            found.insert(
                0,
                f"no attention call of {self.model or 'this model'} was intercepted: nothing was "
                "quantized. This model family does not ask for attention overrides",
            )
        if not self.forwards:
            found.insert(0, "the model was not called: another node served every step")
        bad = [layer.name for layer in self.summary.layers if layer.non_finite]
        if bad:
            found.append(
                f"NaN or infinity in {', '.join(bad[:4])}{' ..' if len(bad) > 4 else ''}: "
                "choose a safer spec for these layers"
            )
        if self.closed:
            names = ", ".join(self.closed[:2]) + (" .." if len(self.closed) > 2 else "")
            found.append(
                f"{len(self.closed)} modules call PyTorch's attention directly and can't be "
                f"reached ({names})"
            )
        return tuple(found)

    def __str__(self) -> str:
        summary = self.summary
        calls, declined = summary.calls, sum(summary.declined.values())
        # A node shows two or three lines before it is made larger: first what matters most.
        lines = [f"WARNING: {alarm}" for alarm in self.alarms]
        if calls:
            share = summary.quantized / calls
            lines.append(
                f"{calls} attention calls intercepted, {summary.quantized} quantized ({share:.0%})"
            )
            shares = ", ".join(f"{spec} {n / calls:.0%}" for spec, n in summary.specs.items())
            lines.append(f"{declined} declined" + (f"; share: {shares}" if shares else ""))
        lines.append(f"{self.model or 'model'}, plan {self.title}, {self.forwards} model calls")
        raised = [layer for layer in summary.layers if layer.stepped_up]
        lines += [f"{layer.name} stepped up: {'; '.join(layer.stepped_up)}" for layer in raised]
        lines += [f"declined {n} times: {reason}" for reason, n in summary.declined.items()]
        return "\n".join(lines)

    def details(self) -> str:
        """:meth:`__str__` and every layer."""
        return f"{self}\n\n{self.summary}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": self.model,
            "plan": self.title,
            "model_calls": self.forwards,
            "warnings": list(self.alarms),
            **self.summary.to_dict(),
        }
