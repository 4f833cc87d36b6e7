"""The sampler with and without a plan on the same noise, as an ``AccuracyReport``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.accuracy.compare import Generation, LayerAccuracy, end_to_end, plan_name
from sage_diffusion.accuracy.pictures import make_picture
from sage_diffusion.accuracy.records import Limits
from sage_diffusion.accuracy.report import AccuracyReport
from sage_diffusion.attend.calls import AttentionEvent, Observer
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy.images import from_png, note
from sage_diffusion.integrations.comfy.model import ModelAttention, attach, attached, without
from sage_diffusion.machine import environment
from sage_diffusion.plan import PlanError, PrecisionPlan

#: Pictures that a report carries.
MAX_PICTURES = 4


class CallSampling:
    """Observer that passes a share of the quantized calls on, and every other call.

    Args:
        observer: what looks at them.
        rate: share of the quantized calls, 0 .. 1.
        seed: of the choice.
    """

    def __init__(self, observer: Observer, rate: float, *, seed: int = 0):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be between 0 and 1, got {rate}")
        self.observer, self.rate = observer, rate
        self._random = random.Random(seed)

    def observe(self, event: AttentionEvent) -> None:
        """See :class:`sage_diffusion.attend.calls.Observer`."""
        if not event.spec.quantized or self._random.random() < self.rate:
            self.observer.observe(event)


@dataclass(frozen=True)
class Check:
    """What :func:`check` found.

    Attributes:
        report: figures of calls, and of pictures where both runs were made.
        found: the run with the plan.
        exact: the run without, None where only live calls were watched.
        alarms: what the runs' own report warns of.
    """

    report: AccuracyReport
    found: Generation
    exact: Generation | None
    alarms: tuple[str, ...]

    def brief(self) -> str:
        """Two or three lines of figures."""
        report = self.report
        lines = [f"{len(report.quantized)} quantized calls compared with exact attention"]
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
        return "\n".join(lines)

    def verdict(self, limits: Limits) -> tuple[bool, str]:
        """Passed?, and why not: one line per limit that does not hold."""
        lines = list(self.alarms)
        if not self.report.quantized:
            lines.append("no quantized call was measured: nothing is proven")
        violations = self.report.violations(limits)
        lines += [str(violation) for violation in violations[:8]]
        if len(violations) > 8:
            lines.append(f".. and {len(violations) - 8} more")
        return not lines, "\n".join(lines)


def check(
    model: Any,
    sample: Callable[[Any], Generation],
    plan: PrecisionPlan | None = None,
    *,
    both: bool = True,
    rate: float = 1.0,
    rows: int = 64,
) -> Check:
    """Sample with the plan of ``model`` (or ``plan``), and without, and compare.

    Args:
        model: a ``ModelPatcher``; its own Sage Attention settings count unless ``plan`` is given.
        sample: samples with a MODEL, the same noise every time.
        both: make the run without the plan too; else only live calls are watched.
        rate: share of the quantized calls that is compared with exact attention.
        rows: query rows of such a call.

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
    exact = sample(without(model)) if both else None
    measured = LayerAccuracy(rows)
    session = AttentionSession(plan, observers=[CallSampling(measured, rate)], **settings)
    attention = ModelAttention(session, keep_cross=before is not None and before.keep_cross)
    found = sample(attach(without(model), attention))
    summary = session.summary()
    ran = sorted({backend for layer in summary.layers for _, backend in layer.ran})
    report = AccuracyReport(
        plan_name(plan),
        tuple(measured.rows),
        None if exact is None else end_to_end(found, exact),
        environment(backends=", ".join(ran) or "none", model=attention.model_name),
        summary.to_dict(),
        plan,
        pictures=() if exact is None else _pictures(found, exact),
    )
    alarms = attention.last.alarms if attention.last is not None else ()
    return Check(report, found, exact, alarms)


def _pictures(found: Generation, exact: Generation) -> tuple[Any, ...]:
    if found.images is None or exact.images is None:
        return ()
    pairs = zip(found.images[:MAX_PICTURES], exact.images[:MAX_PICTURES], strict=True)
    return tuple(make_picture(str(i), x, y) for i, (x, y) in enumerate(pairs))


@dataclass
class KSampling:
    """What ComfyUI's KSampler does, as a function of the MODEL alone.

    The latents of a :class:`Generation` are the denoised predictions after each step; ``samples``
    is the result of the last run.
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
    samples: Tensor | None = None

    def __call__(self, model: Any) -> Generation:
        """Sample with a MODEL."""
        import comfy.sample

        image = comfy.sample.fix_empty_latent_channels(model, self.latent["samples"])
        noise = comfy.sample.prepare_noise(image, self.seed, self.latent.get("batch_index"))
        seen: list[Tensor] = []

        def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            seen.append(denoised.detach().to("cpu", copy=True))

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
        images = None if self.vae is None else as_pictures(self.vae.decode(self.samples))
        return Generation(images, tuple(seen))

    def result(self) -> dict[str, Any]:
        """ComfyUI's LATENT of the last run."""
        return {**self.latent, "samples": self.samples}


def as_pictures(images: Tensor) -> Tensor:
    """ComfyUI's ``[N, H, W, C]`` (a video's ``[B, T, H, W, C]``) as ``[N, C, H, W]`` in 0 .. 1."""
    flat = images.reshape(-1, *images.shape[-3:])[..., :3]
    return flat.permute(0, 3, 1, 2).float().cpu().clamp(0, 1)


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
    except ImportError as error:  # matplotlib is an extra
        return note(str(error))
