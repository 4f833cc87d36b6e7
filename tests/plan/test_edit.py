"""Plans that belong to a model, move to other schedules, and merge; plans that are shipped."""

import pytest
import torch
from adapt_host import TinySampler

from sage_diffusion.adapt.frechet import frechet_distance, picture_features
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule, step_progress
from sage_diffusion.plan.edit import check_fingerprint, merge_plans, remap_plan
from sage_diffusion.plan.fingerprint import fingerprint
from sage_diffusion.plan.shelf import FOLDER, shipped, shipped_plan


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


@pytest.mark.parametrize("name", shipped())
def test_shipped_plans_are_valid(name):
    plan = shipped_plan(name)
    assert plan.name
    calibrated = plan.calibration is not None
    assert calibrated == (name == "bundled")
    # A plan for one family must not look as if it had been measured there.
    assert calibrated or plan.model is None or "not calibrated" in plan.name
    assert PrecisionPlan.from_json(plan.to_json()) == plan


def test_unknown_shipped_plan():
    assert len(shipped()) == len(list(FOLDER.glob("*.json"))) > 5
    with pytest.raises(PlanError, match="plan must be one of"):
        shipped_plan("nope")


def test_frechet_distance_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(150, 6, generator=generator, dtype=torch.float64) * 1.5 + 0.3
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.tensor(sqrtm((cov_a @ cov_b).numpy()).real)
    expected = shift + cov_a.trace() + cov_b.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features():
    pictures = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    features = picture_features(pictures)
    assert features.shape == (5, 48)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 1) == pytest.approx(48, rel=1e-6)
    with pytest.raises(ValueError, match="at least two members"):
        frechet_distance(features[:1], features)
