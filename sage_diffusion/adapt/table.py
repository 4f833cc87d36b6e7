"""``ScoreTable``: what every spec did to every (layer, step, branch), with its spread, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sage_diffusion.adapt.table_json import VERSION, TableError, parse_table
from sage_diffusion.attend.calls import AttentionEvent
from sage_diffusion.attend.rows import METRICS
from sage_diffusion.files import write_text
from sage_diffusion.json_files import JSONError, read_json
from sage_diffusion.kernels.spec import FP16
from sage_diffusion.plan import PrecisionPlan
from sage_diffusion.plan.fingerprint import mismatch

#: Branch of calls that serve both or where the host doesn't say.
BOTH = "both"


@dataclass
class ScoreTable:
    """Measurements of a calibration; grows while it runs.

    Axes of the arrays: layer, step, branch, spec; NaN stands for "not measured", never 0.

    Attributes:
        specs: names of the candidates.
        steps: of the sampling runs.
        fingerprint: of the model (:func:`sage_diffusion.plan.fingerprint.fingerprint`).
        settings: how it was measured (rows, seed, share of cells ..); must agree when resuming.
        layers: names in the order of their first call.
        branches: "both", or "cond" and "uncond".
        schedule: sigma of every step, where the host tells it.
        schedule_unit: what its numbers are, as in a plan.
        runs: finished ``(prompt, seed)`` pairs.
        extra: cells ``(layer, step, branch)`` measured in a second pass, extra_runs: its runs.
        count: runs that measured every cell, ``[L, S, B]``.
        mean, m2: running mean and sum of squared deviations ``[L, S, B, K, len(METRICS)]``.
        work: ``B * H * Lq * Lk * D`` of one call, ``[L, S, B]``, of several their mean; NaN where
            no call was seen.
        calls: calls per run of every cell, ``[L, S, B]``.
        outliers: max over runs of the outlier factor of Q, K and V, ``[L, S, B, 3]``.
        sensitivity: effect on the final latent, see :mod:`sage_diffusion.adapt.sensitivity`.
        unfinished: what that stage has found so far while it is under way.
        tokens: of a layer's Q and of its K and V, as its largest call of the last run had them;
            layers of tables that were made before this was kept are missing.
    """

    specs: tuple[str, ...]
    steps: int
    fingerprint: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    schedule: list[float] | None = None
    runs: list[tuple[str, int]] = field(default_factory=list)
    extra: list[tuple[str, int, str]] = field(default_factory=list)
    extra_runs: list[tuple[str, int]] = field(default_factory=list)
    sensitivity: dict[str, Any] | None = None
    unfinished: dict[str, Any] | None = None
    schedule_unit: str | None = None
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.layers), self.steps, len(self.branches))
        self.count = np.zeros(shape, dtype=np.int64)
        self.mean = np.full((*shape, len(self.specs), len(METRICS)), np.nan)
        self.m2 = np.zeros((*shape, len(self.specs), len(METRICS)))
        self.work = np.full(shape, np.nan)
        self.calls = np.zeros(shape, dtype=np.int64)
        self.outliers = np.full((*shape, 3), np.nan)

    # ------------------------------------------------------------------ growing
    def _grow(self, layer: str, branch: str) -> tuple[int, int]:
        for axis, names, name in ((0, self.layers, layer), (2, self.branches, branch)):
            if name in names:
                continue
            names.append(name)
            for key, empty in (
                ("count", 0),
                ("mean", np.nan),
                ("m2", 0.0),
                ("work", np.nan),
                ("calls", 0),
                ("outliers", np.nan),
            ):
                array = getattr(self, key)
                shape = list(array.shape)
                shape[axis] = 1
                fresh = np.full(shape, empty, dtype=array.dtype)
                setattr(self, key, np.concatenate([array, fresh], axis))
        return self.layers.index(layer), self.branches.index(branch)

    def saw(
        self,
        layer: str,
        step: int,
        branch: str | None,
        work: float,
        calls: int,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        """A run called this cell ``calls`` times with this much work a call in the mean."""
        i, b = self._grow(layer, branch or BOTH)
        self.work[i, step, b], self.calls[i, step, b] = work, calls
        if tokens is not None:
            self.tokens[layer] = tokens

    def add(
        self,
        layer: str,
        step: int,
        branch: str | None,
        values: np.ndarray,
        outliers: Sequence[float] = (math.nan,) * 3,
    ) -> None:
        """One measurement of a cell: ``values`` is ``[len(specs), len(METRICS)]``."""
        i, b = self._grow(layer, branch or BOTH)
        cell = i, step, b
        if self.count[cell] == 0:
            self.mean[cell] = 0.0
        self.count[cell] += 1
        delta = values - self.mean[cell]
        self.mean[cell] += delta / self.count[cell]
        self.m2[cell] += delta * (values - self.mean[cell])
        self.outliers[cell] = np.fmax(self.outliers[cell], outliers)

    # ------------------------------------------------------------------ reading
    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, steps, branches."""
        return len(self.layers), self.steps, len(self.branches)

    @property
    def measured(self) -> np.ndarray:
        """Which cells have a measurement, ``[L, S, B]`` bool."""
        return self.count > 0

    @property
    def exists(self) -> np.ndarray:
        """Which cells the model calls at all, ``[L, S, B]`` bool.

        A cell that no run called (a step cache skipped it) is unknown, not absent, as long as its
        layer and branch occur at other steps.
        """
        called = ~np.isnan(self.work)
        return np.broadcast_to(called.any(1, keepdims=True), called.shape).copy()

    def metric(self, name: str) -> np.ndarray:
        """Mean of ``cosine``, ``rel_l1``, ``error`` or ``score`` = cosine (1 - L1), ``[L,S,B,K]``.

        The score is made from the mean cosine and mean L1.
        """
        if name == "score":
            return self.metric("cosine") * (1 - self.metric("rel_l1"))
        if name not in METRICS:
            raise ValueError(f"metric must be score, {', '.join(METRICS)}, got {name!r}")
        return self.mean[..., METRICS.index(name)]

    def spread(self, name: str) -> np.ndarray:
        """Standard deviation over prompts and seeds, ``[L, S, B, K]``; NaN below two runs."""
        counts = np.where(self.count > 1, self.count - 1, np.nan)[..., None]
        return np.sqrt(self.m2[..., METRICS.index(name)] / counts)

    def filled_work(self) -> np.ndarray:
        """Work of all calls of every cell per run, gaps taken from the layer's other steps.

        ``[L, S, B]``; 0 where the layer never serves that branch.
        """
        return _filled(np.where(np.isnan(self.work), np.nan, self.work * self.calls))

    def filled_calls(self) -> np.ndarray:
        """The same of how many calls these are."""
        return _filled(np.where(self.calls > 0, self.calls, np.nan))

    @property
    def unquantized(self) -> PrecisionPlan:
        """FP16 everywhere, with the sequence of signs that candidates are measured with."""
        return PrecisionPlan(FP16, sign_seed=self.settings.get("sign_seed"))

    def head_dims(self) -> list[int]:
        """Head dim of every layer; 128 where the fingerprint doesn't say."""
        known = self.fingerprint.get("head_dims") or {}
        return [int(known.get(layer, 128)) for layer in self.layers]

    # ------------------------------------------------------------------ JSON
    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes null."""
        return {
            "version": VERSION,
            "specs": list(self.specs),
            "steps": self.steps,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "schedule": self.schedule,
            "schedule_unit": self.schedule_unit,
            "layers": list(self.layers),
            "branches": list(self.branches),
            "tokens": {layer: list(pair) for layer, pair in self.tokens.items()},
            "runs": [list(run) for run in self.runs],
            "extra": [list(cell) for cell in self.extra],
            "extra_runs": [list(run) for run in self.extra_runs],
            "metrics": list(METRICS),
            "count": self.count.tolist(),
            "mean": _plain(self.mean),
            "m2": _plain(self.m2),
            "work": _plain(self.work),
            "calls": self.calls.tolist(),
            "outliers": _plain(self.outliers),
            "sensitivity": self.sensitivity,
            "unfinished": self.unfinished,
        }

    def save(self, path: str | Path) -> None:
        """Write the table; the file is whole at any moment, even when interrupted."""
        write_text(Path(path), json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read a table.

        Raises:
            TableError: unreadable, no table, or of a later version; the message names the file.
        """
        try:
            return cls.from_dict(read_json(path))
        except OSError as error:
            raise TableError(f"{path}: cannot be read: {error.strerror}") from None
        except (JSONError, TableError) as error:
            raise TableError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Any) -> ScoreTable:
        """The table of :meth:`to_dict`; raises as :func:`.table_json.parse_table`."""
        fields, arrays = parse_table(data)
        table = cls(**fields)
        for name, array in arrays.items():
            setattr(table, name, array)
        return table

    def check_same(self, other: ScoreTable) -> None:
        """May this table be continued by a calibration that would have made ``other``?

        Raises:
            TableError: naming what differs.
        """
        reason = mismatch(self.fingerprint, other.fingerprint)
        if reason is not None:
            raise TableError(f"the score table belongs to another model: {reason}")
        differences = _differences(
            {"specs": list(self.specs), **_flat(self.settings)},
            {"specs": list(other.specs), **_flat(other.settings)},
        )
        if differences:
            kind = "specs" if self.specs != other.specs else "settings"
            raise TableError(
                f"the score table was made with other {kind}: {'; '.join(differences)}; delete the "
                "file or calibrate into another one"
            )


