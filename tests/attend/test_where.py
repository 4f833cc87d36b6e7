"""Where sampling stands, as a value of its own."""

import pytest

from sage_diffusion import AttentionSession, PrecisionPlan
from sage_diffusion.attend.where import Where


def test_a_run_from_its_start_to_its_end():
    start = Where().started(5, (4.0, 3.0, 2.0, 1.0, 0.5))
    third = start.at_step(2, 2.0)
    assert (third.step, third.sigma, third.progress) == (2, 2.0, 0.5)
    assert third.finished() == Where(steps=5, sigma=2.0, schedule=start.schedule)
    assert start.step == -1  # a value: nobody's view of the run changes under him


def test_progress_is_by_sigma_in_a_plan_with_a_schedule():
    plan = PrecisionPlan("int8/fp8", schedule=(10.0, 5.0, 0.0))
    session = AttentionSession(plan)
    session.start(4, (10.0, 7.5, 5.0, 0.0))
    session.begin_step(1, 7.5)
    assert session.where.progress == pytest.approx(0.25)
    session.begin_step(1)
    assert session.where.progress == pytest.approx(1 / 3)
    assert Where().started(4, ()).at_step(1, 7.5, progress=0.25).progress == 0.25


@pytest.mark.parametrize(
    ("steps", "schedule", "message"),
    [(0, (), "steps must be at least 1, got 0"), (3, (1.0,), r"one sigma a step \(3\), got 1")],
)
def test_what_is_no_run(steps, schedule, message):
    with pytest.raises(ValueError, match=message):
        Where().started(steps, schedule)


def test_a_batch_has_parts_only_while_no_branch_is_named():
    both = Where(chunks=("uncond", "cond"))
    assert both.parts == ("uncond", "cond")
    assert Where(chunks=both.chunks, branch="cond").parts == ()


def test_a_block_at_some_progress_leaves_everything_as_it_was():
    session = AttentionSession("int8/fp8")
    session.start(10)
    session.begin_step(3)
    before = session.where
    with session.at(0.9, step=7, branch="cond"):
        assert (session.where.progress, session.where.step) == (0.9, 7)
        session.set_branch(None, ("cond", "uncond"))
    assert session.where is before


def test_a_host_that_keeps_a_call_is_not_at_fault():
    session = AttentionSession("int8/fp8", strict=True)
    layer = session.layer("blocks.0")
    layer.keep()
    layer.keep("the model asks for full precision")
    (found,) = session.summary().layers
    assert found.ran == {("fp16", "native"): 1}
    assert found.declined == {"the model asks for full precision": 1}
