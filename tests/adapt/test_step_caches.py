"""Caches that skip whole steps: what they skip is unknown to a calibration, not zero."""

import numpy as np
from adapt_host import LOOPS, TinySampler

from sage_diffusion.adapt.calibrate import calibrate
from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.planner import make_plan

SPECS = ("int8/fp8-fast", "int4/fp8-fast")


def test_a_cache_that_skips_whole_steps():
    """As TeaCache and EasyCache do: the session hears nothing of these steps."""
    cached = (2, 3, 5, 7)
    table = calibrate(
        TinySampler(cached=cached), ["a", "bb"], specs=SPECS, share=1, rows=16, bar_db=1e9
    )
    skipped = np.isin(np.arange(8), cached)
    assert (table.measured == ~skipped[:, None]).all()
    assert np.isnan(table.work[:, skipped]).all()
    assert np.isnan(table.metric("error")[:, skipped]).all()
    assert table.exists.all()
    assert (table.steps, table.schedule) == (8, [1 - i / 8 for i in range(8)])
    whole = calibrate(TinySampler(), ["a", "bb"], specs=SPECS, share=1, rows=16)
    assert (table.filled_work() == whole.filled_work()).all()
    error = complete(table).error[:, skipped]
    assert np.abs(10 * np.log10(error / whole.metric("error")[:, skipped])).mean() < 3
    assert len(make_plan(table, budget=0.24, costs=LOOPS).plan.schedule) == 8


def test_the_steps_of_a_session_go_on_after_a_skipped_one():
    seen = []

    class Watch:
        def observe(self, event):
            seen.append((event.step, event.progress))

    sampler = TinySampler(layers=1, cached=(1, 2, 7))
    sampler.session.observers.append(Watch())
    sampler.sample("a", 0)
    assert seen == [(step, step / 7) for step in (0, 3, 4, 5, 6)]
    assert sampler.session.where.step == -1
