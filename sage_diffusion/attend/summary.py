"""What a session did, layer by layer, for people and for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sage_diffusion.attend.guard import GuardState
from sage_diffusion.attend.health import Verdicts


@dataclass(frozen=True)
class LayerSummary:
    """Calls of one layer.

    Attributes:
        name: of the layer.
        ran: (spec, backend) -> calls; backend "native" is the host's own attention, as planned.
        declined: reason -> calls that the host had to run itself although the plan quantizes.
        non_finite: steps whose output had NaN or infinity.
        stepped_up: why the guard gave the layer a more accurate spec, once per time.
        drift: largest relative L1 distance from exact attention that the guard found, None where
            it did not look.
        came_in: steps in which NaN or infinity came into the layer; its output says so.
        further: what ``ran`` and ``declined`` count beyond the host's calls, as a call whose batch
            was served in parts counts once for each.
        further_quantized: of those, quantized parts beyond the first of their call.
    """

    name: str
    ran: Mapping[tuple[str, str], int]
    declined: Mapping[str, int]
    non_finite: tuple[int, ...] = ()
    stepped_up: tuple[str, ...] = ()
    drift: float | None = None
    came_in: tuple[int, ...] = ()
    further: int = 0
    further_quantized: int = 0

    @classmethod
    def of(cls, layer: Any, verdicts: Verdicts, guard: GuardState) -> LayerSummary:
        """What a layer counted, and what was found of it."""
        return cls(
            layer.name,
            dict(layer.ran),
            dict(layer.declined),
            tuple(verdicts.non_finite.get(layer.name, ())),
            tuple(guard.reasons.get(layer.name, ())),
            guard.drift.get(layer.name),
            tuple(verdicts.came_in.get(layer.name, ())),
            layer.further,
            layer.further_quantized,
        )

    @property
    def calls(self) -> int:
        """All calls of the host that came through the layer."""
        return sum(self.ran.values()) + sum(self.declined.values()) - self.further

    @property
    def quantized(self) -> int:
        """Calls of the host that ran quantized, in part at least."""
        ran = sum(n for (spec, _), n in self.ran.items() if spec != "fp16")
        return ran - self.further_quantized


@dataclass(frozen=True)
class SessionSummary:
    """Every layer's calls; ``str()`` is a table.

    Attributes:
        layers: in the order of their first call.
        compilation_failures: kernel, target and the compiler's message -> calls that another
            backend or the host ran instead.
        warnings: what was odd about whole runs, with cause and remedy.
    """

    layers: tuple[LayerSummary, ...]
    compilation_failures: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """Intercepted calls.  Zero after sampling means that nothing was reached: a warning."""
        return sum(layer.calls for layer in self.layers)

    @property
    def quantized(self) -> int:
        """Calls that ran quantized."""
        return sum(layer.quantized for layer in self.layers)

    @property
    def specs(self) -> dict[str, int]:
        """spec -> calls (parts of those that were served in parts), most frequent first."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            for (spec, _), n in layer.ran.items():
                total[spec] += n
        return dict(total.most_common())

    @property
    def shares(self) -> dict[str, float]:
        """spec -> share of all calls, or parts of calls."""
        whole = self.calls + sum(layer.further for layer in self.layers)
        return {spec: n / whole for spec, n in self.specs.items()}

    @property
    def declined(self) -> dict[str, int]:
        """reason -> calls, most frequent first."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.declined)
        return dict(total.most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "calls": self.calls,
            "quantized": self.quantized,
            "specs": self.specs,
            "declined": self.declined,
            "compilation_failures": dict(self.compilation_failures),
            "warnings": list(self.warnings),
            "layers": [
                {
                    "name": layer.name,
                    "ran": [
                        {"spec": spec, "backend": backend, "calls": n}
                        for (spec, backend), n in layer.ran.items()
                    ],
                    "declined": dict(layer.declined),
                    "non_finite_steps": list(layer.non_finite),
                    "non_finite_input_steps": list(layer.came_in),
                    "stepped_up": list(layer.stepped_up),
                    "drift": layer.drift,
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        lines = [f"WARNING: {warning}" for warning in self.warnings]
        if not self.calls:
            lines.append(
                f"no attention call was intercepted ({len(self.layers)} layers are patched)"
            )
            return "\n".join(lines)
        shares = ", ".join(f"{spec} {share:.0%}" for spec, share in self.shares.items())
        lines += [f"{self.calls} attention calls, {self.quantized} quantized: {shares}"]
        width = max(len(layer.name) for layer in self.layers)
        for layer in self.layers:
            parts = [f"{spec} ({backend}) x{n}" for (spec, backend), n in layer.ran.items()]
            parts += [f"own attention x{n}: {reason}" for reason, n in layer.declined.items()]
            if layer.non_finite:
                parts.append(f"NOT FINITE at steps {', '.join(map(str, layer.non_finite))}")
            if layer.came_in:
                parts.append(f"NaN CAME IN at steps {', '.join(map(str, layer.came_in))}")
            parts += [f"stepped up: {reason}" for reason in layer.stepped_up]
            lines.append(f"  {layer.name:<{width}}  {', '.join(parts) or 'not called'}")
        for reason, n in self.compilation_failures.items():
            lines.append(f"  {n} calls ran elsewhere: {reason}")
        return "\n".join(lines)
