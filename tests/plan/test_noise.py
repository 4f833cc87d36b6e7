"""What the numbers of a schedule mean: plans that were made under one sampler, met by another."""

from __future__ import annotations

import json
import math

import pytest

from sage_diffusion import AttentionSession, PlanError, PrecisionPlan, Rule
from sage_diffusion.plan.edit import merge_plans, remap_plan
from sage_diffusion.plan.noise import NoiseScale

ALPHAS = [math.prod(1 - (0.0001 + 0.0199 * i / 999) for i in range(t + 1)) for t in range(1000)]
TIMESTEPS = NoiseScale("timesteps", ALPHAS)
SIGMAS = NoiseScale("sigmas", ALPHAS)
FLOW = NoiseScale("flow-sigmas", timesteps=1000)


def test_one_share_of_noise_has_a_number_in_every_unit():
    for t in (0, 1, 20, 500.5, 999):
        share = TIMESTEPS.share(t, "timesteps")
        sigma = share / (1 - share)
        assert SIGMAS.share(sigma, "sigmas") == pytest.approx(share)
        assert FLOW.share(share, "flow-sigmas") == share
        assert FLOW.share(1000 * share, "timesteps") == pytest.approx(share)
        assert SIGMAS.share(-2 * math.log(sigma), "log-snr") == pytest.approx(share)
    assert [TIMESTEPS.share(v, "timesteps") for v in (-5, 2000)] == [
        TIMESTEPS.share(v, "timesteps") for v in (0, 999)
    ]
    assert [FLOW.share(v, "log-snr") for v in (-math.inf, math.inf)] == pytest.approx([1, 0])
    assert NoiseScale("sigmas").share(500, "timesteps") is None


@pytest.mark.parametrize(
    ("schedule", "host", "unit"),
    [
        ((900, 600, 300, 1), TIMESTEPS, "timesteps"),
        ((900, 600, 300, 1), FLOW, "timesteps"),
        ((999.0, 750.5, 499.5), SIGMAS, "timesteps"),
        ((31, 20, 10), NoiseScale(), "timesteps"),
        ((157.4, 12.3, 2.1, 0.02), TIMESTEPS, "sigmas"),  # Euler over SD's linear betas
        ((700.0, 60.5, 8.2, 0.9, 0.002), NoiseScale(), "sigmas"),  # Stable Video Diffusion's
        ((14.6, 3.0, 0.03), SIGMAS, "sigmas"),
        ((14.6, 3.0, 0.03), FLOW, "sigmas"),
        ((1.0, 0.8, 0.1), FLOW, "flow-sigmas"),
        ((1.0, 0.8, 0.1), SIGMAS, "sigmas"),
        ((1.0, 0.8, 0.1), TIMESTEPS, None),
    ],
)
def test_units_of_old_plans_are_told_by_their_values(schedule, host, unit):
    assert host.unit_of(schedule, None) == unit
    assert host.unit_of(schedule, "log-snr") == "log-snr"


def run(plan, noise, schedule):
    """Progress of each step of a run."""
    session = AttentionSession(plan)
    session.start(len(schedule), schedule, noise)
    found = []
    for step, value in enumerate(schedule):
        session.begin_step(step, value)
        found.append(session.where.progress)
    return found, session


def test_schedules_that_can_t_be_compared_are_counted_in_steps_with_one_warning(caplog):
    plan = PrecisionPlan("fp16", schedule=(1.0, 0.8, 0.1))
    found, session = run(plan, TIMESTEPS, (800, 400, 0))
    assert found == [0.0, 0.5, 1.0]
    [warning] = session.summary().warnings
    assert "a unit that it does not name" in warning and "remap the plan" in warning
    assert warning in caplog.text and warning in str(session.summary())
    found, session = run(
        PrecisionPlan("fp16", schedule=(900, 500, 0), schedule_unit="timesteps"),
        NoiseScale("sigmas"),
        (14.0, 2.0, 0.5, 0.1),
    )
    assert found == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert len(session.summary().warnings) == 1


def test_the_same_unit_is_compared_as_it_is():
    for noise in (None, NoiseScale(), SIGMAS, NoiseScale("sigmas")):
        plan = PrecisionPlan("fp16", schedule=(10.0, 6.0, 2.0))
        assert run(plan, noise, (10.0, 8.0, 2.0))[0] == [0.0, 0.25, 1.0]
    plan = PrecisionPlan("fp16", schedule=(-4.0, 0.0, 4.0), schedule_unit="log-snr")
    assert [plan.remap(x) for x in (-5, -2, 4)] == [0.0, 0.25, 1.0]
    found, _ = run(plan, FLOW, (0.9, 0.5, 0.1))
    assert found == pytest.approx([0, 0.5, 1], abs=0.02)


def test_a_plan_assigned_in_mid_run_is_looked_up_too():
    session = AttentionSession("fp16")
    session.start(3, (900.0, 500.0, 10.0), TIMESTEPS)
    session.plan = PrecisionPlan("fp16", schedule=(1.0, 0.9, 0.01), schedule_unit="flow-sigmas")
    session.begin_step(1, 500.0)
    assert session.where.progress == pytest.approx(
        0.5 + 0.5 * (0.9 - TIMESTEPS.share(500, "timesteps")) / 0.89
    )


def test_plans_keep_their_unit_in_json():
    plan = PrecisionPlan("fp16", schedule=(900, 1), schedule_unit="timesteps")
    assert json.loads(plan.to_json())["schedule_unit"] == "timesteps"
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    old = PrecisionPlan("fp16", schedule=(900, 1))
    assert "schedule_unit" not in json.loads(old.to_json())
    assert PrecisionPlan.from_json(old.to_json()).schedule_unit is None
    with pytest.raises(PlanError, match="schedule_unit must be one of timesteps, sigmas"):
        PrecisionPlan.from_json(plan.to_json().replace('"timesteps"', '"kelvin"'))
    with pytest.raises(PlanError, match="strictly ascending"):
        PrecisionPlan("fp16", schedule=(4, -4), schedule_unit="log-snr")


def test_moving_and_merging_mind_the_unit():
    flow = PrecisionPlan(
        "fp16",
        (Rule("int8/fp8", start=0.5),),
        schedule=(1.0, 0.5, 0.1),
        schedule_unit="flow-sigmas",
    )
    moved = remap_plan(flow, (9.0, 1.0, 0.1), "sigmas")
    assert moved.schedule_unit == "sigmas" and moved.rules[0].start == 0.25  # from the second step
    rising = remap_plan(flow, (-4.0, 0.0, 4.0), "log-snr")
    assert rising.schedule == (-4.0, 0.0, 4.0)
    with pytest.raises(PlanError, match="without the model's noise schedule"):
        remap_plan(flow, (900, 500, 1), "timesteps")
    with pytest.raises(PlanError, match="different units"):
        merge_plans(flow, moved)
