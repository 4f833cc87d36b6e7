"""Other signs of the rotation at every step: who decides them, who is told, what stays the same."""

import pytest
import torch

from sage_diffusion import AttentionSession, PrecisionPlan, Rule, attention
from sage_diffusion.attend import finite, guard, session
from sage_diffusion.attend.rows import RowCall
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan.signs import SEEDS, step_seed

SPEC = "int4/fp8-fast"


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 2, 40, 64) for _ in range(3))


class Watch:
    """Keeps what observers may read: seeds by their value, measured candidates."""

    def __init__(self):
        self.seeds, self.measured = [], []

    def observe(self, event):
        self.seeds.append(None if event.sign_seed is None else int(event.sign_seed))
        rows = torch.arange(event.q.shape[2])
        self.measured.append(RowCall.seen(event, rows).run(AttentionSpec.parse(SPEC)))


def sampled(plan, qkv, steps=3, branches=()):
    """Outputs of a run, one call a step, and what an observer saw."""
    watch = Watch()
    found = AttentionSession(plan, observers=(watch,))
    found.start(steps)
    outs = []
    for step in range(steps):
        found.begin_step(step)
        found.set_branch(None, branches)
        outs.append(found.attend("x", *qkv))
    found.finish()
    return outs, watch


def test_every_step_has_signs_of_its_own_and_every_run_the_same(qkv):
    outs, watch = sampled(SPEC, qkv)
    assert watch.seeds == [step_seed(0, step) for step in range(3)]
    for out, seed in zip(outs, watch.seeds, strict=True):
        assert torch.equal(out, attention(*qkv, SPEC, sign_seed=seed))
    assert not torch.equal(outs[0], outs[1])
    again, _ = sampled(SPEC, qkv)
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))
    other, _ = sampled(PrecisionPlan(SPEC, sign_seed=1), qkv)
    assert not torch.equal(outs[0], other[0])


def test_a_plan_without_a_sequence_rotates_alike_at_all_steps(qkv):
    outs, watch = sampled(PrecisionPlan(SPEC, sign_seed=None), qkv)
    assert watch.seeds == [None] * 3
    assert all(torch.equal(out, attention(*qkv, SPEC)) for out in outs)


def test_errors_of_steps_are_independent_and_as_large_as_before(qkv):
    exact = attention(*qkv, "fp16")

    def errors(plan):
        return torch.stack([out - exact for out in sampled(plan, qkv, steps=6)[0]])

    alike, apart = errors(PrecisionPlan(SPEC, sign_seed=None)), errors(SPEC)
    single = apart.square().sum().item()
    assert alike.square().sum().item() == pytest.approx(single, rel=0.1)
    assert alike.sum(0).square().sum() > 5.5 * single  # six times the same
    assert apart.sum(0).square().sum() < 2 * single


def test_both_halves_of_guidance_have_the_same_signs(qkv):
    halves = tuple(torch.cat([x[:1], x[:1]]) for x in qkv)
    apart = PrecisionPlan(SPEC, (Rule("int4/int8", branch="uncond"),))
    for plan in (SPEC, apart):
        outs, watch = sampled(plan, halves, branches=("cond", "uncond"))
        assert watch.seeds == [step_seed(0, step) for step in range(3) for _ in range(2)]
        for step in range(3):  # what candidates would do there is measured with them, too
            assert torch.equal(watch.measured[2 * step], watch.measured[2 * step + 1])
            torch.testing.assert_close(watch.measured[2 * step], outs[step][:1], rtol=0, atol=2e-6)


def test_outside_of_sampling_signs_are_those_of_seed_0(qkv):
    found = AttentionSession(SPEC)
    want = attention(*qkv, SPEC)
    assert torch.equal(found.attend("x", *qkv), want)
    with found.at(0.5, step=2):
        inside = attention(*qkv, SPEC, sign_seed=step_seed(0, 2))
        assert torch.equal(found.attend("x", *qkv), inside)
    assert torch.equal(found.attend("x", *qkv), want)
    found.start(2)
    found.finish()
    assert torch.equal(found.attend("x", *qkv), want)


def test_another_plan_brings_its_own_sequence(qkv):
    found = AttentionSession(SPEC)
    found.start(2)
    found.attend("x", *qkv)
    found.plan = PrecisionPlan(SPEC, sign_seed=9)
    out = found.attend("x", *qkv)
    assert torch.equal(out, attention(*qkv, SPEC, sign_seed=step_seed(9, 0)))


def test_a_captured_graph_is_fed_by_the_step(qkv, monkeypatch):
    seeds = []

    def compute(call, asked, *_):
        seeds.append(call.sign_seed)
        return finished(call, asked, *_)

    finished = session.execution.run
    monkeypatch.setattr(session.execution, "run", compute)
    found = AttentionSession(SPEC)
    with torch.inference_mode():  # as hosts warm up
        found.attend("x", *qkv)
    for module in (finite, guard, session):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    found.start(4)
    found.attend("x", *qkv)
    (warm, captured) = seeds
    assert captured.data_ptr() == warm.data_ptr()
    for step in range(4):  # a replay calls nothing of ours; it reads what is there
        found.begin_step(step)
        assert captured.item() == step_seed(0, step)
    found.finish()
    assert captured.item() == 0


def test_a_graph_that_is_captured_first_is_declined(qkv, monkeypatch):
    for module in (finite, guard, session):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    found = AttentionSession(SPEC)
    found.attend("x", *qkv)
    assert found.summary().declined == {
        "a CUDA graph is captured before any call was made: warm up first": 1
    }
    fixed = AttentionSession(PrecisionPlan(SPEC, sign_seed=None))
    assert torch.equal(fixed.attend("x", *qkv), attention(*qkv, SPEC))


def test_seeds_of_calls(qkv):
    tensor = torch.tensor([5], dtype=torch.int32)
    out = attention(*qkv, SPEC, sign_seed=tensor)
    assert torch.equal(out, attention(*qkv, SPEC, sign_seed=5))
    tensor.fill_(6)
    assert not torch.equal(out, attention(*qkv, SPEC, sign_seed=tensor))
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*qkv, SPEC, sign_seed=tensor), attention(*qkv, SPEC, sign_seed=6))
    assert torch.equal(attention(*qkv, SPEC, sign_seed=0), attention(*qkv, SPEC))
    for wrong in (-1, SEEDS):
        with pytest.raises(ValueError, match=f"below 2.31, got {wrong}"):
            attention(*qkv, SPEC, sign_seed=wrong)
    with pytest.raises(TypeError, match=r"sign_seed must be one int32, got torch\.int64"):
        attention(*qkv, SPEC, sign_seed=torch.tensor([1]))
    with pytest.raises(TypeError, match=r"sign_seed must be one int32, got torch.int32 \(2,\)"):
        attention(*qkv, SPEC, sign_seed=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="sign_seed must be on q's device cpu, got meta"):
        attention(*qkv, SPEC, sign_seed=torch.zeros(1, dtype=torch.int32, device="meta"))


def test_sequences_share_no_seeds():
    seeds = {step_seed(sequence, step) for sequence in range(50) for step in range(100)}
    assert len(seeds) == 5000 and all(0 <= seed < SEEDS for seed in seeds)
    assert step_seed(3, -1) == 0
