"""Backward passes of single pictures, against running what they rate."""

import numpy as np
import torch
from adapt_host import ReplayingSampler, TinySampler, TracingSampler

from sage_diffusion.adapt import backward
from sage_diffusion.adapt.backward import Rating
from sage_diffusion.adapt.calibrate import calibrate
from sage_diffusion.adapt.sampling import planned
from sage_diffusion.attend.rows import RowCall
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan, Rule

SPECS = ("int8/int8", "int4/fp8-fast")


def calibrated(sampler):
    return calibrate(sampler, ["a", "bb"], (0, 1), specs=SPECS, rows=16, share=1)


def rated(sampler, table, rate):
    """What the calls of picture ("a", 0) do, ``[P, L, S, B, K]``."""
    specs = [AttentionSpec.parse(name) for name in table.specs]
    rating = Rating(sampler.session, table, specs, 2, torch.Generator().manual_seed(0))
    rate(rating)
    return rating.found[0]


class ErrorsOf:
    """Observer that keeps a spec's error in each call."""

    def __init__(self, spec):
        self.spec, self.errors = AttentionSpec.parse(spec), []

    def observe(self, event):
        rows = torch.arange(event.q.shape[2])
        found = RowCall.seen(event, rows).run(self.spec) - event.out
        self.errors.append(found.flatten())


def test_errors_of_a_run_are_those_of_its_steps_signs():
    """Neighbouring steps of a sequence err less alike than with one rotation for all."""

    def correlation(sign_seed):
        sampler = TracingSampler(layers=1, steps=6)
        watcher = ErrorsOf("int4/fp8-fast")
        sampler.session.observers.append(watcher)
        sampler.session.plan = PrecisionPlan("fp16", sign_seed=sign_seed)
        sampler.sample("a", 0)
        errors = torch.stack(watcher.errors)
        return np.corrcoef(errors.double().numpy())[0, 1:].mean()

    alike, apart = correlation(None), correlation(0)
    assert alike > 0.1 and abs(apart) < 0.05


def test_a_cells_effect_is_what_running_it_in_that_spec_does():
    sampler = TracingSampler(layers=2, steps=3)
    table = calibrated(sampler)
    specs = [AttentionSpec.parse(name) for name in SPECS]
    rating = Rating(sampler.session, table, specs, 48, torch.Generator().manual_seed(0))
    rating.trace(sampler, [("a", 0)])
    (effects,), final = rating.found, rating.final
    predicted = np.square(effects).mean(0)[:, :, 0]
    for i, layer in enumerate(sampler.names):
        for step in range(3):
            start, end = step / 2 - 0.1, step / 2 + 0.1
            rule = Rule(SPECS[0], layer, max(start, 0.0), min(end, 1.0))
            with planned(sampler.session, PrecisionPlan("fp16", (rule,))), torch.no_grad():
                changed = sampler.sample("a", 0)
            measured = float((changed - final).square().sum())
            assert abs(10 * np.log10(predicted[i, step, 0] / measured)) < 2.5


def test_calls_made_anew_say_the_same_as_the_graph_of_the_run():
    table = calibrated(TinySampler(layers=2, steps=4))
    tracing, replaying = TracingSampler(layers=2, steps=4), ReplayingSampler(layers=2, steps=4)
    traced = rated(tracing, table, lambda rating: rating.trace(tracing, [("a", 0)]))
    found = rated(replaying, table, lambda rating: replaying.replay(("a", 0), rating.replay))
    assert np.isfinite(traced).all() and traced.any()
    assert np.allclose(found, traced, rtol=1e-3, atol=1e-5 * np.abs(traced).max())


def test_errors_are_made_of_some_rows_at_a_time(monkeypatch):
    sampler = TracingSampler(layers=1, steps=2)
    table = calibrated(sampler)

    def of_all_rows(rating):
        rating.trace(sampler, [("a", 0)])

    whole = rated(sampler, table, of_all_rows)
    monkeypatch.setattr(backward, "_MAX_SCORES", 2 * 2 * 40 * 7)  # seven rows
    assert np.allclose(rated(sampler, table, of_all_rows), whole, rtol=1e-4)
