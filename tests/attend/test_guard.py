"""The guard at run time: drift, stepping up, never a black picture."""

import copy
import dataclasses

import pytest
import torch
from adapt_host import TinySampler
from recording import recorded
from torch.utils._python_dispatch import TorchDispatchMode

from sage_diffusion.attend import backends, finite
from sage_diffusion.attend.guard import Guard, GuardState, next_up
from sage_diffusion.attend.health import NonFiniteOutput
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.kernels.spec import LADDER, AttentionSpec

#: Balance heals what ails the poisoned layer: a few large channels of its keys.
FRAIL = "int4/fp8-fast-balance"


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
    assert str(next_up(AttentionSpec.parse("int8/int8"))) == "int8/fp16"


def test_a_poisoned_layer_is_caught_within_two_steps():
    sampler = TinySampler(poison=2)
    exact, _ = sample_with(sampler, "fp16")
    plain, _ = sample_with(sampler, FRAIL)
    guarded, session = sample_with(sampler, FRAIL, guard=Guard(every=2, limit=0.2))
    summary = {layer.name: layer for layer in session.summary().layers}
    poisoned = summary.pop("blocks.2.attn")
    assert "at step 0" in poisoned.stepped_up[0]
    assert poisoned.ran[FRAIL, "reference"] <= 2
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
    assert all(state.due("a", index, 0) for index in range(8))
    for step in range(1, 9):
        assert sum(state.due("a", index, step) for index in range(8)) == 2
    assert not state.due("a", 0, -1)


def test_a_layer_that_was_stepped_up_is_checked_again_at_once():
    sampler = TinySampler(poison=2)
    _, session = sample_with(sampler, "int4/int8-balance", guard=Guard(100, 0.025))
    layer = session.summary().layers[2]
    assert [reason[-6:] for reason in layer.stepped_up] == ["step 0", "step 1"]
    assert layer.ran == {
        ("int4/int8-balance", "reference"): 1,
        ("int8/int8-balance", "reference"): 1,
        ("int8/fp16-balance", "reference"): 6,
    }


def test_verdicts_that_come_late_step_up_once():
    state = GuardState(Guard(every=1, limit=0.2))
    state._checks.put("a", 0, torch.tensor(0.5))
    assert state.poll(2) == ["a is stepped up: relative L1 0.50 at step 0"]
    state._checks.put("a", 1, torch.tensor(0.5))  # the old spec was still on at step 1
    assert state.poll(3) == []
    assert state.rungs == {"a": 1}
    state.begin_run()  # step 0 of another run is no old verdict
    state._checks.put("a", 0, torch.tensor(0.5))
    assert len(state.poll(1)) == 1
    assert state.rungs == {"a": 2}


def test_observing_only_leaves_the_spec():
    guard = Guard(every=1, limit=1e-6, step_up=False)
    _, session = sample_with(TinySampler(), "int4/fp8-fast", guard=guard)
    assert session.summary().specs == {"int4/fp8-fast": 32}
    assert all(layer.drift > 0 for layer in session.summary().layers)


