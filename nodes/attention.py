"""Sage Attention, and the report of what it did."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from sage_diffusion.adapt.presets import PRESETS, preset
from sage_diffusion.attend import backends
from sage_diffusion.attend.guard import Guard
from sage_diffusion.integrations.comfy import attached, marked_off, patch, status
from sage_diffusion.integrations.comfy.carried import Chosen, choose, signature
from sage_diffusion.integrations.comfy.families import plan_for
from sage_diffusion.integrations.comfy.headline import OFF
from sage_diffusion.kernels.spec import LADDER
from sage_diffusion.nodes.host import (
    CATEGORY,
    Plan,
    embed_inputs,
    path_if_there,
    plan_names,
    show,
)
from sage_diffusion.plan import PlanError, PrecisionPlan
from sage_diffusion.plan.edit import custom
from sage_diffusion.plan.embed import content_hash
from sage_diffusion.plan.show import describe

#: Choices of the preset that are none.
BY_MODEL, FILE, INPUT, CUSTOM = "by model", "plan file", "plan input", "custom"

#: Steps between two drift checks of a layer.
_CHECK_EVERY = 10


def _custom_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "spec",
            options=[name for name in LADDER if name != "fp16"],
            default="int8/fp16",
            tooltip="Formats of Q and K / of P and V, safest first.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Steps before this part of the run keep the model's own attention.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Steps from this part of the run on keep the model's own attention.",
        ),
        io.String.Input(
            "layers",
            default="*",
            tooltip="Globs of layer names, separated by commas: double.*, single.0?, *.attn1. "
            "!glob leaves layers alone. Names are in the report after a run.",
        ),
        io.Boolean.Input(
            "keep_cross_attention",
            default=True,
            tooltip="Leave calls alone whose keys are other tokens than the queries, such as text.",
        ),
        io.Int.Input(
            "min_tokens",
            default=128,
            min=0,
            max=1 << 20,
            tooltip="Leave calls with fewer keys alone: they cost little time.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "backend",
            options=list(backends.names()),
            default="auto",
            advanced=True,
            tooltip="Who computes. auto takes the first that can; reference is the slow, "
            "exact imitation that runs everywhere.",
        ),
        io.Boolean.Input(
            "strict",
            default=False,
            advanced=True,
            tooltip="Stop with an error where a call can't be quantized or a plan does not "
            "fit the model, instead of using the model's own attention.",
        ),
        io.Boolean.Input(
            "guard",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Compare a few rows of each layer with exact attention every tenth "
            "step; a layer that strays runs a more accurate spec from then on.",
        ),
        compare_speed_input(),
    ]


def compare_speed_input() -> io.Boolean.Input:
    """Whether the first run also tells how much faster it was."""
    return io.Boolean.Input(
        "compare_speed",
        default=True,
        optional=True,
        advanced=True,
        tooltip="On a GPU, make three calls of each kind both ways in the first run, to tell how "
        "much faster it was: less than 1 % of its attention. Off tells only what it took.",
    )


class SageAttention(io.ComfyNode):
    """MODEL -> MODEL whose attention is quantized as a plan says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [io.DynamicCombo.Option(name, []) for name in (BY_MODEL, *PRESETS)]
        options += [
            io.DynamicCombo.Option(
                FILE,
                [
                    io.Combo.Input(
                        "file",
                        options=plan_names(),
                        tooltip="A plan from models/sage_plans, or one that came with the pack.",
                    )
                ],
            ),
            io.DynamicCombo.Option(
                INPUT,
                [Plan.Input("plan", tooltip="From Load, Edit or Merge Precision Plan.")],
            ),
            io.DynamicCombo.Option(CUSTOM, _custom_inputs()),
        ]
        return io.Schema(
            node_id="SageDiffusionAttention",
            display_name="Sage Attention",
            category=CATEGORY,
            description="Runs the model's attention in 8 or 4 bits, layer by layer and step by "
            "step as a precision plan says, and reports on the node what it did. Put it between "
            "the loader (and LoRAs) and the sampler.",
            search_aliases=[
                "attention",
                "sage",
                "int8",
                "int4",
                "fp8",
                "fp4",
                "faster",
                "speed",
                "quantize",
                "sage diffusion",
                "quantized attention",
                "int8 attention",
                "int4 attention",
                "fp8 attention",
                "faster attention",
                "speed up sampling",
                "sageattn",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to make faster; it is left untouched."),
                io.DynamicCombo.Input(
                    "preset",
                    options=options,
                    tooltip="by model: rules of thumb for the model's family, not calibrated. "
                    "quality: INT8 with FP16 values. balanced: 8 bits. fast: 4 bits where the GPU "
                    "has them. plan file / plan input: a measured plan. custom: your own.",
                ),
                io.Boolean.Input(
                    "enabled",
                    default=True,
                    label_on="on",
                    label_off="off",
                    tooltip="Off passes the model through as it came, to compare by one click.",
                ),
                *_advanced_inputs(),
                *embed_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with quantized attention."),
                Plan.Output(display_name="plan", tooltip="The plan that is in use."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, **kwargs: Any) -> bool | str:
        """Takes every value, as a plan's file need not be here; :meth:`execute` checks them."""
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        preset: dict[str, Any],
        embed_plan: bool = True,
        embedded_plan: str = "",
        **others: Any,
    ) -> str:
        if preset["preset"] != FILE:
            return ""
        file = preset["file"]
        return signature(file, embedded_plan if embed_plan else "", path_if_there(file))

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: dict[str, Any],
        enabled: bool,
        backend: str,
        strict: bool,
        guard: bool = False,
        compare_speed: bool = True,
        embed_plan: bool = True,
        embedded_plan: str = "",
    ) -> io.NodeOutput:
        chosen = plan_of(preset, model, embedded_plan if embed_plan else "")
        plan, title = chosen.plan, chosen.plan.name or preset["preset"]
        if chosen.origin:
            title = f"{title} ({chosen.origin})"
        node = cls.hidden.unique_id
        if not enabled:
            show(node, str(OFF), OFF.state)
            return io.NodeOutput(marked_off(model), plan)
        patched = patch(
            model,
            plan,
            backend=backend,
            strict=strict,
            guard=Guard(every=_CHECK_EVERY) if guard else None,
            keep_cross=bool(preset.get("keep_cross_attention", False)),
            reporters=[lambda news: show(node, str(news), news.state)],
            title=title,
            compare_speed=compare_speed,
        )
        show(node, f"{status(patched)}\n{describe(plan)}", "ready")
        return io.NodeOutput(patched, plan)


