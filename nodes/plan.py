"""Precision plans in the graph: load, save, merge, edit, look at."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from sage_diffusion.integrations.comfy import attached
from sage_diffusion.integrations.comfy.carried import choose, signature
from sage_diffusion.integrations.comfy.images import as_image
from sage_diffusion.integrations.comfy.layers import layer_names
from sage_diffusion.kernels.spec import LADDER
from sage_diffusion.nodes.host import (
    CATEGORY,
    Plan,
    embed_inputs,
    path_if_there,
    plan_names,
    show,
    user_plan_folder,
)
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule
from sage_diffusion.plan.edit import renamed, with_default, with_rule, without_rule
from sage_diffusion.plan.library import save_plan
from sage_diffusion.plan.show import describe, draw, grid, matching, plan_layers, spec_shares

_PLAN_CATEGORY = f"{CATEGORY}/plan"


class SageLoadPlan(io.ComfyNode):
    """A plan from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionLoadPlan",
            display_name="Load Precision Plan",
            category=_PLAN_CATEGORY,
            description="Reads a precision plan from models/sage_plans or from the pack's own.",
            search_aliases=["sage plan", "precision plan", "load plan"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=plan_names(),
                    tooltip="A plan from models/sage_plans, or one that came with the pack.",
                ),
                *embed_inputs(),
            ],
            outputs=[
                Plan.Output(display_name="plan", tooltip="The plan."),
                io.String.Output(display_name="text", tooltip="The plan in a few lines."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool:
        return True  # whoever got the workflow need not have the file

    @classmethod
    def fingerprint_inputs(cls, file: str, embed_plan: bool = True, embedded_plan: str = "") -> str:
        return signature(file, embedded_plan if embed_plan else "", path_if_there(file))

    @classmethod
    def execute(cls, file: str, embed_plan: bool = True, embedded_plan: str = "") -> io.NodeOutput:
        chosen = choose(file, embedded_plan if embed_plan else "", path_if_there(file))
        text = describe(chosen.plan)
        show(cls.hidden.unique_id, f"{text}\n{chosen.origin}")
        return io.NodeOutput(chosen.plan, text)


class SageSavePlan(io.ComfyNode):
    """A plan into a file; a file that is no plan is never replaced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionSavePlan",
            display_name="Save Precision Plan",
            category=_PLAN_CATEGORY,
            description="Writes a precision plan as JSON into models/sage_plans.",
            search_aliases=["sage plan", "export plan", "save plan"],
            is_output_node=True,
            inputs=[
                Plan.Input("plan", tooltip="The plan to keep."),
                io.String.Input(
                    "name",
                    default="my plan",
                    tooltip="File name without .json; folder/name makes a folder.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a plan of that name. A broken file is never replaced.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, plan: PrecisionPlan, name: str, overwrite: bool) -> io.NodeOutput:
        path = save_plan(plan, user_plan_folder(), name, overwrite)
        show(cls.hidden.unique_id, f"saved {path}")
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"saved {path}"))


class SageMergePlans(io.ComfyNode):
    """Two plans as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionMergePlans",
            display_name="Merge Precision Plans",
            category=_PLAN_CATEGORY,
            description="The rules of the first plan on top of the second, whose default counts "
            "where no rule does.",
            search_aliases=["sage plan", "combine plans", "merge plan"],
            inputs=[
                Plan.Input("first", tooltip="Its rules win."),
                Plan.Input("second", tooltip="Counts where the first has no rule."),
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="The merged plan.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, first: PrecisionPlan, second: PrecisionPlan) -> io.NodeOutput:
        from sage_diffusion.plan.edit import merge_plans

        plan = merge_plans(first, second)
        dropped = len(first.rules) + len(second.rules) - len(plan.rules)
        lost = f"\n{dropped} rules were covered by others and dropped" if dropped else ""
        show(cls.hidden.unique_id, describe(plan) + lost)
        return io.NodeOutput(plan)


def _rule_inputs() -> list[io.Input]:
    return [
        io.String.Input("layers", default="*", tooltip="One glob of layer names, e.g. double.0?."),
        io.Combo.Input("spec", options=list(LADDER), default="fp16", tooltip="What they run."),
        io.Float.Input(
            "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="From this part on."
        ),
        io.Float.Input(
            "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Up to this part."
        ),
        io.Combo.Input(
            "branch",
            options=["both", "cond", "uncond"],
            tooltip="Only the positive or only the negative half of guidance.",
        ),
        io.Int.Input("min_tokens", default=0, min=0, max=1 << 20, tooltip="Least number of keys."),
        io.Combo.Input(
            "place",
            options=["first", "last"],
            tooltip="first: before every other rule. last: where no other rule says anything.",
        ),
    ]


class SageEditPlan(io.ComfyNode):
    """One change of a plan; chain several for more."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionEditPlan",
            display_name="Edit Precision Plan",
            category=_PLAN_CATEGORY,
            description="Changes one thing of a plan: add or remove a rule, set what counts "
            "elsewhere, rename it, or write it as JSON. Chain several for more.",
            search_aliases=["sage plan", "plan rule", "change plan"],
            inputs=[
                Plan.Input(
                    "plan", optional=True, tooltip="The plan to change; none starts with FP16."
                ),
                io.DynamicCombo.Input(
                    "change",
                    options=[
                        io.DynamicCombo.Option("add a rule", _rule_inputs()),
                        io.DynamicCombo.Option(
                            "remove a rule",
                            [
                                io.Int.Input(
                                    "rule", default=0, min=0, max=999, tooltip="Its number."
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "set the default",
                            [
                                io.Combo.Input(
                                    "spec",
                                    options=list(LADDER),
                                    default="int8/fp16",
                                    tooltip="Runs where no rule applies.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "rename",
                            [io.String.Input("name", default="my plan", tooltip="New name.")],
                        ),
                        io.DynamicCombo.Option(
                            "write JSON",
                            [
                                io.String.Input(
                                    "json",
                                    multiline=True,
                                    default=PrecisionPlan().to_json(),
                                    tooltip="The whole plan; replaces the one that came in.",
                                )
                            ],
                        ),
                    ],
                    tooltip="What to change.",
                ),
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="The changed plan.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, change: dict[str, Any], plan: PrecisionPlan | None = None) -> io.NodeOutput:
        edited = _edited(plan or with_default(PrecisionPlan(), "fp16"), change)
        show(cls.hidden.unique_id, describe(edited))
        return io.NodeOutput(edited)


def _edited(plan: PrecisionPlan, change: dict[str, Any]) -> PrecisionPlan:
    kind = change["change"]
    if kind == "remove a rule":
        return without_rule(plan, change["rule"])
    if kind == "set the default":
        return with_default(plan, change["spec"])
    if kind == "rename":
        return renamed(plan, change["name"])
    if kind == "write JSON":
        return _from_json(change["json"])
    layers = change["layers"].strip() or "*"
    if "," in layers:
        raise PlanError(f"layers must be one glob, got {layers!r}: add a rule for each")
    rule = Rule(
        change["spec"],
        layers,
        change["start_percent"],
        change["end_percent"],
        None if change["branch"] == "both" else change["branch"],
        change["min_tokens"],
    )
    return with_rule(plan, rule, first=change["place"] == "first")


def _from_json(text: str) -> PrecisionPlan:
    try:
        return PrecisionPlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"json: {error}") from None


class SagePlanPreview(io.ComfyNode):
    """A plan as a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionPlanPreview",
            display_name="Precision Plan Preview",
            category=_PLAN_CATEGORY,
            description="Draws which spec each layer runs at each step.",
            search_aliases=["sage plan", "show plan", "plan picture"],
            is_output_node=True,
            inputs=[
                Plan.Input("plan", tooltip="The plan to draw."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Gives the layer names; without it the plan's own globs are the rows.",
                ),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Steps of the sampler."),
                io.Combo.Input(
                    "branch",
                    options=["cond", "uncond"],
                    tooltip="Which half of guidance, for rules that tell them apart.",
                ),
                io.Int.Input(
                    "tokens",
                    default=4096,
                    min=1,
                    max=1 << 20,
                    tooltip="Keys of a call, for rules with a least number.",
                ),
                io.String.Input("layers", default="*", tooltip="Draw only layers of these globs."),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="Layers down, steps across."),
                io.String.Output(display_name="text", tooltip="The plan in a few lines."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        plan: PrecisionPlan,
        steps: int,
        branch: str,
        tokens: int,
        layers: str,
        model: Any = None,
    ) -> io.NodeOutput:
        rows = matching(_rows(plan, model), layers)
        cells = grid(plan, rows, steps, branch, tokens)
        picture = as_image(draw(cells, rows, f"{plan.name or 'plan'}, {branch}, {steps} steps"))
        text = describe(plan)
        parts = ", ".join(f"{name} {part:.0%}" for name, part in spec_shares(cells).items())
        show(cls.hidden.unique_id, f"{text}\n{len(rows)} layers x {steps} steps: {parts}")
        return io.NodeOutput(picture, text, ui=ui.PreviewImage(picture, cls=cls))


def _rows(plan: PrecisionPlan, model: Any) -> list[str]:
    if model is None:
        return plan_layers(plan)
    attention = attached(model)
    if attention is not None and attention.last is not None and attention.last.summary.layers:
        return [layer.name for layer in attention.last.summary.layers]
    return layer_names(model.model.diffusion_model)
