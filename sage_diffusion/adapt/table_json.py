"""Reading score tables: every error names the JSON path, what must hold and what came."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from sage_diffusion.attend.rows import METRICS
from sage_diffusion.json_files import json_path, shown
from sage_diffusion.kernels.spec import EDITION, AttentionSpec
from sage_diffusion.plan.rules import UNITS

#: And edition of the names of specs (``kernels.spec.EDITION``), which are read as what they meant.
VERSION = 5

_LARGE = 10**9  # of steps and head dims


class TableError(ValueError):
    """A score table that can't be read, or that belongs to another model or calibration."""


#: Parts of a cell's arrays beyond ``[L, S, B]``: specs, metrics, tensors.
_ARRAYS = {
    "count": "",
    "mean": "km",
    "m2": "km",
    "work": "",
    "calls": "",
    "outliers": "t",
}


def parse_table(data: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields and the arrays of the table that ``ScoreTable.to_dict`` wrote.

    Raises:
        TableError: no table, another version, or a wrong value.
    """
    if not isinstance(data, Mapping) or not _whole(data.get("version")):
        raise TableError("is not a score table: version is missing")
    if "default" in data:  # plans have versions, too
        raise TableError("is not a score table, it is a plan")
    if not 1 <= data["version"] <= VERSION:
        raise TableError(
            f"score table of version {shown(data['version'])}, this program reads up to {VERSION}"
        )
    try:
        return _parse(data)
    except KeyError as error:
        raise TableError(f"is not a score table: {error.args[0]} is missing") from None


def _parse(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    _need(data["metrics"] == list(METRICS), "metrics", ", ".join(METRICS), data["metrics"])
    specs = _names(data["specs"], "specs")
    for i, name in enumerate(specs):
        try:
            spec = AttentionSpec.parse(name, edition=data["version"])
        except ValueError as error:
            raise TableError(f"specs[{i}]: {error}") from None
        if data["version"] != EDITION:
            specs[i] = str(spec)
    layers, branches = _names(data["layers"], "layers"), _names(data["branches"], "branches")
    steps = data["steps"]
    _need(_whole(steps) and 0 <= steps <= _LARGE, "steps", "a whole number", steps)
    sizes = {"k": len(specs), "m": len(METRICS), "t": 3}
    cells = (len(layers), steps, len(branches))
    arrays = {
        key: _numbers(
            data[key],
            (*cells, *(sizes[axis] for axis in more)),
            key,
            low=np.where(np.array(METRICS) == "cosine", -1.0, 0.0) if key == "mean" else 0.0,
        )
        for key, more in _ARRAYS.items()
    }
    for key in ("count", "calls"):
        _need(not np.isnan(arrays[key]).any(), key, "numbers", "null")
        arrays[key] = arrays[key].astype(np.int64)
    settings, unfinished = data["settings"], data.get("unfinished")
    _need(isinstance(settings, Mapping), "settings", "an object", settings)
    fields = {
        "specs": tuple(specs),
        "steps": steps,
        "fingerprint": _fingerprint(data["fingerprint"]),
        "settings": dict(settings),
        "layers": layers,
        "branches": branches,
        "schedule": _schedule(data["schedule"], steps),
        "runs": _runs(data["runs"], "runs"),
        "extra": _cells(data["extra"], "extra"),
        "extra_runs": _runs(data["extra_runs"], "extra_runs"),
        "sensitivity": _sensitivity(data["sensitivity"], layers, steps, branches, len(specs)),
        "unfinished": unfinished,
        "schedule_unit": _unit(data.get("schedule_unit")),
        "tokens": _tokens(data.get("tokens", {}), layers),
    }
    fine = unfinished is None or isinstance(unfinished, Mapping)
    _need(fine, "unfinished", "an object or null", unfinished)
    return fields, arrays


def _tokens(data: Any, layers: list[str]) -> dict[str, tuple[int, int]]:
    """Of every layer's Q and K; tables of before have none."""
    _need(isinstance(data, Mapping), "tokens", "an object of layer: [of Q, of K]", data)
    for layer, pair in data.items():
        at = json_path(("tokens", layer))
        _need(layer in layers, at, "of a layer of the table", layer)
        fine = isinstance(pair, list) and len(pair) == 2
        fine = fine and all(_whole(n) and 1 <= n <= _LARGE for n in pair)
        _need(fine, at, "two whole numbers, of Q and of K", pair)
    return {layer: (q_len, k_len) for layer, (q_len, k_len) in data.items()}


def _sensitivity(
    data: Any, every: list[str], steps: int, branches: list[str], kinds: int
) -> dict[str, Any] | None:
    """What :mod:`.gradient` or :mod:`.sensitivity` found."""
    if data is None:
        return None
    at = "sensitivity"
    _need(isinstance(data, Mapping), at, "an object or null", data)
    found = dict(data)
    _need(_real(found["peak"]) and found["peak"] > 0, f"{at}.peak", "positive", found["peak"])
    factor = _numbers(found["factor"], (kinds,), f"{at}.factor")
    _need(not np.isnan(factor).any(), f"{at}.factor", "numbers", "null")
    if found.get("method") == "gradient":
        layers = _names(found["layers"], f"{at}.layers")
        own = _names(found["branches"], f"{at}.branches")
        _numbers(found["effect"], (len(layers), steps, len(own), kinds), f"{at}.effect")
        if found.get("correlation") is not None:
            lags = (kinds, len(own), len(own), steps)
            _numbers(found["correlation"], lags, f"{at}.correlation", low=-1.0, high=1.0)
        return found
    groups, spans = found["layers"], found["steps"]
    _need(isinstance(groups, list), f"{at}.layers", "a list of groups", groups)
    for i, group in enumerate(groups):
        for name in _names(group, f"{at}.layers[{i}]"):
            _need(name in every, f"{at}.layers[{i}]", "layers of the table", name)
    _need(isinstance(spans, list), f"{at}.steps", "a list of [first, stop]", spans)
    for i, pair in enumerate(spans):
        fine = isinstance(pair, list) and len(pair) == 2 and all(map(_whole, pair))
        fine = fine and 0 <= pair[0] < pair[1] <= steps
        _need(fine, f"{at}.steps[{i}]", f"[first, stop] within {steps} steps", pair)
    shape: tuple[int, ...] = (len(groups), len(spans))
    if found.get("branches") is not None:  # a stage of before did not tell them apart
        shape += (_branch_groups(found["branches"], branches, f"{at}.branches"),)
    weight = _numbers(found["weight"], shape, f"{at}.weight")
    _need(not np.isnan(weight).any(), f"{at}.weight", "numbers", "null")
    return found


def _branch_groups(data: Any, every: list[str], at: str) -> int:
    """How many groups of the table's branches there are."""
    _need(isinstance(data, list), at, "a list of groups", data)
    for i, group in enumerate(data):
        for name in _names(group, f"{at}[{i}]"):
            _need(name in every, f"{at}[{i}]", "branches of the table", name)
    return len(data)


def _fingerprint(data: Any) -> dict[str, Any]:
    _need(isinstance(data, Mapping), "fingerprint", "an object", data)
    if data.get("layers") is not None:
        _names(data["layers"], "fingerprint.layers")
    model, dims = data.get("model"), data.get("head_dims") or {}
    _need(model is None or isinstance(model, str), "fingerprint.model", "a name", model)
    _need(isinstance(dims, Mapping), "fingerprint.head_dims", "an object", dims)
    for name, dim in dims.items():
        where = json_path(("fingerprint", "head_dims", name))
        _need(_whole(dim) and 0 < dim <= _LARGE, where, "a whole number", dim)
    return dict(data)


def _unit(data: Any) -> str | None:
    known = data is None or (isinstance(data, str) and data in UNITS)
    _need(known, "schedule_unit", f"one of {', '.join(UNITS)} or null", data)
    return None if data is None else str(data)


def _schedule(data: Any, steps: int) -> list[float] | None:
    if data is None:
        return None
    fine = isinstance(data, list) and len(data) == steps and all(map(_real, data))
    fine = fine and all(b < a for a, b in itertools.pairwise(data))
    _need(fine, "schedule", f"{steps} strictly descending numbers or null", data)
    return [float(x) for x in data]


def _runs(data: Any, path: str) -> list[tuple[str, int]]:
    _need(isinstance(data, list), path, "a list of [prompt, seed]", data)
    for i, run in enumerate(data):
        fine = isinstance(run, list) and len(run) == 2
        fine = fine and isinstance(run[0], str) and _whole(run[1])
        _need(fine, f"{path}[{i}]", "[prompt, seed]", run)
    return [(prompt, seed) for prompt, seed in data]


def _cells(data: Any, path: str) -> list[tuple[str, int, str]]:
    _need(isinstance(data, list), path, "a list of [layer, step, branch]", data)
    for i, cell in enumerate(data):
        fine = isinstance(cell, list) and len(cell) == 3 and _whole(cell[1])
        fine = fine and isinstance(cell[0], str) and isinstance(cell[2], str)
        _need(fine, f"{path}[{i}]", "[layer, step, branch]", cell)
    return [(layer, step, branch) for layer, step, branch in data]


def _names(data: Any, path: str) -> list[str]:
    fine = isinstance(data, list) and all(isinstance(name, str) for name in data)
    _need(fine and len(set(data)) == len(data), path, "a list of different names", data)
    return list(data)


def _numbers(
    data: Any,
    shape: tuple[int, ...],
    path: str,
    *,
    low: float | np.ndarray = 0.0,
    high: float = sys.float_info.max,
) -> np.ndarray:
    """A float64 array of this shape, null as NaN, between these (of the last axis's entries)."""
    try:
        kinds = set(map(type, np.array(data, dtype=object).ravel().tolist()))
        if not kinds <= {int, float, type(None)}:  # numpy would take "1" and true for numbers
            raise TypeError
        array = np.array(data, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        where, what = _no_number(data, path)
        came = "lists of different lengths" if what is None else shown(what)
        raise TableError(
            f"{where} must be numbers in lists of {_text(shape)}, got {came}"
        ) from None
    if not array.size and 0 in shape:
        return np.zeros(shape)
    _need(array.shape == shape, path, f"numbers in lists of {_text(shape)}", _text(array.shape))
    wrong = array[(array < low) | (array > high)]
    must = "not negative and finite" if high > 1 else f"within {low} .. {high}"
    _need(not wrong.size, path, must, wrong[:1].tolist())
    return array


def _no_number(data: Any, path: str) -> tuple[str, Any]:
    """Where the first value stands that is neither number nor list of numbers, and what it is."""
    if isinstance(data, list):
        for i, each in enumerate(data):
            where, what = _no_number(each, f"{path}[{i}]")
            if what is not None:
                return where, what
        return path, None
    return path, None if data is None or _real(data) else data


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "no list at all"


def _need(condition: bool, path: str, must: str, got: Any) -> None:
    if not condition:
        raise TableError(f"{path} must be {must}, got {shown(got)}")