@pytest.fixture
def broken_backend(monkeypatch):
    """The twin as somebody else's kernel; the second layer's first call returns NaN."""
    load = backends.load
    theirs = tuple(dataclasses.replace(record, finite=False) for record in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", theirs)
    backends.select.cache_clear()
    calls = []

    def loads(chosen):
        run = load(chosen)

        def broken(*args):
            out, lse = run(*args)
            calls.append(1)
            return (out * torch.nan if len(calls) == 2 else out), lse

        return broken

    monkeypatch.setattr(backends, "load", loads)
    yield
    backends.select.cache_clear()


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


class Queue(TorchDispatchMode):
    """Counts the values of tensors that Python reads, and passes that replace NaN."""

    def __init__(self):
        super().__init__()
        self.reads = self.replaced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        self.replaced += func is torch.ops.aten.nan_to_num.default
        return func(*args, **(kwargs or {}))


class Copy:
    """The event behind a copy that is under way at the first look."""

    def __init__(self):
        self.looks = 0

    def query(self):
        self.looks += 1
        return self.looks > 1

    def synchronize(self):
        self.looks += 2


@pytest.mark.usefixtures("broken_backend")
def test_a_device_is_never_waited_for_and_nan_never_seen(monkeypatch):
    """The GPU's path: NaN becomes 0 on the device, and its flag is read a step or two later."""
    monkeypatch.setattr(finite, "reads_at_once", lambda x: False)
    monkeypatch.setattr(finite, "copy_to_host", lambda values: (values, Copy()))
    waited = []
    monkeypatch.setattr(Copy, "synchronize", lambda self: waited.append(self))
    seen = []

    class Watch:
        def observe(self, event):
            seen.append(event.out.isfinite().all())

    sampler = TinySampler()
    sampler.session = AttentionSession(
        "int8/fp8", guard=Guard(every=1, limit=0.2), observers=[Watch()]
    )
    finish, reads = sampler.session.finish, []
    with Queue() as queue:
        monkeypatch.setattr(
            sampler.session, "finish", lambda: (reads.append((queue.reads, len(waited))), finish())
        )
        out = sampler.sample("a", 0)
    assert reads == [(0, 0)]  # nothing was read or waited for while sampling
    assert waited  # but at its end
    assert len(seen) == 32 and all(seen)
    assert out.isfinite().all()
    layer = sampler.session.summary().layers[1]
    assert layer.non_finite == (0,)
    assert layer.stepped_up[0] == "non-finite output at step 0"
    assert layer.ran == {("int8/fp8", "reference"): 2, ("fp16", "native"): 6}


def test_backends_whose_outputs_are_finite_are_spared_a_pass(monkeypatch):
    monkeypatch.setattr(finite, "reads_at_once", lambda x: False)
    spared = {record.name for record in backends.BACKENDS if record.finite}
    assert spared == {"gluon", "hopper", "triton", "reference"}
    with Queue() as queue:
        sample_with(TinySampler(), "int8/fp8")
    assert queue.replaced == 0
    theirs = tuple(dataclasses.replace(record, finite=False) for record in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", theirs)
    backends.select.cache_clear()
    with Queue() as queue:
        sample_with(TinySampler(), "int8/fp8")
    backends.select.cache_clear()
    assert queue.replaced == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_look_is_one_kernel_and_finds_what_is_not_finite(dtype, monkeypatch):
    monkeypatch.setattr(finite, "reads_at_once", lambda x: False)
    watch, top = finite.FiniteWatch(), torch.finfo(dtype).max
    values = {
        "extremes": (top, -top),
        "infinite": (0.0, torch.inf),
        "negative": (-torch.inf, 0.0),
        "nan": (0.0, torch.nan),
    }
    for name, pair in values.items():
        out = torch.tensor(pair, dtype=dtype)
        with recorded() as found:
            assert watch.look(name, 3, out) is None
        assert found.torch == ["aminmax"]
    assert watch.poll() == [("infinite", 3), ("negative", 3), ("nan", 3)]
    assert watch.poll() == []


@pytest.mark.usefixtures("broken_backend")
def test_strict_raises():
    with pytest.raises(NonFiniteOutput, match=r"blocks\.1\.attn"):
        sample_with(TinySampler(), "int8/fp8", strict=True)


def test_another_plan_starts_afresh():
    _, session = sample_with(TinySampler(poison=2), FRAIL, guard=Guard(every=1, limit=0.2))
    assert session.guard.rungs
    session.plan = "int4/int8"
    assert not session.guard.rungs
    assert copy.deepcopy(session).guard.guard == session.guard.guard


@pytest.mark.parametrize("wrong", [{"every": -1}, {"limit": 0.0}, {"rows": 0}])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match="must"):
        Guard(**wrong)
