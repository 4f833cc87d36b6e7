"""Run twice and compare: FP16, then with a plan, on the same seeds.

Nothing here knows a host: a host gives a callable that samples with a session attached
(:data:`Run`); ``integrations.diffusers.pipelines`` makes one of a diffusers pipeline.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sage_diffusion.accuracy import metrics
from sage_diffusion.accuracy.pictures import make_picture
from sage_diffusion.accuracy.records import EndToEnd, Picture, Row
from sage_diffusion.accuracy.report import AccuracyReport
from sage_diffusion.attend.calls import AttentionEvent
from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.rows import exact_attention
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.machine import environment
from sage_diffusion.plan import PrecisionPlan

#: Pictures that a report carries; their figures cover all.
MAX_PICTURES = 12


@dataclass(frozen=True)
class Generation:
    """What one sampling run made.

    Attributes:
        images: ``[N, C, H, W]`` in 0 .. 1 (a video's frames count as pictures), None if the run
            ends in latents.
        latents: after each step, ``[B, ...]``; empty where the host shows none.
        labels: of the images, numbers if empty.
    """

    images: Tensor | None = None
    latents: tuple[Tensor, ...] = ()
    labels: tuple[str, ...] = ()


#: Samples with a session attached and leaves the model as it was; the same seeds every time.
Run = Callable[[AttentionSession], Generation]


class LayerAccuracy:
    """Observer: compares every quantized call with exact attention on the same inputs.

    Calls that ran as fp16 become rows without an error; calls that never come leave no row.

    Args:
        rows: query rows to compare per call, drawn anew each time; all of them if None.
        seed: of the drawing.
    """

    def __init__(self, rows: int | None = None, *, seed: int = 0):
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.sample = rows
        self.rows: list[Row] = []
        self._generator = torch.Generator().manual_seed(seed)

    def observe(self, event: AttentionEvent) -> None:
        """Measure one call; reads the result back, so it waits for the device."""
        found = metrics.TensorMetrics(1.0, 0.0, 0.0, 0.0)
        if event.spec.quantized:
            found = self._measure(event)
        self.rows.append(
            Row(event.layer, event.step, event.progress, event.branch, event.spec, *found)
        )

    def _measure(self, event: AttentionEvent) -> metrics.TensorMetrics:
        out, rows, q_len = event.out, None, event.q.shape[2]
        if self.sample is not None and self.sample < q_len:
            drawn = torch.randperm(q_len, generator=self._generator)[: self.sample]
            rows = drawn.sort().values.to(event.q.device)
            out = out[:, :, rows]
        exact = exact_attention(
            event.q,
            event.k,
            event.v,
            mask=event.mask,
            is_causal=event.is_causal,
            scale=event.scale,
            rows=rows,
        )
        return metrics.tensor_metrics(out, exact)


def reference_run(run: Run) -> Generation:
    """The FP16 run that several plans can be compared with."""
    return run(AttentionSession(PrecisionPlan(FP16)))


def compare(
    run: Run,
    plan: PrecisionPlan | AttentionSpec | str,
    *,
    reference: Generation | None = None,
    name: str | None = None,
    backend: str = "auto",
    strict: bool = False,
    guard: Guard | None = None,
    rows: int | None = None,
) -> AccuracyReport:
    """Sample with a plan and report what it cost against FP16.

    Args:
        run: samples with a session attached, the same seeds every time.
        plan: a plan, a spec, a spec's name or a path of a plan.
        reference: result of :func:`reference_run`; made here if None.
        name: title of the report; the plan's own name or its spec if None.
        backend, strict, guard: of the session.
        rows: query rows compared per call, see :class:`LayerAccuracy`.

    Raises:
        ValueError: no attention call reached the session, or the two runs differ in shape.
    """
    exact = reference_run(run) if reference is None else reference
    report, _ = compare_with(
        run, plan, exact, name=name, backend=backend, strict=strict, guard=guard, rows=rows
    )
    return report


def compare_with(
    run: Run,
    plan: PrecisionPlan | AttentionSpec | str,
    exact: Generation,
    *,
    name: str | None = None,
    backend: str = "auto",
    strict: bool = False,
    guard: Guard | None = None,
    rows: int | None = None,
) -> tuple[AccuracyReport, Generation]:
    """:func:`compare` with a finished FP16 run; what the plan made comes along."""
    parsed = PrecisionPlan.of(plan)
    observer = LayerAccuracy(rows)
    session = AttentionSession(
        parsed, backend=backend, strict=strict, observers=(observer,), guard=guard
    )
    found = run(session)
    summary = session.summary()
    if not summary.calls:
        raise ValueError("no attention call reached the session: there is nothing to compare")
    ran = sorted({backend for layer in summary.layers for _, backend in layer.ran})
    report = AccuracyReport(
        name or plan_name(parsed),
        tuple(observer.rows),
        end_to_end(found, exact),
        environment(backends=", ".join(ran) or "none"),
        summary.to_dict(),
        parsed,
        pictures=_pictures(found, exact),
    )
    return replace(report, variants=(report.variant(),)), found


def plan_name(plan: PrecisionPlan) -> str:
    """What people call a plan."""
    return plan.name or (str(plan.default) if plan.constant else f"{plan.default} with rules")


def end_to_end(found: Generation, exact: Generation) -> EndToEnd:
    """Compare the results of two runs of the same seeds.

    Raises:
        ValueError: the runs made pictures or latents of different number or shape.
    """
    if (found.images is None) != (exact.images is None) or (
        found.images is not None
        and exact.images is not None
        and found.images.shape != exact.images.shape
    ):
        shapes = [None if x.images is None else tuple(x.images.shape) for x in (found, exact)]
        raise ValueError(f"both runs must make the same pictures, got {shapes[0]} and {shapes[1]}")
    if len(found.latents) != len(exact.latents):
        raise ValueError(
            f"both runs must take the same steps, got {len(found.latents)} and {len(exact.latents)}"
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    if found.images is not None and exact.images is not None:
        pairs = list(zip(found.images, exact.images, strict=True))
    small = bool(pairs) and min(pairs[0][0].shape[1:]) < metrics.SSIM_WINDOW
    latents = zip(found.latents, exact.latents, strict=True)
    return EndToEnd(
        _labels(exact),
        tuple(metrics.psnr(x, y) for x, y in pairs),
        tuple(None if small else metrics.ssim(x, y) for x, y in pairs),
        tuple(metrics.latent_cosine(x, y) for x, y in latents),
    )


def _labels(exact: Generation) -> tuple[str, ...]:
    if exact.images is None:
        return ()
    return exact.labels or tuple(str(i) for i in range(len(exact.images)))


def _pictures(found: Generation, exact: Generation) -> tuple[Picture, ...]:
    if found.images is None or exact.images is None or found.images.shape[1] not in (1, 3):
        return ()
    triples = zip(_labels(exact), found.images, exact.images, strict=True)
    return tuple(make_picture(*triple) for triple in itertools.islice(triples, MAX_PICTURES))
