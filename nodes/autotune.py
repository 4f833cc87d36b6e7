"""A plan of the model's own, in one node: measured once, then only applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from sage_diffusion.adapt import DEFAULT_SHARE
from sage_diffusion.adapt.table import TableError
from sage_diffusion.integrations.comfy import patch, status
from sage_diffusion.integrations.comfy.accuracy import KSampling
from sage_diffusion.integrations.comfy.carried import Chosen
from sage_diffusion.integrations.comfy.sampler import ComfySampler, Prompt, costs_of, settings_of
from sage_diffusion.integrations.comfy.tuning import Mark, find, keep_in_workflow, mark_of
from sage_diffusion.nodes.accuracy import sampling_inputs
from sage_diffusion.nodes.attention import compare_speed_input
from sage_diffusion.nodes.calibrate import (
    card_input,
    fp16_note,
    goal_input,
    measured,
    second_prompt_input,
    the_card,
    wanted,
)
from sage_diffusion.nodes.host import CATEGORY, Plan, embed_inputs, show, user_plan_folder
from sage_diffusion.plan import PrecisionPlan
from sage_diffusion.plan.embed import content_hash, embed_plan
from sage_diffusion.plan.library import save_plan
from sage_diffusion.plan.show import describe

_NAME = "Auto-tune Attention"


class SageAutoTune(io.ComfyNode):
    """MODEL -> MODEL with the plan that was measured on it, here and now if need be."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionAutoTune",
            display_name=_NAME,
            category=CATEGORY,
            description="Measures once what quantized attention does to this model, makes a plan "
            "of its own for this card, and runs the model with it. Put it between the loader (and "
            "LoRAs) and the sampler, and give it the sampler's settings.",
            search_aliases=[
                "auto-tune",
                "autotune",
                "auto tune attention",
                "tune",
                "optimize model",
                "automatic precision",
                "calibrate and apply",
                "faster without loss",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to make faster; it is left untouched."),
                io.Conditioning.Input("positive", tooltip="A prompt of the kind you will use."),
                io.Conditioning.Input("negative", tooltip="What it shall not show."),
                io.Latent.Input("latent_image", tooltip="A latent of the size you will use."),
                *sampling_inputs(),
                goal_input(),
                card_input(),
                io.Boolean.Input(
                    "measure_anew",
                    default=False,
                    tooltip="Measure even if a plan of this model and these settings is there, "
                    "and replace it. Switch it off afterwards.",
                ),
                second_prompt_input(),
                io.Float.Input(
                    "share",
                    default=DEFAULT_SHARE,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Part of the layers x steps that is measured; the rest is completed.",
                ),
                compare_speed_input(),
                *embed_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with quantized attention."),
                Plan.Output(display_name="plan", tooltip="The plan that is in use."),
                io.String.Output(display_name="text", tooltip="What is predicted of it."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
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
        goal: dict[str, Any],
        card: str,
        measure_anew: bool,
        positive_2: Any = None,
        share: float = DEFAULT_SHARE,
        compare_speed: bool = True,
        embed_plan: bool = True,
        embedded_plan: str = "",
    ) -> io.NodeOutput:
        node = cls.hidden.unique_id
        sampling = KSampling(
            positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise
        )
        card, note = the_card(card, model)
        settings = settings_of(sampling) | {"goal": goal, "share": share}
        settings["latent"] = settings["latent"][1:]  # a batch of any size runs the same plan
        mark = mark_of(model, settings, card)
        path = user_plan_folder() / f"{mark.name}.json"
        if measure_anew and path.exists():
            PrecisionPlan.load(path)  # what is no plan is never replaced: say so before measuring
        found = None if measure_anew else find(mark, embedded_plan if embed_plan else "", path)
        if found is None:
            sampler = ComfySampler(model, sampling, _NAME)
            prompts = [Prompt(x) for x in (positive, positive_2) if x is not None]
            found = _tuned(node, sampler, prompts, mark, goal, share, measure_anew)
        text = _text(found, note)
        carried = _carried(found, mark) if embed_plan else ""
        keep_in_workflow(cls.hidden.extra_pnginfo, cls.hidden.prompt, str(node), carried)
        patched = patch(
            model,
            found.plan,
            reporters=[lambda news: show(node, str(news), news.state)],
            title=f"{found.plan.name} ({found.origin})",
            compare_speed=compare_speed,
        )
        show(node, f"{status(patched)}\n{text}", "ready")
        return io.NodeOutput(patched, found.plan, text, ui={"embedded_plan": [carried]})


def _tuned(
    node: Any,
    sampler: ComfySampler,
    prompts: list[Prompt],
    mark: Mark,
    goal: dict[str, Any],
    share: float,
    anew: bool,
) -> Chosen:
    """Measure, plan, and keep both."""
    from sage_diffusion.adapt.planner import make_plan

    path = Path(folder_paths.get_output_directory(), "sage_calibrations", f"{mark.name}.json")
    if anew and _is_done(path, user_plan_folder() / f"{mark.name}.json"):
        path.unlink()
    try:
        table = measured(node, sampler, prompts, 1, mark.card, path, share=share)
    except TableError:  # of a batch of another size, say: the file is this node's own
        path.unlink()
        table = measured(node, sampler, prompts, 1, mark.card, path, share=share)
    name = f"{mark.model} on {mark.card}"
    costs, _ = costs_of(mark.card, table)
    plan = make_plan(table, costs=costs, name=name, **wanted(goal, costs, table)).plan
    save_plan(plan, user_plan_folder(), mark.name, overwrite=True)
    return Chosen(plan, f"measured now, hash {content_hash(plan)}")


def _is_done(table: Path, plan: Path) -> bool:
    """Was the plan made of the table? One that was cancelled later is gone on with."""
    if not table.exists() or not plan.exists():
        return False
    return table.stat().st_mtime_ns <= plan.stat().st_mtime_ns


def _text(found: Chosen, note: str) -> str:
    known = found.plan.calibration or {}
    time = known.get("predicted", {}).get("time")
    lines = [found.origin, describe(found.plan)]
    if isinstance(time, (int, float)):
        loops = " (of main loops)" if known.get("time_of") == "main loops" else ""
        card = known.get("costs")
        lines.insert(
            0, f"predicted bound on {card}: {time:.2f} of FP16's attention time{loops}{note}"
        )
    return "\n".join(lines) + fp16_note(found.plan)


def _carried(found: Chosen, mark: Mark) -> str:
    """The text that a workflow carries; a plan for another card keeps that card's name."""
    card = (found.plan.calibration or {}).get("costs", mark.card)
    return embed_plan(found.plan, Mark(mark.model, mark.digest, str(card)).name)
