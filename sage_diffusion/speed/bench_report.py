"""Bounds where there is no GPU, and what a benchmark looks like: JSON and a plot."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall, Call
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.speed.bench import (
    DEFAULT_HEAD_DIMS,
    DEFAULT_LENGTHS,
    MEASURED,
    PREDICTED,
    Result,
    Row,
    contestants,
    distance,
    inputs,
    operations,
)
from sage_diffusion.speed.traffic import call_milliseconds

#: Tokens of the twin's call that stands for a prediction's accuracy.
TWIN_TOKENS = 512


def predict(
    specs: Sequence[AttentionSpec | str],
    names: Sequence[str],
    gpu: str,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    head_dims: Sequence[int] = DEFAULT_HEAD_DIMS,
    batch: int = 1,
    heads: int = 24,
    is_causal: bool = False,
    tell: Callable[[Row], None] = lambda row: None,
) -> Result:
    """Predicted bounds of the attention kernels alone, from their machine code, and of calls.

    A kernel's time can't be shorter: no launch, no quantization, no memory latency is in it.  What
    quantization and launches add to a call of ours is predicted by :mod:`.traffic`.

    Raises:
        CostError: a card of that name is unknown.
        FileNotFoundError: triton is not installed.
    """
    from sage_diffusion.speed.cost import gpu_named

    gpu_named(gpu)
    result = Result([], {})
    for head_dim, entrant in itertools.product(head_dims, contestants(specs, names)):
        spec, name = entrant.spec, entrant.backend
        tops = _tops(spec, name, gpu, head_dim, is_causal)
        if isinstance(tops, str):
            result.refused[str(spec), name, head_dim] = tops
            continue
        error = twin_distance(spec, head_dim, is_causal)
        for length in lengths:
            least = operations(batch, heads, length, head_dim, is_causal) / tops / 1e9
            row = Row(str(spec), name, head_dim, length, PREDICTED, least, tops, None, error)
            if name in backends.ours():
                whole = call_milliseconds(
                    gpu_named(gpu).gbs,
                    spec,
                    length,
                    head_dim,
                    batch * heads,
                    loop=least,
                    in_columns=name != "triton",
                )
                row = replace(row, call_milliseconds=whole)
            result.rows.append(row)
            tell(row)
    return result


def _tops(spec: AttentionSpec, name: str, gpu: str, head_dim: int, is_causal: bool) -> float | str:
    """Most tera-operations per second of a backend's kernel on a card, or why it isn't known."""
    from sage_diffusion.speed.cost import CostError, cubin_cost, gpu_named, library_costs
    from sage_diffusion.speed.cost_compile import compile_attention

    record = next((b for b in backends.BACKENDS if b.name == name), None)
    if record is not None and record.kernels is not None:
        reasons: dict[str, str] = {}
        kernel = compile_attention(
            spec,
            head_dim,
            gpu_named(gpu).capability,
            is_causal=is_causal,
            reasons=reasons,
            backend=name,
        )
        if kernel is None:
            return reasons[str(spec)]
        return cubin_cost(kernel.cubin, gpu, str(spec), head_dim).tops
    if record is None or record.library is None:
        return "a bound needs its machine code, which is not in a file here"
    arch = gpu_named(gpu).arch
    refused = record.refuse(AttentionCall.typical(spec, arch, head_dim, is_causal=is_causal))
    if refused is not None:
        return refused
    try:
        return max(cost.tops for cost in library_costs(record.library, [gpu], [head_dim]))
    except CostError as error:
        return str(error)


def twin_distance(spec: AttentionSpec, head_dim: int, is_causal: bool) -> float:
    """Relative L1 distance of the spec's twin from exact attention, on the CPU."""
    q, k, v = inputs(1, 1, TWIN_TOKENS, head_dim, torch.device("cpu"), torch.float32)
    out, _ = backends.load(backends.named("reference"))(Call(q, k, v, None, is_causal), spec, False)
    return distance(out, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal))


def document(
    result: Result, *, label: str, gpu: str, batch: int, heads: int, is_causal: bool
) -> dict[str, Any]:
    """A benchmark as plain data; ``label`` is "measured" or "predicted bound"."""
    from sage_diffusion.machine import environment

    return {
        "label": label,
        "note": NOTES[label],
        "gpu": gpu,
        "environment": environment(),
        "batch": batch,
        "heads": heads,
        "causal": is_causal,
        "rows": [row.as_dict() for row in result.rows],
        "refused": [
            {"spec": spec, "backend": backend, "head_dim": head_dim, "reason": reason}
            for (spec, backend, head_dim), reason in result.refused.items()
        ],
    }


#: What the figures are.
NOTES = {
    MEASURED: "median of CUDA-event times with a cold L2 cache, quantization included, queued "
    "behind a sleeping kernel so that the host's time is not in them but in a column of its own; "
    "relative L1 against PyTorch's attention on the same normally distributed inputs",
    PREDICTED: "predicted bound of the attention kernel alone from its machine code, quantization "
    "excluded, nothing was run; call ms adds what quantization and launches take by an H200's "
    "rates and the card's bandwidth; relative L1 is of the Torch twin at "
    f"{TWIN_TOKENS} tokens",
}


def plot(rows: Sequence[Row], title: str) -> bytes:
    """A PNG: TOPS over lengths, one panel per head dim, one line per spec and backend.

    Raises:
        ImportError: matplotlib, the extra ``plot``, is not installed.
        ValueError: no row has a time.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the plot needs matplotlib: pip install 'sage-diffusion[plot]'"
        ) from error
    timed = [row for row in rows if row.tops is not None]
    if not timed:
        raise ValueError("nothing was timed, there is nothing to plot")
    head_dims = sorted({row.head_dim for row in timed})
    lines = list(dict.fromkeys((row.spec, row.backend) for row in timed))
    figure = Figure(figsize=(1 + 5.5 * len(head_dims), 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(head_dims), sharey=True, squeeze=False)[0]
    for panel, head_dim in zip(panels, head_dims, strict=True):
        for number, (spec, backend) in enumerate(lines):
            points = sorted(
                (row.length, row.tops, row.relative_l1)
                for row in timed
                if (row.spec, row.backend, row.head_dim) == (spec, backend, head_dim)
            )
            if not points:
                continue
            worst = max(point[2] or 0.0 for point in points)
            panel.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                marker="o",
                markersize=3,
                label=f"{spec} ({backend}), L1 {worst:.1%}",
            )
        panel.set_xscale("log", base=2)
        panel.set_title(f"head dim {head_dim}")
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("TOPS" if timed[0].status == MEASURED else "TOPS (predicted bound)")
    panels[0].set_ylim(bottom=0)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()
