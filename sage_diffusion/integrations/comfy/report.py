"""What a patched MODEL did in one sampling run, in the words that its node shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sage_diffusion.attend.runs import Nothing
from sage_diffusion.attend.summary import LayerSummary, SessionSummary
from sage_diffusion.integrations.comfy.headline import Headline, State
from sage_diffusion.integrations.comfy.timing import Timing


def merged(summaries: Sequence[SessionSummary]) -> SessionSummary:
    """One summary of several devices' sessions, layers in the order in which they were met."""
    layers: dict[str, LayerSummary] = {}
    failures: Counter[str] = Counter()
    warnings: dict[str, None] = {}
    for summary in summaries:
        failures.update(summary.compilation_failures)
        warnings.update(dict.fromkeys(summary.warnings))
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
                    tuple(sorted({*before.came_in, *layer.came_in})),
                    before.further + layer.further,
                    before.further_quantized + layer.further_quantized,
                )
            layers[layer.name] = layer
    return SessionSummary(tuple(layers.values()), dict(failures), tuple(warnings))


@dataclass(frozen=True)
class RunReport:
    """One run; ``str()`` is what the node shows.

    Attributes:
        summary: calls by layer.
        title: name of the plan.
        model: class of the model.
        forwards: model calls.
        warnings: what the user should know.
        unreached: why no override reached some attention -> the modules that computed it.
        nothing: why a plan that quantizes did so nowhere.
        timing: seconds, None where none were taken.
        notes: what the user may want to know.
    """

    summary: SessionSummary
    title: str
    model: str
    forwards: int
    warnings: tuple[str, ...] = ()
    unreached: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    nothing: Nothing | None = None
    timing: Timing | None = None
    notes: tuple[str, ...] = ()

    @property
    def trouble(self) -> Nothing | None:
        """Why nothing was quantized although the plan does; None where that is not so."""
        if not self.forwards:
            return Nothing(
                0,
                "the model was not called: another node served every step",
                "bypass the node that takes the sampler's place (a cache, say)",
            )
        if not self.summary.calls:
            return Nothing(
                0,
                f"no attention call of {self.model or 'this model'} was intercepted",
                "none for this model family: it does not ask for attention overrides",
            )
        return self.nothing

    @property
    def alarms(self) -> tuple[str, ...]:
        """Warnings, those that follow from the counts included."""
        found = [*self.warnings, *self.summary.warnings]
        if self.trouble is not None:
            found.insert(0, str(self.trouble))
        bad = [layer.name for layer in self.summary.layers if layer.non_finite]
        if bad:
            found.append(
                f"NaN or infinity in {', '.join(bad[:4])}{' ..' if len(bad) > 4 else ''}: "
                "choose a safer spec for these layers"
            )
        came_in = [layer.name for layer in self.summary.layers if layer.came_in]
        if came_in:
            found.append(
                f"NaN or infinity came into {', '.join(came_in[:4])}"
                f"{' ..' if len(came_in) > 4 else ''}: not of quantization's making, look at the "
                "model's weights and dtype"
            )
        for why, modules in self.unreached.items():
            names = ", ".join(modules[:2]) + (" .." if len(modules) > 2 else "")
            found.append(f"the attention of {len(modules)} modules ({names}) is not reached: {why}")
        return tuple(found)

    @property
    def headline(self) -> Headline:
        """The two lines that a node shows at its default size."""
        if self.trouble is not None:
            first = f"NOT QUANTIZED: {self.trouble.cause}"
            return Headline("nothing", first, f"Remedy: {self.trouble.remedy}")
        summary = self.summary
        if summary.quantized:
            specs = ", ".join(spec for spec in summary.specs if spec != "fp16")
            first = f"{specs}: {summary.quantized} of {summary.calls} attention calls"
        else:
            first = f"fp16, as planned: {summary.calls} attention calls"
        if self.alarms:
            return Headline("warning", first, f"WARNING: {self.alarms[0]}")
        timed = self.timing is not None and summary.quantized
        second = self.timing.brief() if self.timing and timed else self._where()
        return Headline("done", first, second)

    @property
    def state(self) -> State:
        """Of the headline."""
        return self.headline.state

    def _where(self) -> str:
        return f"{self.model or 'model'}, plan {self.title}, {self.forwards} model calls"

    def __str__(self) -> str:
        summary = self.summary
        head = self.headline
        lines = [head.first, head.second]
        lines += [f"WARNING: {alarm}" for alarm in self.alarms[1:]]  # the first is in the headline
        more = [self._where()] if self.timing is None else [self.timing.brief(), self._where()]
        lines += [line for line in more if line not in lines]
        if summary.calls:
            shares = ", ".join(f"{spec} {share:.0%}" for spec, share in summary.shares.items())
            declined = sum(summary.declined.values())
            lines.append(f"{declined} declined" + (f"; share: {shares}" if shares else ""))
        lines += self.notes
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
            "state": self.state,
            "headline": [self.headline.first, self.headline.second],
            "model": self.model,
            "plan": self.title,
            "model_calls": self.forwards,
            "seconds": None if self.timing is None else self.timing.to_dict(),
            **self.summary.to_dict(),
            "warnings": list(self.alarms),
            "notes": list(self.notes),
        }
