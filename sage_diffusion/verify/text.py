"""A verification as plain text: a line per kernel, then what is wrong, then times."""

from __future__ import annotations

from collections.abc import Iterable

from sage_diffusion.verify.run import Verdict
from sage_diffusion.verify.speed import Time


def verdict_lines(card: str, found: Iterable[Verdict]) -> list[str]:
    """A table with a line per kernel, and a sentence for each that is not right."""
    found = list(found)
    lines = [
        card,
        "",
        f"{'kernel':<24} {'verdict':<12} {'cases':>5} {'from twin':>10} {'from float64':>13}",
    ]
    for verdict in found:
        name, figures = verdict.kernel, [_distance(verdict.twin), _distance(verdict.exact)]
        if name.startswith(("rows ", "value ")):
            name = f"quantize {name}"
            figures = ["bit by bit" if verdict.status == "right" else "-", "-"]
        lines.append(
            f"{name:<24} {verdict.status:<12} {verdict.cases:>5} {figures[0]:>10} {figures[1]:>13}"
        )
    lines.append("worst relative L1 distances: on the same codes, and of the whole call")
    reasons = [f"{v.kernel} {v.status}: {v.reason}" for v in found if v.reason]
    left_out = dict.fromkeys(text for verdict in found for text in verdict.left_out)
    reasons += [f"left out: {text}" for text in left_out]
    return [*lines, *([""] if reasons else []), *reasons]


def _distance(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def time_lines(times: Iterable[Time]) -> list[str]:
    """A table with a line per kernel and length; none where nothing was timed."""
    times = list(times)
    if not times:
        return []
    lines = [
        "",
        f"median milliseconds, {times[0].heads} heads, head dim {times[0].head_dim}",
        f"{'kernel':<24} {'tokens':>6} {'call':>8} {'quantize':>8} {'kernel':>8} {'host':>8} "
        f"{'TOPS':>5} {'kernel TOPS':>11} {'MiB':>6}",
    ]
    for row in times:
        parts = [
            f"{row.kernel:<24}",
            f"{row.length:>6}",
            *(
                f"{'-' if x is None else format(x, '.3f'):>8}"
                for x in (row.milliseconds, row.quantize_ms, row.kernel_ms, row.host_ms)
            ),
            f"{_whole(row.tops):>5}",
            f"{_whole(row.kernel_tops):>11}",
            f"{_whole(row.peak_mib):>6}",
            row.reason or "the card waited for the host" * row.gaps,
        ]
        lines.append(" ".join(parts).rstrip())
    note = "kernel: without quantization; host: until a call is queued; MiB beyond the inputs"
    return [*lines, note]


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
