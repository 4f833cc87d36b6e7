"""Calibration: watch live sampling, measure some cells of every run, never lose a finished run."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sage_diffusion.adapt import DEFAULT_SHARE
from sage_diffusion.adapt.complete import LEAST_CELLS, complete
from sage_diffusion.adapt.gradient import measure_gradient
from sage_diffusion.adapt.sampling import NoGradient, Progress, Replayer, Sampler, Tracer, planned
from sage_diffusion.adapt.sensitivity import cell_damage, measure_sensitivity
from sage_diffusion.adapt.table import BOTH, ScoreTable, SeenCalls
from sage_diffusion.attend.calls import AttentionEvent
from sage_diffusion.attend.rows import RowCall, measure, outliers, sample_rows
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan.fingerprint import fingerprint

log = logging.getLogger("sage_diffusion")

#: What a plan may choose from unless the caller says otherwise.
SPECS = ("int8/fp16", "int8/int8", "int8/fp8-fast", "int4/int8", "int4/fp8-fast")

#: Fewer prompts say nothing about the next one.
MIN_PROMPTS = 2


class CalibrationError(ValueError):
    """Calibration can't begin or found nothing to measure."""


class Calibrator:
    """Observer that measures the chosen cells of a run.

    Cells are chosen as in a Latin square: every stretch of ``1 / share`` steps has one measured
    step of each layer, a different one for neighbouring layers and for the other half of guidance.
    What is known of a step that no layer measured is what is known of its neighbours.  Of tables
    so small that this would be too little to complete them from, more is measured.

    Of a cell that a run calls several times - part by part (Qwen-Image 2.1's text, references and
    picture), or in both evaluations of a Heun step - every call counts, by the elements of its
    output.

    Args:
        specs: candidates, fp16 excluded.
        session: whose layers and steps are measured.
        share: of the cells to measure, 0 .. 1.
        rows: query rows per measured call.
        seed: of the choice of cells and rows.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        session: AttentionSession,
        *,
        share: float,
        rows: int,
        seed: int,
    ):
        self.specs = tuple(specs)
        self.session, self.share, self.rows, self.seed = session, share, rows, seed
        self.only: set[tuple[str, int, str]] | None = None
        self._order: dict[str, int] = {}
        self.begin()

    def begin(self) -> None:
        """Forget what was seen: a new run begins."""
        self.seen = SeenCalls()
        self._found: dict[tuple[str, int, str], list[tuple[int, Tensor]]] = {}
        self._sigmas: dict[int, float] = {}
        self.steps = 0

    def chooses(self, layer: str, step: int, branch: str | None) -> bool:
        """Is this cell measured?"""
        if self.only is not None:
            return (layer, step, branch or BOTH) in self.only
        steps = self.session.where.steps
        cells = max(len(self.session.layers), 1) * steps
        period = max(1, min(round(1 / self.share), steps, cells // LEAST_CELLS))
        stretch, inside = divmod(step, period)
        block, position = divmod(self.place(layer), period)
        order = np.random.default_rng((self.seed, stretch, block)).permutation(period)
        shift = 1 if branch == "uncond" else 0  # the two branches complete each other
        return inside == int(order[(position + shift) % period])

    def place(self, layer: str) -> int:
        """Position of the layer in the order of first calls."""
        return self._order.setdefault(layer, len(self._order))

    def observe(self, event: AttentionEvent) -> None:
        """See :class:`sage_diffusion.attend.calls.Observer`."""
        if event.step < 0:
            return
        self.seen.observe(event)
        self.steps = self.session.where.steps
        if self.session.where.sigma is not None:
            self._sigmas[event.step] = self.session.where.sigma
        place = self.place(event.layer)
        if not self.chooses(event.layer, event.step, event.branch):
            return
        seed = (self.seed * 7919 + place * 1009 + event.step) % (2**31)
        index = sample_rows(event.q.shape[2], self.rows, seed, event.q.device)
        call = RowCall.seen(event, index)
        exact = None
        if not event.spec.quantized and event.out.dtype == torch.float32:
            exact = event.out[:, :, index]  # the host computed these rows exactly already
        values = measure(call, self.specs, exact).flatten()
        peaks = torch.stack([outliers(x) for x in (event.q, event.k, event.v)])
        found = event.out.numel(), torch.cat([values, peaks])
        cell = event.layer, event.step, event.branch or BOTH
        self._found.setdefault(cell, []).append(found)

    def store(self, table: ScoreTable) -> None:
        """Move the finished run's measurements into the table."""
        self.seen.store(table)
        if self._found:
            every = [values for found in self._found.values() for _, values in found]
            numbers = iter(torch.stack(every).double().cpu().numpy())
            for cell, found in self._found.items():
                rows = np.stack([next(numbers) for _ in found])
                mean = np.average(rows[:, :-3], 0, weights=[elements for elements, _ in found])
                peaks = np.fmax.reduce(rows[:, -3:])
                table.add(*cell, mean.reshape(len(self.specs), -1), peaks)
        # A step cache may skip whole steps: their sigmas are known only if the host told them all.
        sigmas = self.session.where.schedule or [self._sigmas[i] for i in sorted(self._sigmas)]
        if len(sigmas) == self.steps and all(b < a for a, b in itertools.pairwise(sigmas)):
            table.schedule = list(sigmas)  # progress can't be looked up in any other
            table.schedule_unit = self.session.noise.unit
        self.begin()


