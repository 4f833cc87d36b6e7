"""Plans that belong to a model, move to other schedules, and merge; plans that are shipped."""

import pytest
from adapt_host import TinySampler

from sage_diffusion.plan import PlanError, PrecisionPlan, Rule, step_progress
from sage_diffusion.plan.edit import (
    check_fingerprint,
    custom,
    custom_globs_that_miss,
    merge_plans,
    remap_plan,
    renamed,
    with_default,
    with_rule,
    without_rule,
)
from sage_diffusion.plan.fingerprint import fingerprint


def test_a_plan_knows_its_model():
    sampler = TinySampler()
    sampler.attach()
    here = fingerprint(
        list(sampler.session.layers), model="TinyDiT", head_dims={"blocks.0.attn": 32}
    )
    plan = PrecisionPlan("int8/fp8", fingerprint=here)
    check_fingerprint(plan, here)
    check_fingerprint(PrecisionPlan("int8/fp8"), here)
    for other, message in (
        (fingerprint(sampler.names, model="Else"), "made for TinyDiT, this is Else"),
        (fingerprint(sampler.names[:2]), "2 of its layers are not here"),
        (fingerprint([*sampler.names, "x"]), "1 layers here are unknown"),
        (fingerprint(sampler.names, head_dims={"blocks.0.attn": 64}), "has head dim 64"),
    ):
        with pytest.raises(PlanError, match=message):
            check_fingerprint(plan, other)


def test_checking_a_plan_compares_the_layers_that_it_was_calibrated_on():
    plan = PrecisionPlan("int8/fp8", fingerprint=fingerprint(["a.0", "a.1"]))
    assert plan.check(["a.0", "a.1"]) == []
    (warning,) = plan.check(["a.0", "a.1", "a.2"])
    assert "calibrated on another model: 1 layers here are unknown to it (a.2 ..)" in warning
    with pytest.raises(PlanError, match="another model"):
        plan.check(["a.0", "a.1", "a.2"], strict=True)
    with pytest.raises(PlanError, match=r"another model: 1 of its layers are not here \(a\.1"):
        plan.check(["a.0", "b.1"])
    known = PrecisionPlan("int8/fp8", fingerprint=fingerprint(["a.0"], model="DiT"))
    assert known.check(["a.0"], model="DiT") == []
    with pytest.raises(PlanError, match=r"made for DiT, this is Flux; without its fingerprint"):
        known.check(["a.0", "a.1"], model="Flux")


def test_moving_to_another_schedule_keeps_the_sigmas():
    old = tuple(1 - i / 10 for i in range(10))
    plan = PrecisionPlan("int4/int8", (Rule("int8/int8", "*", 0.61, 1.0),), schedule=old)
    new = tuple(1 - i / 25 for i in range(25))
    moved = remap_plan(plan, new)
    for i, sigma in enumerate(new):
        assert moved.resolve("a", step_progress(i, 25)) == plan.resolve("a", plan.remap(sigma))
    with pytest.raises(PlanError, match="stores no schedule"):
        remap_plan(PrecisionPlan("fp16"), new)
    with pytest.raises(PlanError, match="strictly descending"):
        remap_plan(plan, (1.0, 1.0))


def test_merging_puts_the_first_plan_first():
    first = PrecisionPlan("fp16", (Rule("fp16", "a.*"), Rule("int8/fp16", "b.*")))
    second = PrecisionPlan("int4/int8", (Rule("int8/int8", "b.*"), Rule("int8/int8", "*", 0.5)))
    merged = merge_plans(first, second)
    assert [str(rule.spec) for rule in merged.rules] == ["fp16", "int8/fp16", "int8/int8"]
    assert str(merged.resolve("c", 0.2)) == "int4/int8"
    with pytest.raises(PlanError, match="different schedules"):
        merge_plans(
            PrecisionPlan("fp16", schedule=(1, 0)), PrecisionPlan("fp16", schedule=(1, 0.5))
        )
    one, other = (
        PrecisionPlan("fp16", fingerprint=fingerprint(["a"], model=name)) for name in ("A", "B")
    )
    assert merge_plans(one, one) == one
    with pytest.raises(PlanError, match=r"different models can't be merged: .* made for A"):
        merge_plans(one, other)


def spec_at(plan, layer="double.00", progress=0.5, tokens=4096):
    return str(plan.resolve(layer, progress, tokens=tokens))


def test_custom_plans():
    plan = custom(
        "int4/int8", start=0.25, end=0.75, layers="double.*, !double.00\nsingle.1?", min_tokens=100
    )
    assert spec_at(plan, "double.01") == "int4/int8"
    assert spec_at(plan, "single.12") == "int4/int8"
    assert spec_at(plan, "double.00") == "fp16"
    assert spec_at(plan, "single.05") == "fp16"
    assert spec_at(plan, "double.01", progress=0.1) == "fp16"
    assert spec_at(plan, "double.01", progress=0.75) == "fp16"
    assert spec_at(plan, "double.01", tokens=99) == "fp16"
    assert spec_at(custom("int8/fp16", layers="!double.00")) == "fp16"
    assert spec_at(custom("int8/fp16", layers="!double.00"), "double.01") == "int8/fp16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "int5"}, "not an attention spec"),
        ({"spec": "int8/fp16", "start": 0.6, "end": 0.5}, "start must be less than end"),
        ({"spec": "int8/fp16", "layers": " "}, "layers must be globs"),
        ({"spec": "int8/fp16", "layers": "!"}, "layers must be globs"),
    ],
)
def test_custom_plans_say_what_is_wrong(arguments, message):
    with pytest.raises(PlanError, match=message):
        custom(**arguments)


def test_edits():
    plan = PrecisionPlan("fp16", (Rule("int8/fp16", "a"), Rule("int8/int8", "b")))
    top = with_rule(plan, Rule("int4/int8", "a"))
    assert [str(rule.spec) for rule in top.rules] == ["int4/int8", "int8/int8"]
    assert len(with_rule(plan, Rule("int4/int8", "c"), first=False).rules) == 3
    with pytest.raises(PlanError, match="can never apply"):
        with_rule(plan, Rule("int4/int8", "a"), first=False)
    assert [rule.layers for rule in without_rule(plan, 0).rules] == ["b"]
    with pytest.raises(PlanError, match="between 0 and 1, got 2"):
        without_rule(plan, 2)
    with pytest.raises(PlanError, match="has no rules to remove"):
        without_rule(PrecisionPlan("fp16"), 0)
    assert str(with_default(plan, "int8/fp8").default) == "int8/fp8"
    assert renamed(plan, " ").name is None


def test_globs_of_a_text_box_that_match_nothing_are_said_in_its_words():
    layers = [f"double.0{i}" for i in range(5)]
    plan = custom("int8/fp16", layers="double.*, nothing.here")
    found = custom_globs_that_miss(plan, layers)
    assert found == (
        "layers: 'nothing.here' matches no layer of this model: "
        "double.00, double.01, double.02, double.03, .. (5)"
    )
    both = custom_globs_that_miss(custom("int8/fp16", layers="a b"), layers[:1])
    assert both == "layers: 'a', 'b' match no layer of this model: double.00"
    assert custom_globs_that_miss(custom("int8/fp16"), layers) is None
    assert custom_globs_that_miss(PrecisionPlan("fp16", (Rule("int8/fp16", "a"),)), layers) is None
