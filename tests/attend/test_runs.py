"""What a run says of its host at its end: sampling that stood still, a plan that did nothing."""

import pytest
import torch

from sage_diffusion import AttentionSession, PrecisionPlan, Rule
from sage_diffusion.attend.layer import AttentionRefused

Q = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def run(session, calls, schedule=()):
    """``calls``: of the model at each step, two layers each."""
    session.start(len(calls), schedule)
    for step, count in enumerate(calls):
        session.begin_step(step)
        for _ in range(count):
            for name in ("a", "b"):
                session.attend(name, Q, Q, Q)
    session.finish()
    return session.summary().warnings


# ---------------------------------------------------------------------- sampling that stood still
@pytest.mark.parametrize(
    "calls",
    [
        [1] * 20,
        [2] * 4,  # a sampler of second order, or two branches
        [100] * 4,  # a picture in tiles
        [1],
        [40],
        [3, 0, 0, 1],  # a step cache
        [60] + [30] * 7,
    ],
)
def test_samplers_of_all_kinds_are_left_in_peace(calls):
    assert run(AttentionSession("int8/fp16"), calls) == ()


@pytest.mark.parametrize("calls", [[20] + [0] * 19, [0, 4, 0, 0], [3, 0]])
def test_a_run_that_never_moved_is_a_warning(calls, caplog):
    session = AttentionSession("int8/fp16")
    (warning,) = run(session, calls)
    step = next(i for i, count in enumerate(calls) if count)
    assert f"never left step {step} of {len(calls)} although the model" in warning
    assert "begin_step" in warning
    assert f"WARNING: {warning}" in str(session.summary())
    assert warning in session.summary().to_dict()["warnings"]
    run(session, calls)
    assert caplog.text.count("never left step") == 1


@pytest.mark.parametrize("calls", [[1, 1, 90, 1], [100], [500, 2, 2]])
def test_a_model_called_too_often_at_one_step_is_a_warning(calls):
    (warning,) = run(AttentionSession("int8/fp16"), calls)
    assert f"called {max(calls)} times at one step" in warning


def test_a_sigma_that_moves_within_a_step_is_a_sampler_of_its_own_mind():
    """As dpm_adaptive, whose steps are not those of the schedule."""
    session = AttentionSession("int8/fp16")
    session.start(2)
    for i in range(200):
        session.begin_step(0, sigma=1.0 - i / 400)
        session.attend("a", Q, Q, Q)
    session.begin_step(1, sigma=0.4)
    session.attend("a", Q, Q, Q)
    session.finish()
    assert session.summary().warnings == ()


# ---------------------------------------------------------------------- a plan that did nothing
CAUSES = {
    "keys": (
        Rule("int8/fp16", min_tokens=128),
        "min_tokens is 128, and the longest call has 16 keys",
    ),
    "names": (Rule("int8/fp16", "single.*"), "its rules name 'single.*', the layers are a, b"),
    "time": (
        Rule("int8/fp16", start=0.2, end=0.3),
        "none of them where the plan quantizes, from 0.20 to 0.30",
    ),
    "branch": (Rule("int8/fp16", branch="cond"), "name a branch of guidance"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_plan_that_quantized_nothing_says_why(cause):
    rule, words = CAUSES[cause]
    plan = PrecisionPlan("fp16", (rule,))
    (warning,) = run(AttentionSession(plan), [1, 1])
    assert warning.startswith("nothing was quantized in 4 calls: ")
    assert words in warning
    with pytest.raises(AttentionRefused, match="nothing was quantized"):
        run(AttentionSession(plan, strict=True), [1, 1])


def test_rules_that_stand_first_are_a_cause():
    plan = PrecisionPlan("int8/fp16", (Rule("fp16", "a"), Rule("fp16", "b")))
    (warning,) = run(AttentionSession(plan), [1, 1])
    assert "rules that stand first" in warning


def test_declined_calls_are_a_cause():
    session = AttentionSession("int8/fp16", backend="triton")
    (warning,) = run(session, [1, 1])
    assert "in 4 calls: needs a CUDA or ROCm device" in warning
    assert "(int8/fp16 on triton)" in warning


def test_no_call_at_all_is_a_cause_and_the_counts_of_other_runs_do_not_hide_it():
    session = AttentionSession("int8/fp16")
    assert run(session, [1, 1]) == ()
    assert "no attention call was intercepted" in run(session, [0, 0])[0]


@pytest.mark.parametrize("plan", ["fp16", PrecisionPlan("fp16", (Rule("fp16", "a"),))])
def test_a_plan_that_quantizes_nothing_is_as_wanted(plan):
    assert run(AttentionSession(plan, strict=True), [1, 1]) == ()


def test_a_session_that_shares_its_run_is_not_judged_alone():
    session = AttentionSession("int8/fp16", strict=True)
    session.start(2)
    session.finish(judge=False)
    assert session.summary().warnings == ()
