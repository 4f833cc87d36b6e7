"""What a plan costs, measured: with and without it on the same noise."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io, ui

from sage_diffusion.accuracy.records import Limits
from sage_diffusion.accuracy.report import AccuracyReport
from sage_diffusion.files import write_text
from sage_diffusion.integrations.comfy.accuracy import (
    KSampling,
    as_images,
    check,
    heat_map,
    side_by_side,
)
from sage_diffusion.integrations.comfy.headline import State
from sage_diffusion.nodes.host import CATEGORY, Plan, report_path, show
from sage_diffusion.nodes.progress import SamplingProgress
from sage_diffusion.plan import PrecisionPlan

_BOTH = "with and without the plan"
_LIVE = "live calls only"


def sampling_inputs() -> list[io.Input]:
    """KSampler's own inputs."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Of the noise, the same in both runs.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps."),
        io.Float.Input(
            "cfg", default=5.0, min=0.0, max=100.0, step=0.1, tooltip="Strength of guidance."
        ),
        io.Combo.Input(
            "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."
        ),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."
        ),
        io.Float.Input(
            "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="As in KSampler."
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="latent", tooltip="Of the run with the plan."),
        io.Image.Output(display_name="A/B", tooltip="Without the plan left, with it right."),
        io.Image.Output(display_name="heat map", tooltip="Error by layer and step."),
        io.String.Output(display_name="report", tooltip="As text."),
        io.String.Output(display_name="json", tooltip="Path of the JSON file."),
        io.Boolean.Output(
            display_name="passed",
            tooltip="True if the limit holds and enough was compared to say so.",
        ),
        io.Image.Output(display_name="without", tooltip="For Compare Images: without the plan."),
        io.Image.Output(display_name="with", tooltip="For Compare Images: with the plan."),
    ]


class SageAccuracyCheck(io.ComfyNode):
    """Pictures and figures of a plan against the model's own attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionAccuracyCheck",
            display_name="Attention Accuracy Check",
            category=CATEGORY,
            description="Samples with the plan and without on the same noise, compares quantized "
            "calls with exact attention, and says whether a limit holds. Use it in place of "
            "KSampler.",
            search_aliases=[
                "attention accuracy",
                "compare quantization",
                "psnr",
                "quality check",
                "A/B test",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that came out of Sage Attention."),
                io.Conditioning.Input("positive", tooltip="What the picture shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                *sampling_inputs(),
                io.Combo.Input(
                    "mode",
                    options=[_BOTH, _LIVE],
                    tooltip="Two runs give pictures and PSNR. Live calls only costs one run.",
                ),
                io.Float.Input(
                    "rate",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the quantized calls compared with exact attention.",
                ),
                io.Combo.Input(
                    "metric",
                    options=["cosine", "rel_l1", "latent_cosine", "psnr", "ssim"],
                    tooltip="What the limit is about: cosine, rel_l1 of attention calls; "
                    "latent_cosine, psnr, ssim of the results of two runs.",
                ),
                io.Float.Input(
                    "limit",
                    default=0.98,
                    min=0.0,
                    max=200.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="The worst value that passes.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="sage_reports/accuracy",
                    tooltip="Where the JSON report goes in the output folder.",
                ),
                io.Int.Input(
                    "rows",
                    default=64,
                    min=1,
                    max=1 << 16,
                    advanced=True,
                    tooltip="Query rows of a call that are compared: enough for its mean error.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Decodes the pictures; without it none are made."
                ),
                Plan.Input("plan", optional=True, tooltip="Checked instead of the MODEL's own."),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, mode: str, metric: str, limit: float) -> bool | str:
        try:
            Limits(**{metric: limit})
        except (ValueError, TypeError) as error:
            return str(error)
        if mode == _LIVE and metric not in ("cosine", "rel_l1"):
            return f"{metric} compares two runs: choose '{_BOTH}', or cosine or rel_l1"
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        mode: str,
        rate: float,
        metric: str,
        limit: float,
        filename_prefix: str,
        rows: int,
        vae: Any = None,
        plan: PrecisionPlan | None = None,
    ) -> io.NodeOutput:
        sample = KSampling(
            positive,
            negative,
            latent_image,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            vae=vae,
        )
        report_path(filename_prefix, "json")  # a prefix that can't be is said before sampling
        node, both = cls.hidden.unique_id, mode == _BOTH
        names = ["without the plan"] * both + ["with the plan"]
        sample.on_step = SamplingProgress(node, model, names)

        def keep(report: AccuracyReport) -> None:
            path = report_path(filename_prefix, "json")
            write_text(path, report.to_json())
            compared = len(report.quantized)
            show(node, f"cancelled: {compared} calls were compared\nkept in {path}", "cancelled")

        done = check(model, sample, plan, both=both, rate=rate, rows=rows, keep=keep)
        verdict = done.verdict(Limits(**{metric: limit}))
        path = report_path(filename_prefix, "json")
        write_text(path, done.report.to_json())
        head, why = f"{verdict.word}: {metric} {limit:g}", verdict.why
        lines = (head, done.brief() if verdict.passed else why)
        more = (str(path),) if verdict.passed else (done.brief(), str(path))
        state: State = "done" if verdict.passed else "warning"
        show(node, "\n".join(x for x in (*lines, *more) if x), state)
        images = side_by_side(done)
        heat = heat_map(done.report)
        pair = [as_images(run) for run in (done.exact, done.found)]
        text = "\n\n".join(x for x in (head, why, done.report.to_markdown()) if x)
        return io.NodeOutput(
            sample.result(),
            heat if images is None else images,
            heat,
            text,
            str(path),
            verdict.passed,
            *pair,
            ui=_shown(cls, heat if images is None else images, pair),
        )


def _shown(cls: Any, picture: Any, pair: list[Any]) -> dict[str, Any]:
    """What the page gets: both pictures for the slider of ``web/compare.js``, else one."""
    if any(one is None for one in pair):
        return ui.PreviewImage(picture, cls=cls).as_dict()
    names = ("a_images", "b_images")  # as the core's Compare Images calls them
    return {
        name: ui.PreviewImage(one[:1], cls=cls).as_dict()["images"]
        for name, one in zip(names, pair, strict=True)
    }
