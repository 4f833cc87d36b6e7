"""What a tuned plan is found again by, and how a workflow carries it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sage_diffusion.integrations.comfy.tuning import Mark, find, keep_in_workflow, mark_of
from sage_diffusion.plan import PlanError, PrecisionPlan
from sage_diffusion.plan.embed import content_hash, embed_plan

PLAN = PrecisionPlan("int8/fp8", name="tuned")
SETTINGS = {"steps": 20, "cfg": 4.0}


class SD3:
    """A model configuration of ComfyUI, by its name."""


def model(weight=1.0, patches=None, layers=2):
    network = nn.Module()
    network.joint_blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))
    for parameter in network.parameters():
        parameter.data.fill_(weight)
    inner = SimpleNamespace(diffusion_model=network, model_config=SD3())
    return SimpleNamespace(model=inner, patches=patches or {})


def lora(value, strength=1.0):
    adapter = SimpleNamespace(weights=(torch.full((3, 1), value), torch.ones(1, 3), 1.0, None))
    return {"joint_blocks.0.weight": [(strength, adapter, 1.0, None, None)]}


def test_a_mark_is_the_same_for_the_same_and_another_for_all_else():
    mark = mark_of(model(), SETTINGS, "rtx4090")
    assert mark == mark_of(model(), SETTINGS, "rtx4090")
    assert mark.model == "SD3"
    others = [
        mark_of(model(1.5), SETTINGS, "rtx4090"),  # a fine-tune
        mark_of(model(layers=3), SETTINGS, "rtx4090"),
        mark_of(model(patches=lora(0.5)), SETTINGS, "rtx4090"),
        mark_of(model(patches=lora(0.75)), SETTINGS, "rtx4090"),  # another LoRA
        mark_of(model(patches=lora(0.5, 0.8)), SETTINGS, "rtx4090"),
        mark_of(model(), SETTINGS | {"steps": 8}, "rtx4090"),
    ]
    digests = {mark.digest, *(other.digest for other in others)}
    assert len(digests) == 1 + len(others)
    card = mark_of(model(), SETTINGS, "rtx3090")
    assert card.name != mark.name and mark.is_of(card.name)
    assert not mark.is_of(others[0].name)


def test_weights_that_are_quantized_or_not_loaded_have_a_mark():
    away = model()
    for block in away.model.diffusion_model.joint_blocks:
        block.to("meta")
    assert mark_of(away, SETTINGS, "rtx4090") == mark_of(away, SETTINGS, "rtx4090")
    coded, other = model(), model()
    for one, code in ((coded, 2), (other, 3)):
        weight = one.model.diffusion_model.joint_blocks[0].weight
        weight._qdata = torch.full((9,), code, dtype=torch.int8)
    marks = {mark_of(one, SETTINGS, "rtx4090").digest for one in (coded, other, model())}
    assert len(marks) == 3


def test_the_workflows_plan_comes_first_then_the_one_that_was_kept(tmp_path):
    here, away = Mark("SD3", "0" * 12, "rtx3090"), Mark("SD3", "0" * 12, "rtx4090")
    path = tmp_path / "kept.json"
    assert find(here, "", path) is None
    PLAN.save(path)
    assert find(here, "", path).origin == f"measured before, hash {content_hash(PLAN)}"
    carried = PrecisionPlan("int4/fp8-fast", name="from afar")
    text = embed_plan(carried, away.name)
    assert find(here, text, path).plan == carried  # though it was made on another card
    other = embed_plan(carried, Mark("SD3", "1" * 12, "rtx3090").name)
    assert find(here, other, path).plan == PLAN  # the workflow's model or settings are others now
    edited = text.replace("int4/fp8-fast", "int8/fp8-fast")
    assert "edited by hand" in find(here, edited, path).origin
    path.write_text("{")
    with pytest.raises(PlanError):
        find(here, "", path)


def test_pictures_of_the_run_that_made_the_plan_carry_it():
    prompt = {"7": {"inputs": {"embedded_plan": "", "steps": 3}}}
    inner = {"id": 4, "type": "SageDiffusionAutoTune", "widgets_values": [1, ""]}
    info = {
        "workflow": {
            "nodes": [
                {"id": 7, "type": "SageDiffusionAutoTune", "widgets_values": [20, True, ""]},
                {"id": 9, "type": "a subgraph's id"},
            ],
            "definitions": {"subgraphs": [{"id": "a subgraph's id", "nodes": [inner]}]},
        }
    }
    text = embed_plan(PLAN, "auto/x")
    keep_in_workflow(info, prompt, "7", text)
    assert prompt["7"]["inputs"] == {"embedded_plan": text, "steps": 3}
    assert info["workflow"]["nodes"][0]["widgets_values"] == [20, True, text]
    keep_in_workflow(info, prompt, "7", embed_plan(PLAN, "auto/y"))
    assert '"auto/y"' in info["workflow"]["nodes"][0]["widgets_values"][-1]
    keep_in_workflow(info, None, "9:4", text)
    assert inner["widgets_values"] == [1, text]
    info["workflow"]["nodes"][0]["widgets_values"] = [20, True]  # a workflow of before
    keep_in_workflow(info, prompt, "7", text)
    assert info["workflow"]["nodes"][0]["widgets_values"] == [20, True]
    keep_in_workflow(None, None, "7", text)  # a prompt without a page