class SeenCalls:
    """Observer of which cells a run calls, and of how much work they are.

    Attributes:
        head_dims: of each layer.
    """

    def __init__(self) -> None:
        self.head_dims: dict[str, int] = {}
        self._work: dict[tuple[str, int, str | None], list[int]] = {}
        self._largest: dict[str, tuple[int, tuple[int, int]]] = {}

    def observe(self, event: AttentionEvent) -> None:
        """See :class:`sage_diffusion.attend.calls.Observer`."""
        if event.step < 0:
            return
        batch, heads, q_len, dim = event.q.shape
        k_len = event.k.shape[2]
        work = batch * heads * q_len * k_len * dim
        self.head_dims[event.layer] = dim
        self._work.setdefault((event.layer, event.step, event.branch), []).append(work)
        here = work, (q_len, k_len)
        self._largest[event.layer] = max(self._largest.get(event.layer, here), here)

    def store(self, table: ScoreTable) -> None:
        """Tell a table of them."""
        for (layer, step, branch), work in self._work.items():
            tokens = self._largest[layer][1]
            table.saw(layer, step, branch, sum(work) / len(work), len(work), tokens)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and those of the sampling, side by side."""
    inner = settings.get("sampling")
    own = {key: value for key, value in settings.items() if key != "sampling"}
    return own | (dict(inner) if isinstance(inner, Mapping) else {})


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys((*before, *now))
    return [
        f"{key} {_short(before.get(key))}, now {_short(now.get(key))}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _filled(total: np.ndarray) -> np.ndarray:
    """``[L, S, B]`` with the mean of the layer's other steps for NaN, 0 where there are none."""
    counts = (~np.isnan(total)).sum(1, keepdims=True)
    mean = np.nansum(total, 1, keepdims=True) / np.maximum(counts, 1)
    return np.where(np.isnan(total), np.broadcast_to(mean, total.shape), total)


def _plain(array: np.ndarray) -> Any:
    """Nested lists, 6 significant digits, NaN as None."""
    if array.ndim == 0:
        return None if math.isnan(array) else float(f"{array:.6g}")
    return (
        [_plain(part) for part in array]
        if array.ndim > 1
        else [None if math.isnan(x) else float(f"{x:.6g}") for x in array.tolist()]
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