def plan_of(values: dict[str, Any], model: Any, embedded: str = "") -> Chosen:
    """The plan that the widget's values mean for a MODEL."""
    kind, device = values["preset"], str(model.load_device)
    if kind == BY_MODEL:
        return plan_for(model, device)
    if kind == FILE:
        return choose(values["file"], embedded, path_if_there(values["file"]))
    if kind == INPUT:
        plan = values.get("plan")
        if not isinstance(plan, PrecisionPlan):
            raise PlanError("connect a plan, or choose another preset")
        return Chosen(plan, f"hash {content_hash(plan)}")
    if kind == CUSTOM:
        plan = custom(
            values["spec"],
            start=values["start_percent"],
            end=values["end_percent"],
            layers=values["layers"],
            min_tokens=values["min_tokens"],
        )
        return Chosen(plan, "")
    return Chosen(preset(kind, device), "")


class SageReport(io.ComfyNode):
    """What Sage Attention did in the run that made the latent (or image) that passes through."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionReport",
            display_name="Sage Attention Report",
            category=CATEGORY,
            description="Shows what Sage Attention did in the last run: calls intercepted, "
            "quantized and declined, by layer. Put it behind the sampler.",
            search_aliases=["attention report", "attention summary", "which layers are quantized"],
            is_output_node=True,
            inputs=[
                io.AnyType.Input(
                    "after",
                    tooltip="The sampler's latent, or the image: the report is read when it is "
                    "there. It passes through unchanged.",
                ),
                io.Model.Input("model", tooltip="The MODEL that came out of Sage Attention."),
                io.Boolean.Input(
                    "details", default=True, tooltip="List every layer, not only the totals."
                ),
            ],
            outputs=[
                io.AnyType.Output(display_name="after", tooltip="What came in."),
                io.String.Output(display_name="report", tooltip="The text."),
                io.String.Output(display_name="json", tooltip="The same as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> float:
        return float("nan")  # never cached: it reports on what happened, not on its inputs

    @classmethod
    def execute(cls, after: Any, model: Any, details: bool) -> io.NodeOutput:
        attention = attached(model)
        headline = status(model)
        text, data = str(headline), {"state": headline.state, "headline": list(headline[1:])}
        if attention is not None and attention.last is not None:
            report = attention.last
            text, data = report.details() if details else str(report), report.to_dict()
        show(cls.hidden.unique_id, text, headline.state)
        return io.NodeOutput(after, text, json.dumps(data), ui=ui.PreviewText(text))
