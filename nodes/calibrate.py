"""A plan measured on the user's own model and prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from comfy_api.latest import io

from sage_diffusion.adapt import DEFAULT_SHARE
from sage_diffusion.adapt.costs import Costs
from sage_diffusion.adapt.presets import this_card
from sage_diffusion.adapt.table import ScoreTable, TableError
from sage_diffusion.attend.runs import quantizes
from sage_diffusion.integrations.comfy.accuracy import KSampling
from sage_diffusion.integrations.comfy.sampler import (
    CARDS,
    ComfySampler,
    Prompt,
    candidates,
    costs_of,
    fast_time,
    free_path,
)
from sage_diffusion.nodes.accuracy import sampling_inputs
from sage_diffusion.nodes.host import CATEGORY, Plan, show, without_ending
from sage_diffusion.nodes.progress import SamplingProgress
from sage_diffusion.plan import PrecisionPlan
from sage_diffusion.plan.show import describe

_AS_FAST, _FLOOR, _BUDGET = "as fast as fast, better", "least quality", "most time"
_THIS = "this card"
_CONTINUE, _REPLACE, _NEW = "continue it", "replace it", "take a new name"

#: How the end-to-end stage is done -> what ``calibrate`` calls it.
_METHODS = {"automatic": "auto", "gradients": "gradient", "groups": "groups"}


def goal_input() -> io.DynamicCombo.Input:
    """What a plan must keep."""
    return io.DynamicCombo.Input(
        "goal",
        options=[
            io.DynamicCombo.Option(_AS_FAST, []),
            io.DynamicCombo.Option(
                _BUDGET,
                [
                    io.Float.Input(
                        "time",
                        default=0.5,
                        min=0.05,
                        max=1.0,
                        step=0.01,
                        tooltip="Predicted time of attention relative to FP16.",
                    )
                ],
            ),
            io.DynamicCombo.Option(
                _FLOOR,
                [
                    io.Float.Input(
                        "decibel",
                        default=30.0,
                        min=0.0,
                        max=100.0,
                        step=0.5,
                        tooltip="Predicted PSNR of the latents, at least.",
                    )
                ],
            ),
        ],
        tooltip="as fast as fast, better: the predicted time of the preset fast, in better "
        "quality. Or what the plan must keep; the rest becomes as good as it can.",
    )


def card_input() -> io.Combo.Input:
    """Whose time is predicted."""
    return io.Combo.Input(
        "card",
        options=[_THIS, *CARDS],
        tooltip="GPU that the time is predicted for: a bound, not a timing.",
    )


def second_prompt_input() -> io.Conditioning.Input:
    """The other prompt that is measured."""
    return io.Conditioning.Input(
        "positive_2",
        optional=True,
        tooltip="A different prompt. Without it the first is sampled with two seeds, and the plan "
        "is for prompts like it.",
    )


class SageCalibrate(io.ComfyNode):
    """Watches the model's own attention and makes the plan with the least predicted time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionCalibrate",
            display_name="Calibrate Precision Plan",
            category=f"{CATEGORY}/plan",
            description="Measures what each spec does to each layer and step of this model on your "
            "prompts, and makes the fastest plan that keeps a quality, or the best within a time.",
            search_aliases=["sage plan", "make a plan", "calibration", "auto precision"],
            inputs=[
                io.Model.Input("model", tooltip="The model to measure, as it will be sampled."),
                io.Conditioning.Input("positive", tooltip="A prompt of the kind you will use."),
                io.Conditioning.Input("negative", tooltip="What they shall not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                second_prompt_input(),
                *sampling_inputs(),
                io.Int.Input(
                    "runs",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Runs of each prompt, each with another seed.",
                ),
                io.Float.Input(
                    "share",
                    default=DEFAULT_SHARE,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the layers x steps that is measured; the rest is completed.",
                ),
                goal_input(),
                card_input(),
                io.String.Input(
                    "name",
                    default="calibrated",
                    tooltip="Title of the plan and of the file of measured values.",
                ),
                io.Int.Input(
                    "end_to_end",
                    display_name="pictures for the end-to-end stage",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Measure what errors do to the result, on so many runs, eight or more; "
                    "0 is off. Each costs as much as about 12 sampling runs by gradients, and 19 "
                    "to 21 by groups.",
                ),
                io.Combo.Input(
                    "if_name_exists",
                    options=[_CONTINUE, _REPLACE, _NEW],
                    optional=True,
                    tooltip="A calibration of that name: go on where it stopped (same model and "
                    "settings), measure anew, or keep it and write another file.",
                ),
                io.Combo.Input(
                    "method",
                    display_name="end-to-end stage by",
                    options=list(_METHODS),
                    optional=True,
                    tooltip="gradients rate every layer and step, and need memory for one step's "
                    "graph; groups run the model with groups of them quantized. automatic takes "
                    "gradients where the model and the memory allow it, and says so if not.",
                ),
            ],
            outputs=[
                Plan.Output(display_name="plan", tooltip="The plan; save it or use it at once."),
                io.String.Output(display_name="text", tooltip="What is predicted of it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

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
        runs: int,
        share: float,
        goal: dict[str, Any],
        card: str,
        name: str,
        end_to_end: int = 0,
        if_name_exists: str = _CONTINUE,
        positive_2: Any = None,
        method: str = "automatic",
    ) -> io.NodeOutput:
        from sage_diffusion.adapt.planner import make_plan

        node = cls.hidden.unique_id
        sampling = KSampling(
            positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise
        )
        prompts = [Prompt(x) for x in (positive, positive_2) if x is not None]
        path = _table_path(name, if_name_exists)
        card, note = the_card(card, model)
        try:
            table = measured(
                node,
                ComfySampler(model, sampling),
                prompts,
                runs,
                card,
                path,
                share=share,
                sensitivity=end_to_end,
                method=_METHODS[method],
                again="" if if_name_exists == _CONTINUE else path.stem,
            )
        except TableError as error:
            raise TableError(
                f"{path} can't be continued ({error}): choose '{_REPLACE}' or '{_NEW}' in "
                "if_name_exists, or another name"
            ) from None
        costs, of_what = costs_of(card, table)
        planned = make_plan(table, costs=costs, name=name, **wanted(goal, costs, table))
        text = (
            f"{describe(planned.plan)}\n"
            f"predicted bound on {card}: {planned.time:.2f} of FP16's attention time, "
            f"{planned.quality:.1f} dB{of_what}{note}{fp16_note(planned.plan)}\n"
            f"measured values: {path}"
        )
        if len(prompts) == 1:
            text += "\nmeasured on one prompt: try it on others with Attention Accuracy Check"
        show(node, text)
        return io.NodeOutput(planned.plan, text)


def measured(
    node: Any,
    sampler: ComfySampler,
    prompts: list[Prompt],
    runs: int,
    card: str,
    path: Path,
    again: str = "",
    **settings: Any,
) -> ScoreTable:
    """Calibrate with a bar on a node; cancelling keeps the runs that are finished.

    Args:
        node: its id.
        sampler: of the model.
        prompts: one or two; a single one is sampled twice at least.
        runs: of each prompt, with seeds from the sampler's own on.
        card: whose specs are measured.
        path: of the table.
        again: name that goes on with the table; empty: queueing the node again does.
        settings: of :func:`sage_diffusion.adapt.calibrate.calibrate`.

    Raises:
        TableError: the file is of another calibration.
    """
    from sage_diffusion.adapt.calibrate import calibrate
    from sage_diffusion.adapt.sampling import Progress

    first = sampler.sampling.seed
    seeds = range(first, first + (runs if len(prompts) > 1 else max(runs, 2)))
    bar = SamplingProgress(node, sampler.patched, ["measure"] * (len(prompts) * len(seeds)))
    sampler.sampling.on_step = bar
    sampler.heartbeat = comfy.model_management.throw_exception_if_processing_interrupted
    at = Progress("measure", 0, len(bar.runs), 0.0)

    def tell(now: Progress) -> None:
        nonlocal at
        at = now
        bar.stands([at.stage] * at.total, at.done)
        show(node, f"{at.stage}: {at.done} of {at.total} ({at.seconds:.0f} s)", "sampling")

    try:
        return calibrate(
            sampler,
            prompts,
            seeds,
            specs=candidates(card),
            path=path,
            progress=tell,
            min_prompts=1,
            **settings,
        )
    except comfy.model_management.InterruptProcessingException:
        kept = f"cancelled: {at.stage} had {at.done} of {at.total} runs"
        how = f"take the name {again!r} and '{_CONTINUE}'" if again else "queue it again"
        show(node, f"{kept}\nthey are kept: {how} to go on", "cancelled")
        raise


def wanted(goal: dict[str, Any], costs: Costs, table: ScoreTable) -> dict[str, Any]:
    """The planner's goal, of the values of :func:`goal_input`."""
    if goal["goal"] == _AS_FAST:
        return {"budget": fast_time(costs, table)}
    return {"budget": goal["time"]} if goal["goal"] == _BUDGET else {"floor": goal["decibel"]}


def fp16_note(plan: PrecisionPlan) -> str:
    """A line for a plan that quantizes nothing; empty for others."""
    if quantizes(plan):
        return ""
    return "\nfp16 everywhere: nothing faster is predicted, or nothing faster meets the goal"


def the_card(card: str, model: Any) -> tuple[str, str]:
    """The card of a choice of :func:`card_input`, and a note where another stands in."""
    if card != _THIS:
        return card, ""
    found = this_card(model.load_device)
    if found is not None:
        return found, ""
    return "rtx4090", f" (nothing is known of {model.load_device}: planned for rtx4090)"


def _table_path(name: str, if_it_exists: str) -> Path:
    plain = re.sub(r"[^\w .+()-]", "_", without_ending(name, "json")).strip(" .") or "calibrated"
    path = Path(folder_paths.get_output_directory()) / "sage_calibrations" / f"{plain}.json"
    if if_it_exists == _REPLACE:
        path.unlink(missing_ok=True)
    return free_path(path) if if_it_exists == _NEW else path