def calibrate(
    sampler: Sampler,
    prompts: Sequence[Any],
    seeds: Iterable[int] = (0,),
    *,
    specs: Sequence[str | AttentionSpec] = SPECS,
    share: float = DEFAULT_SHARE,
    rows: int = 64,
    seed: int = 0,
    bar_db: float = 3.0,
    sensitivity: int = 0,
    method: Literal["auto", "gradient", "groups"] = "auto",
    path: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    sign_seed: int | None = 0,
    min_prompts: int = MIN_PROMPTS,
) -> ScoreTable:
    """Measure what each spec does to each layer and step of a model, on live sampling.

    Every (prompt, seed) is sampled once with the model's own attention while an observer measures
    some cells; the table is saved after each run (of the end-to-end stage too), so an interrupted
    calibration goes on where it stopped when called again with the same arguments.

    Args:
        sampler: see :class:`Sampler`.
        prompts: what ``sampler.sample`` takes; they are known by their ``str()``.
        seeds: every prompt is sampled once with each.
        specs: candidates.
        share: of the cells that are measured; the others are completed from them.
        rows: query rows per measured call.
        seed: of the choice of cells and rows.
        bar_db: where completing is less certain than this (expected RMS, dB of squared error), the
            cells whose uncertainty may cost most are measured as well.
        sensitivity: on how many pictures (by gradients) or runs (by groups) to measure what cells
            do to the final latents; 0 skips that stage. Where prompts and seeds are fewer, further
            seeds are taken. A few can mislead: one picture that flips to another mode outweighs all
            the others, so take eight or more.
        method: of that stage. "gradient" rates every cell by backward passes through the sampling
            of single pictures (:mod:`.gradient`), "groups" runs groups of cells in the lowest spec
            (:mod:`.sensitivity`), "auto" takes gradients where the sampler has them and its memory
            allows, and else says in the table why it took groups (``sensitivity.instead``).
        path: the table's file; an existing one is continued.
        progress: called after each run.
        sign_seed: sequence of the rotations' signs, of the table and of its plans.  None has one
            rotation for all steps, whose errors add up from step to step.
        min_prompts: different ones that there must be; a plan of a single one is for that one.

    Returns:
        The table, as saved.

    Raises:
        CalibrationError: too few prompts, no candidates, or a model whose attention is not reached.
        NoGradient: ``method`` "gradient", and sampling can't be differentiated.
        TableError: ``path`` holds another model's or calibration's table.
    """
    candidates = _candidates(specs)
    numbers = [int(s) for s in seeds]
    pairs = [(prompt, s) for prompt in prompts for s in numbers]
    different = len({str(prompt) for prompt in prompts})
    if different < min_prompts:
        raise CalibrationError(
            f"calibration needs at least {min_prompts} different prompts, got {different}"
        )
    if not pairs:
        raise CalibrationError("calibration needs at least one seed")
    if not 0 < share <= 1:
        raise CalibrationError(f"share must be above 0 and at most 1, got {share}")
    if method not in ("auto", "gradient", "groups"):
        raise CalibrationError(f"method must be auto, gradient or groups, got {method!r}")
    if method == "gradient" and not isinstance(sampler, (Tracer, Replayer)):
        raise CalibrationError(
            "method 'gradient' needs a sampler with trace() or replay(), got "
            f"{type(sampler).__name__}"
        )
    if rows < 1:
        raise CalibrationError(f"rows must be at least 1, got {rows}")
    job = _Job(sampler, candidates, share, rows, seed, path, progress, sign_seed)
    job.passes("measure", pairs, job.table.runs)
    if not job.table.extra:
        job.table.extra = _doubtful(job.table, bar_db)
    if job.table.extra:
        job.passes("remeasure", pairs, job.table.extra_runs)
    if sensitivity and not _answers(job.table.sensitivity, sensitivity, method):
        found = _end_to_end(job, prompts, numbers, sensitivity, method)
        job.table.sensitivity = found | {"asked": sensitivity}
        job.table.unfinished = None
        job.save()
    return job.table


