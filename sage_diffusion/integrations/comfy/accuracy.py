"""The sampler with and without a plan on the same noise, as an ``AccuracyReport``."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sage_diffusion.accuracy.compare import Generation, LayerAccuracy, end_to_end, plan_name
from sage_diffusion.accuracy.pictures import make_picture
from sage_diffusion.accuracy.records import Limits
from sage_diffusion.accuracy.report import AccuracyReport
from sage_diffusion.attend.calls import AttentionEvent, Observer
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.images import cell_map, from_png, note
from sage_diffusion.integrations.comfy.model import ModelAttention, attach, attached, without
from sage_diffusion.integrations.comfy.timing import Timing
from sage_diffusion.machine import environment
from sage_diffusion.plan import PlanError, PrecisionPlan

#: Pictures that a report carries.
MAX_PICTURES = 4

#: Compared calls without which nothing is proven, where the run quantizes as many.
LEAST_CALLS = 16


class CallSampling:
    """Observer that passes a share of the quantized calls on, and every other call.

    Of every layer the first quantized call is passed on in any case, unless the share is nothing.

    Args:
        observer: what looks at them.
        rate: share of the quantized calls, 0 .. 1.
        seed: of the choice.
        looked: is told that a quantized call was passed on, which takes its time.

    Attributes:
        quantized: layer -> quantized calls, whether passed on or not.
    """

    def __init__(
        self,
        observer: Observer,
        rate: float,
        *,
        seed: int = 0,
        looked: Callable[[], None] = lambda: None,
    ):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be between 0 and 1, got {rate}")
        self.observer, self.rate, self.looked = observer, rate, looked
        self.quantized: Counter[str] = Counter()
        self._random = random.Random(seed)

    def observe(self, event: AttentionEvent) -> None:
        """See :class:`sage_diffusion.attend.calls.Observer`."""
        if not event.spec.quantized:
            self.observer.observe(event)
            return
        self.quantized[event.layer] += 1
        first = self.quantized[event.layer] == 1 and self.rate > 0
        if self._random.random() < self.rate or first:
            self.observer.observe(event)
            self.looked()


class Verdict(NamedTuple):
    """Does a limit hold?

    Attributes:
        word: PASSED, FAILED, or NOT PROVEN where too little was compared to say.
        why: lines that say what does not hold; empty where it passed.
    """

    word: str
    why: str

    @property
    def passed(self) -> bool:
        """It was compared enough, and the limit holds."""
        return self.word == "PASSED"


@dataclass(frozen=True)
class Check:
    """What :func:`check` found.

    Attributes:
        report: figures of calls, and of pictures where both runs were made.
        found: the run with the plan.
        exact: the run without, None where only live calls were watched.
        alarms: what the runs' own report warns of.
        quantized: layer -> quantized calls of the run with the plan.
        timing: seconds of both runs, None where none were taken.
    """

    report: AccuracyReport
    found: Generation
    exact: Generation | None
    alarms: tuple[str, ...]
    quantized: Mapping[str, int]
    timing: Timing | None

    def brief(self) -> str:
        """Two or three lines of figures."""
        report = self.report
        compared, whole = len(report.quantized), sum(self.quantized.values())
        # A host's call that holds both halves of guidance is two here: each has errors of its own.
        halves = len({row.branch for row in report.quantized}) > 1
        lines = [
            f"{compared} of {whole} quantized calls compared with exact attention"
            + (", guidance's halves apart" if halves else "")
        ]
        cosine, rel_l1 = report.mean("cosine"), report.mean("rel_l1")
        if cosine is not None and rel_l1 is not None:
            worst = report.worst("rel_l1")
            lines.append(
                f"mean cosine {cosine:.5f}, relative L1 {rel_l1:.4f}; worst {worst.rel_l1:.4f} "
                f"in {worst.layer} at step {worst.step} ({worst.spec})"
            )
        end = report.end_to_end
        if end is not None:
            figures = [
                f"{name} {value:.{digits}f}"
                for name, value, digits in (
                    ("PSNR", end.mean_psnr, 2),
                    ("SSIM", end.mean_ssim, 4),
                    ("cosine of the final latents", end.final_cosine, 6),
                )
                if value is not None
            ]
            lines.append("two runs: " + (", ".join(figures) or "nothing to compare"))
        if self.timing is not None:
            lines.append(self.timing.brief())
        return "\n".join(lines)

    def verdict(self, limits: Limits) -> Verdict:
        """Does every limit hold, and was enough compared to say so?"""
        violations = self.report.violations(limits)
        lines = [*self.alarms, *(str(violation) for violation in violations[:8])]
        if len(violations) > 8:
            lines.append(f".. and {len(violations) - 8} more")
        if lines:
            return Verdict("FAILED", "\n".join(lines))
        lacking = self._lacking(limits)
        return Verdict("NOT PROVEN" if lacking else "PASSED", "\n".join(lacking))

    def _lacking(self, limits: Limits) -> list[str]:
        """What would have to be compared before anything is proven."""
        compared, whole = self.report.quantized, sum(self.quantized.values())
        if not compared:
            return ["no quantized call was compared with exact attention"]
        lines = []
        least = min(LEAST_CALLS, whole)
        if len(compared) < least:
            lines.append(
                f"{len(compared)} of {whole} quantized calls were compared, at least {least} must "
                "be: raise rate"
            )
        missed = self.quantized.keys() - {row.layer for row in compared}
        if missed:
            lines.append(f"no call of {len(missed)} layers was compared: raise rate")
        end = self.report.end_to_end
        for name in ("psnr", "ssim", "latent_cosine"):
            values = () if end is None else getattr(end, name)
            if getattr(limits, name) is not None and all(value is None for value in values):
                lines.append(f"no {name} was measured: it needs two runs, of pictures a VAE, too")
        return lines


def check(
    model: Any,
    sample: Callable[[Any], Generation],
    plan: PrecisionPlan | None = None,
    *,
    both: bool = True,
    rate: float = 1.0,
    rows: int = 64,
    keep: Callable[[AccuracyReport], None] = lambda report: None,
) -> Check:
    """Sample with the plan of ``model`` (or ``plan``), and without, and compare.

    Args:
        model: a ``ModelPatcher``; its own Sage Attention settings count unless ``plan`` is given.
        sample: samples with a MODEL, the same noise every time.
        both: make the run without the plan too; else only live calls are watched.
        rate: share of the quantized calls that is compared with exact attention.
        rows: query rows of such a call.
        keep: gets a report of what was compared where the run with the plan is broken off.

    Raises:
        PlanError: neither ``model`` nor ``plan`` says what to check.
    """
    before = attached(model)
    settings: dict[str, Any] = {}
    if before is not None:
        settings = {"backend": before.backend, "strict": before.strict}
        plan = plan or before.plan
    if plan is None:
        raise PlanError(
            "connect a MODEL that went through Sage Attention, or connect a plan: there is nothing "
            "to compare"
        )
    if before is not None:
        before.sampled_by("Attention Accuracy Check")
    own = ModelAttention("fp16")  # bit-equal to the model as it came, and timed
    exact = sample(attach(without(model), own)) if both else None
    measured = LayerAccuracy(rows)
    sampling = CallSampling(measured, rate, looked=lambda: attention.spoil_times())
    session = AttentionSession(plan, observers=[sampling], **settings)
    attention = ModelAttention(session, keep_cross=before is not None and before.keep_cross)

    def report_of(found: Generation | None) -> AccuracyReport:
        summary = session.summary()
        ran = sorted({backend for layer in summary.layers for _, backend in layer.ran})
        return AccuracyReport(
            plan_name(plan),
            tuple(measured.rows),
            end_to_end(found, exact) if found and exact else None,
            environment(backends=", ".join(ran) or "none", model=attention.model_name),
            summary.to_dict(),
            plan,
            pictures=_pictures(found, exact) if found and exact else (),
        )

    try:
        found = sample(attach(without(model), attention))
    except BaseException:
        if measured.rows:
            keep(report_of(None))
        raise
    report = report_of(found)
    alarms = attention.last.alarms if attention.last is not None else ()
    return Check(report, found, exact, alarms, sampling.quantized, _timing(attention, own))


def _timing(attention: ModelAttention, own: ModelAttention) -> Timing | None:
    """Of the run with the plan, beside that without; comparing calls is no part of it."""
    after = None if attention.last is None else attention.last.timing
    before = None if own.last is None else own.last.timing
    if after is None or before is None or not after.fast:
        return after
    step = None
    if before.step is not None:
        step = before.step - (before.attention - after.attention) / before.steps
    return replace(after, attention_before=before.attention, step_before=before.step, step=step)


def _pictures(found: Generation, exact: Generation) -> tuple[Any, ...]:
    if found.images is None or exact.images is None:
        return ()
    pairs = zip(found.images[:MAX_PICTURES], exact.images[:MAX_PICTURES], strict=True)
    return tuple(make_picture(str(i), x, y) for i, (x, y) in enumerate(pairs))


@dataclass
class KSampling:
    """What ComfyUI's KSampler does, as a function of the MODEL alone.

    The latents of a :class:`Generation` are the denoised predictions after each step, of a video
    with sound both in one row; ``samples`` is the result of the last run.  ``on_step`` is called
    after each with its number, its prediction and the number of all.
    """

    positive: Any
    negative: Any
    latent: dict[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    vae: Any = None
    samples: Any = None
    on_step: Callable[[int, Tensor, int], None] | None = None

    def __call__(self, model: Any) -> Generation:
        """Sample with a MODEL."""
        import comfy.sample

        image = comfy.sample.fix_empty_latent_channels(model, self.latent["samples"])
        noise = comfy.sample.prepare_noise(image, self.seed, self.latent.get("batch_index"))
        seen: list[Tensor] = []

        def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            seen.append(one_tensor(denoised).detach().to("cpu", copy=True))
            self.tell(step, denoised, total)

        self.samples = comfy.sample.sample(
            model,
            noise,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            self.positive,
            self.negative,
            image,
            denoise=self.denoise,
            noise_mask=self.latent.get("noise_mask"),
            callback=callback,
            disable_pbar=True,
            seed=self.seed,
        )
        images = (
            None if self.vae is None else as_pictures(self.vae.decode(_streams(self.samples)[0]))
        )
        return Generation(images, tuple(seen))

    def tell(self, step: int, denoised: Any, total: int) -> None:
        """A step is done, with this prediction: of a video with sound ``on_step`` gets the video's.

        Args:
            step: its number.
            denoised: as ComfyUI's callback has it, a tensor or a nested one.
            total: number of all steps.
        """
        if self.on_step is not None:
            self.on_step(step, _streams(denoised)[0], total)

    def result(self) -> dict[str, Any]:
        """ComfyUI's LATENT of the last run."""
        return {**self.latent, "samples": self.samples}


