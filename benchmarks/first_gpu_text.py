"""The tables at the end of :mod:`.first_gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sage_diffusion.verify.run import Verdict
from sage_diffusion.verify.speed import Time
from sage_diffusion.verify.text import time_lines, verdict_lines


def report(found: dict[str, Any]) -> list[str]:
    """Everything in a document, as lines."""
    title = f"{found['machine']['card']}, {found['seconds']:.0f} seconds"
    verdicts = map(Verdict.from_dict, found.get("verify", {}).get("verdicts", []))
    lines = ["", *verdict_lines(title, verdicts)]
    lines += time_lines(Time(**row) for row in found.get("apart", []))
    for name, rows in found.items():
        if name.startswith("bench "):
            lines += _lengths(name, rows)
    for name in ("model", "overhead", "graphs", "codes", "compile"):
        lines += _named(name, found.get(name, {}))
    lines += ["", f"{len(found['problems'])} problems"]
    lines += [f"  {entry['section']}: {entry['reason'][-240:]}" for entry in found["problems"]]
    return lines


def _lengths(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    lengths = sorted({row["length"] for row in rows})
    if rows:
        yield f"\n{name + ', TOPS':<32}" + "".join(f"{length:>8}" for length in lengths)
    for who in dict.fromkeys((row["backend"], row["spec"]) for row in rows):
        cells = {row["length"]: row for row in rows if (row["backend"], row["spec"]) == who}
        texts = [_number(cells[n]["tops"], ".0f") if n in cells else "-" for n in lengths]
        yield f"{' '.join(who):<32}" + "".join(f"{text:>8}" for text in texts)
    for row in rows:
        if row["reason"]:
            yield f"  {row['backend']} {row['spec']} {row['length']}: {row['reason'][:160]}"


def _named(name: str, rows: dict[str, Any]) -> Iterator[str]:
    if rows:
        yield f"\n{name}"
    for key, row in rows.items():
        texts = []
        for figure, value in row.items():
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            texts.append(f"{figure} {text}")
        yield f"  {key:<30} " + ", ".join(texts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