def _answers(found: dict[str, Any] | None, count: int, method: str) -> bool:
    """Is a finished end-to-end stage what is asked for?  Stages of before don't say on how many
    pictures they were asked to be run."""
    if found is None or found.get("asked", count) != count:
        return False
    return method == "auto" or found.get("method", "groups") == method


def _end_to_end(
    job: _Job, prompts: Sequence[Any], seeds: Sequence[int], count: int, method: str
) -> dict[str, Any]:
    sampler, table = job.sampler, job.table

    def keep(state: dict[str, Any]) -> None:
        table.unfinished = state
        job.save()

    options: dict[str, Any] = {"progress": job.tell, "unfinished": table.unfinished, "keep": keep}
    instead = None
    if method != "groups" and isinstance(sampler, (Tracer, Replayer)):
        pictures = rated_pictures(sampler, prompts, seeds, count)
        try:
            return measure_gradient(sampler, table, pictures, **options)
        except NoGradient as error:
            if method == "gradient":
                raise
            instead = str(error)
            log.warning("no gradients, groups of cells are run instead: %s", instead)
    runs = list(itertools.islice(_endless(prompts, seeds), count))
    found = measure_sensitivity(sampler, table, runs, **options)
    return found if instead is None else found | {"instead": instead}


def rated_pictures(
    sampler: Tracer | Replayer, prompts: Sequence[Any], seeds: Sequence[int], count: int
) -> list[tuple[Any, int]]:
    """(prompt, seed) of so many pictures for the stage by gradients, spread over the runs, with
    further seeds where these have fewer pictures."""
    pictures = [x for prompt in prompts for s in seeds for x in sampler.pictures(prompt, s)]
    more = itertools.islice(_endless(prompts, seeds), len(prompts) * len(seeds), None)
    while len(pictures) < count:
        pictures += sampler.pictures(*next(more))
    spread = np.linspace(0, len(pictures), count, endpoint=False)
    return [pictures[int(i)] for i in spread]


def _endless(prompts: Sequence[Any], seeds: Sequence[int]) -> Iterator[tuple[Any, int]]:
    """Every prompt with the first seed, then with the next, and with others when they run out."""
    for seed in itertools.chain(seeds, itertools.count(max(seeds) + 1)):
        for prompt in prompts:
            yield prompt, seed


