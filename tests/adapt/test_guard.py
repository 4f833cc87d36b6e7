"""The guard at run time: drift, stepping up, never a black picture."""

import copy

import pytest
import torch
from adapt_host import TinySampler

from sage_diffusion import backends
from sage_diffusion.guard import Guard, GuardState, next_up
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.session import AttentionSession, NonFiniteOutput


def sample_with(sampler, plan, **options):
    sampler.session = AttentionSession(plan, **options)
    return sampler.sample("a", 0), sampler.session


def test_every_spec_climbs_to_fp16_in_three_rungs():
    for name in LADDER:
        spec = AttentionSpec.parse(name)
        for _ in range(3):
            spec = next_up(spec)
        assert str(spec) == "fp16"
    assert str(next_up(AttentionSpec.parse("int4/fp8-fast"))) == "int8/fp8-fast"
    assert str(next_up(AttentionSpec.parse("fp4/fp4"))) == "int8/fp8"
    assert str(next_up(AttentionSpec.parse("int8/int8+smooth_v"))) == "int8/fp16"


def test_a_poisoned_layer_is_caught_within_two_steps():
    sampler = TinySampler(poison=2)
    exact, _ = sample_with(sampler, "fp16")
    plain, _ = sample_with(sampler, "int4/fp8-fast")
    guarded, session = sample_with(sampler, "int4/fp8-fast", guard=Guard(every=2, limit=0.2))
    summary = {layer.name: layer for layer in session.summary().layers}
    poisoned = summary.pop("blocks.2.attn")
    assert "at step 0" in poisoned.stepped_up[0]
    assert poisoned.ran["int4/fp8-fast", "reference"] <= 2
    assert poisoned.drift > 0.2
    assert all(not layer.stepped_up for layer in summary.values())
    assert (guarded - exact).square().mean() < 0.5 * (plain - exact).square().mean()
    assert "stepped up: relative L1" in str(session.summary())
    assert session.summary().to_dict()["layers"][2]["stepped_up"]


def test_without_drift_checks_nothing_is_measured(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the guard measured")

    monkeypatch.setattr(GuardState, "check", refuse)
    _, session = sample_with(TinySampler(poison=2), "int4/fp8-fast")
    assert all(layer.drift is None for layer in session.summary().layers)


def test_checks_are_staggered():
    state = GuardState(Guard(every=4))
    assert all(state.due(index, 0) for index in range(8))
    for step in range(1, 9):
        assert sum(state.due(index, step) for index in range(8)) == 2
    assert not state.due(0, -1)


def test_observing_only_leaves_the_spec():
    guard = Guard(every=1, limit=1e-6, step_up=False)
    _, session = sample_with(TinySampler(), "int4/fp8-fast", guard=guard)
    assert session.summary().specs == {"int4/fp8-fast": 32}
    assert all(layer.drift > 0 for layer in session.summary().layers)


@pytest.fixture
def broken_backend(monkeypatch):
    """The twin, but the second layer's first call returns NaN."""
    load = backends.load
    calls = []

    def loads(chosen):
        run = load(chosen)

        def broken(*args):
            out, lse = run(*args)
            calls.append(1)
            return (out * torch.nan if len(calls) == 2 else out), lse

        return broken

    monkeypatch.setattr(backends, "load", loads)


@pytest.mark.usefixtures("broken_backend")
def test_nan_is_replaced_at_once_and_the_layer_stepped_up():
    out, session = sample_with(TinySampler(), "int8/fp8")
    assert out.isfinite().all()
    layer = session.summary().layers[1]
    assert layer.non_finite == (0,)
    assert layer.ran == {("fp16", "native"): 7}
    assert list(layer.declined) == ["the quantized output was not finite, run again natively"]
    assert layer.stepped_up == ("non-finite output at step 0",)
    assert session.summary().layers[0].ran == {("int8/fp8", "reference"): 8}


@pytest.mark.usefixtures("broken_backend")
def test_strict_raises():
    with pytest.raises(NonFiniteOutput, match=r"blocks\.1\.attn"):
        sample_with(TinySampler(), "int8/fp8", strict=True)


def test_another_plan_starts_afresh():
    _, session = sample_with(TinySampler(poison=2), "int4/int8", guard=Guard(every=1, limit=0.2))
    assert session.guard.rungs
    session.plan = "int4/int8"
    assert not session.guard.rungs
    assert copy.deepcopy(session).guard.guard == session.guard.guard


@pytest.mark.parametrize("wrong", [{"every": -1}, {"limit": 0.0}, {"rows": 0}])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match="must"):
        Guard(**wrong)
