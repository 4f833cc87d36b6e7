"""Rules of thumb by model family: chosen by class, fitting every size, with reasons."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sage_diffusion.adapt import presets
from sage_diffusion.integrations.comfy import families
from sage_diffusion.integrations.comfy.families import (
    FAMILIES,
    advice_table,
    family_of,
    family_plan,
    plan_for,
)
from sage_diffusion.kernels.spec import AttentionSpec

ROOT = Path(__file__).resolve().parent.parent.parent
DIT = ["txt_in.blocks.00", *(f"double.{i:02}" for i in range(3)), "single.00", "single.01"]
CROSSING = [name for i in range(30) for name in (f"double.{i:02}", f"double.{i:02}.1")]
UNET = ["input.01.0.attn1", "input.01.0.attn2", "middle.00.0.attn1", "middle.00.0.attn2"]


def named(name):
    return next(family for family in FAMILIES if name in family.name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("layers", [DIT, CROSSING, UNET])
def test_rules_fit_every_model_and_say_that_nobody_calibrated_them(family, layers):
    plan = family_plan(family, layers, "cpu")
    assert plan.check(layers) == []
    assert "not calibrated" in plan.name
    assert plan.may_quantize(layers[2])
    assert all(advice.reason for advice in family.advice)
    for advice in family.advice:
        assert [str(AttentionSpec.parse(spec)) for spec in advice.specs] == list(advice.specs)


def test_video_keeps_cross_attention_and_the_ends():
    plan = family_plan(named("Wan"), CROSSING, "cpu")

    def spec(layer, at=0.5, tokens=4096):
        return str(plan.resolve(layer, at, tokens=tokens))

    assert spec("double.07.1") == "fp16"
    assert spec("double.00") == spec("double.29") == "int8/fp16"
    assert spec("double.07") == "int8/int8"
    assert spec("double.07", 0.05) == spec("double.07", 1.0) == "int8/fp16"
    assert spec("double.07", tokens=512) == "fp16"


def test_a_unets_cross_attention_is_left_alone():
    plan = family_plan(named("SDXL"), UNET, "cpu")
    assert str(plan.resolve("input.01.0.attn2", 0.5, tokens=4096)) == "fp16"
    assert str(plan.resolve("input.01.0.attn1", 0.5, tokens=4096)) == "int8/int8"


@pytest.mark.parametrize(
    ("card", "careful", "rest", "least"),
    [("rtx4090", "int8/fp16", "int8/int8", 512), ("h100", "fp16", "int8/fp8", 2048)],
)
def test_rules_begin_where_the_card_gains(monkeypatch, card, careful, rest, least):
    """And what needs care never falls to the rule for the rest."""
    for module in (presets, families):
        monkeypatch.setattr(module, "this_card", lambda device: card)
    monkeypatch.setattr(presets, "runs", lambda spec, device: True)
    plan = family_plan(named("Wan"), CROSSING, "cpu")

    def spec(layer, tokens):
        return str(plan.resolve(layer, 0.5, tokens=tokens))

    assert spec("double.07", least) == "fp16"
    pays = next(n for n in range(least, 8192, 64) if spec("double.07", n) == rest)
    assert pays == presets.least_tokens(rest, "fp16", card, families.MIN_TOKENS)
    for tokens in (pays, pays + 64, 32768):
        assert (spec("double.00", tokens), spec("double.07", tokens)) == (careful, rest)


def test_keys_that_concentrate_are_rotated():
    plan = family_plan(named("MiniMax"), CROSSING, "cpu")
    assert str(plan.resolve("double.29", 0.5, tokens=4096)) == "int8/int8"
    assert plan.resolve("double.29", 0.5, tokens=4096).rotate


def test_the_class_decides_derived_ones_too():
    assert family_of(["WAN22_Animate", "WAN21_T2V", "BASE"]) is named("Wan")
    assert family_of(["Flux2", "Flux"]) is named("Flux.2")
    assert family_of(["ACEStep", "BASE"]) is None


def test_a_model_gets_the_plan_of_its_family_or_the_balanced_preset():
    network = SimpleNamespace()
    import torch

    network = torch.nn.Module()
    network.joint_blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    for name, words in (("SD3", ""), ("Unheard", "no rules for Unheard: the balanced preset")):
        config = type(name, (), {})()
        model = SimpleNamespace(diffusion_model=network, model_config=config)
        chosen = plan_for(SimpleNamespace(model=model), "cpu")
        assert chosen.origin == words
        assert chosen.plan.check(["double.00", "double.01"]) == []


def test_the_help_page_shows_the_table():
    assert advice_table() in (ROOT / "web/docs/SageDiffusionAttention.md").read_text()