class _Job:
    """One calibration under way: the table, its file and the runs that feed it."""

    def __init__(
        self,
        sampler: Sampler,
        specs: tuple[AttentionSpec, ...],
        share: float,
        rows: int,
        seed: int,
        path: str | Path | None,
        progress: Callable[[Progress], None] | None,
        sign_seed: int | None,
    ):
        self.sampler, self.path, self.progress = sampler, path, progress
        self.began = time.monotonic()
        self.watcher = Calibrator(specs, sampler.session, share=share, rows=rows, seed=seed)
        settings: dict[str, Any] = {"share": share, "rows": rows, "seed": seed}
        settings["sign_seed"] = sign_seed
        settings["sampling"] = dict(getattr(sampler, "settings", {}))
        self.table = ScoreTable(tuple(map(str, specs)), 0, self._fingerprint(), settings)
        if path is not None and Path(path).exists():
            stored = ScoreTable.load(path)
            stored.check_same(self.table)
            self.table = stored
            for name in stored.layers:
                self.watcher.place(name)  # the order of the first calls decides the choice

    def tell(self, stage: str, done: int, total: int) -> None:
        """Report to whoever calibrates."""
        if self.progress is not None:
            self.progress(Progress(stage, done, total, time.monotonic() - self.began))

    def save(self) -> None:
        """Write the table, if it has a file."""
        if self.path is not None:
            self.table.save(self.path)

    def passes(
        self, stage: str, pairs: Sequence[tuple[Any, int]], finished: list[tuple[str, int]]
    ) -> None:
        """Sample every pair that is not finished, saving after each."""
        if stage == "remeasure":
            self.watcher.only = set(self.table.extra)
        for number, (prompt, seed) in enumerate(pairs):
            key = (str(prompt), seed)
            if key not in finished:
                self._run(prompt, seed)
                finished.append(key)
                self.save()
            self.tell(stage, number + 1, len(pairs))

    def _run(self, prompt: Any, seed: int) -> None:
        session, watcher = self.sampler.session, self.watcher
        watcher.begin()
        session.observers.append(watcher)
        try:
            with planned(session, self.table.unquantized):
                self.sampler.sample(prompt, seed)
        finally:
            session.observers.remove(watcher)
        if not watcher.steps:
            raise CalibrationError(
                "no attention call was seen while sampling: no step was taken, the model has no "
                "attention that is reached, or its host never called session.start and begin_step"
            )
        if not self.table.steps:
            self.table = replace(self.table, steps=watcher.steps)
        if watcher.steps != self.table.steps:
            raise CalibrationError(
                f"this run had {watcher.steps} steps, the table is of {self.table.steps}: "
                "calibrate all prompts with the same number of steps"
            )
        if not self.table.runs:  # some hosts name their layers at the first call only
            self.table.fingerprint = self._fingerprint()
        self.table.check_same(replace(self.table, fingerprint=self._fingerprint()))
        watcher.store(self.table)

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(
            list(self.sampler.session.layers),
            model=self.sampler.model,
            head_dims=self.watcher.seen.head_dims,
        )


def _candidates(specs: Sequence[str | AttentionSpec]) -> tuple[AttentionSpec, ...]:
    parsed = tuple(dict.fromkeys(AttentionSpec.parse(spec) for spec in specs))
    chosen = tuple(spec for spec in parsed if spec.quantized)
    if not chosen:
        raise CalibrationError(
            "there is nothing to calibrate: name at least one quantized spec, such as int8/fp8"
        )
    return chosen


def _doubtful(table: ScoreTable, bar_db: float) -> list[tuple[str, int, str]]:
    """Cells to measure as well where completing is too uncertain: the half in which being wrong
    costs most, their bar times their effect; all where too few were measured to complete any."""
    open_cells = np.argwhere(table.exists & ~table.measured)
    if len(open_cells) and table.measured.sum() >= LEAST_CELLS:
        completed = complete(table)
        if completed.rms_db <= bar_db:
            return []
        stake = (cell_damage(table, completed.error) * completed.bar_db).max(-1)
        order = np.argsort(-stake[tuple(open_cells.T)], kind="stable")
        open_cells = open_cells[np.sort(order[: -(-len(order) // 2)])]
    return [(table.layers[i], int(s), table.branches[b]) for i, s, b in open_cells]