def _streams(latent: Any) -> list[Tensor]:
    """Tensors of a latent: one, or of a video with sound (LTX-2, MiniMax H3) two, video first."""
    return list(latent.unbind()) if latent.is_nested else [latent]


def one_tensor(latent: Any) -> Tensor:
    """A latent as it is, or a video and its sound in one row, ``[B, N]``."""
    streams = _streams(latent)
    return streams[0] if len(streams) == 1 else torch.cat([x.flatten(1) for x in streams], 1)


def as_pictures(images: Tensor) -> Tensor:
    """ComfyUI's ``[N, H, W, C]`` (a video's ``[B, T, H, W, C]``) as ``[N, C, H, W]`` in 0 .. 1."""
    flat = images.reshape(-1, *images.shape[-3:])[..., :3]
    return flat.permute(0, 3, 1, 2).float().cpu().clamp(0, 1)


def as_images(run: Generation | None) -> Tensor | None:
    """ComfyUI's IMAGE of a run, None where it made no picture."""
    if run is None or run.images is None:
        return None
    return run.images.permute(0, 2, 3, 1).contiguous()


def side_by_side(done: Check) -> Tensor | None:
    """ComfyUI's IMAGE, without the plan left and with it right; None where no picture was made."""
    pictures = [run.images for run in (done.exact, done.found) if run is not None]
    there = [x for x in pictures if x is not None]
    return torch.cat(there, 3).permute(0, 2, 3, 1).contiguous() if there else None


def heat_map(report: AccuracyReport) -> Tensor:
    """ComfyUI's IMAGE of the error by layer and step; a note where there is none to draw."""
    from sage_diffusion.accuracy.heatmap import heatmap_png

    if not report.quantized:
        return note("No quantized call was compared, so there is nothing to draw.")
    try:
        return from_png(heatmap_png(report))
    except ImportError:  # matplotlib is an extra, which ComfyUI does not bring
        cells: dict[tuple[str, int], list[float]] = {}
        for row in report.quantized:
            cells.setdefault((row.layer, row.step), []).append(row.rel_l1)
        means = {place: sum(found) / len(found) for place, found in cells.items()}
        return cell_map(means, "relative L1 error of quantized calls, mean by layer and step")
