"""``benchmarks.calibration`` on little."""

import pytest
from from_file import from_file
from paced import at_most

calibration = from_file("benchmarks/calibration.py")


def test_what_is_measured_by_default_is_measured_in_one_pass():
    sampler = calibration.sampler_of(16)
    calls = []
    sample = sampler.sample
    sampler.sample = lambda *args: calls.append(args) or sample(*args)
    found = calibration.overhead(sampler)
    assert len(calls) == 1 + 2 + 2  # warm-up, plain, calibrated: nothing was measured twice
    assert found["overhead"] == pytest.approx(found["calibrated"] / found["plain"] - 1)
    with pytest.raises(ValueError, match="square number, got 15"):
        calibration.sampler_of(15)


def test_plans_of_made_up_tables():
    for share in (1.0, 0.25):
        table = calibration.table_of(8, 12, share)
        assert table.measured.mean() == share
        found = calibration.planning(8, 12, share)
        assert found["specs"] == 6 and found["gap"] < 1e-3 and found["seconds"] > 0
    alone, together = (calibration.planning(8, 12, 1.0, correlated) for correlated in (False, True))
    assert alone["gap"] < 1e-3 < together["gap"] < 0.5  # no knapsack: bounded by its relaxation


def test_completing_is_timed_by_itself():
    with at_most(10_000):
        found = calibration.completing(4, 10, 2, 2, 0.5)
    assert found["seconds"] > 0 and 0 <= found["bytes"] < 2**28
