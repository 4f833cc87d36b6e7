"""End-to-end ratings by backward passes."""

import numpy as np
import pytest
import torch
from adapt_host import LOOPS, ReplayingSampler, TinySampler, TracingSampler
from tiny_emoji import tiny_emoji

from sage_diffusion.adapt.calibrate import CalibrationError, calibrate
from sage_diffusion.adapt.gradient import cell_effects, measure_gradient, smooth
from sage_diffusion.adapt.planner import make_plan
from sage_diffusion.adapt.sampling import NoGradient
from sage_diffusion.adapt.sensitivity import cell_damage, stage_of
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

SPECS = ("int8/int8", "int4/fp8-fast")


def calibrated(sampler, **options):
    options = {"specs": SPECS, "rows": 16, "share": 1} | options
    return calibrate(sampler, ["a", "bb"], (0, 1), **options)


def test_an_interrupted_stage_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "scores.json"

    def stop(progress):
        if (progress.stage, progress.done) == ("sensitivity", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(TracingSampler(), sensitivity=3, path=path, progress=stop)
    assert len(ScoreTable.load(path).unfinished["levels"]) == 1
    again = TracingSampler()
    resumed = calibrated(again, sensitivity=3, path=path)
    assert again.runs == 2  # the pictures that were left
    assert resumed.unfinished is None
    assert resumed.sensitivity == calibrated(TracingSampler(), sensitivity=3).sensitivity


def test_calibration_takes_gradients_where_there_are_some():
    table = calibrated(TracingSampler(), sensitivity=2)
    found = table.sensitivity
    assert found["method"] == "gradient" and found["peak"] > 0
    assert np.shape(found["effect"]) == (4, 8, 1, 2)
    copy = ScoreTable.from_dict(table.to_dict())
    damage = cell_damage(copy, table.metric("error"))
    assert (damage > 0).all()
    assert damage[..., 1].sum() > 5 * damage[..., 0].sum()
    plan = make_plan(table, budget=0.2, costs=LOOPS)
    assert plan.plan.calibration["predicted"]["psnr_db"] == pytest.approx(plan.quality, abs=0.01)
    groups = calibrated(TracingSampler(), sensitivity=1, method="groups")
    assert "weight" in groups.sensitivity
    with pytest.raises(CalibrationError, match=r"trace\(\) or replay\(\), got TinySampler"):
        calibrated(TinySampler(), sensitivity=1, method="gradient")
    with pytest.raises(CalibrationError, match="auto, gradient or groups, got 'magic'"):
        calibrated(TinySampler(), sensitivity=1, method="magic")


def test_a_cell_that_was_never_seen_weighs_as_its_spec_does():
    table = calibrated(TracingSampler(), sensitivity=1)
    error = table.metric("error")
    full = cell_effects(table, error)
    table.sensitivity["effect"][1][2] = [[None, None]]
    found = cell_effects(table, error)
    assert np.isfinite(found).all() and (found[1, 2] > 0).all()
    same = np.ones(found.shape, bool)
    same[1, 2] = False
    assert np.array_equal(found[same], full[same])


def test_smoothing_keeps_gaps_zeros_and_every_specs_sum():
    effect = np.random.default_rng(0).random((2, 9, 1, 3))
    effect[0, 4], effect[1, 8] = np.nan, 0
    found = smooth(effect)
    assert np.isnan(found[0, 4]).all() and not found[1, 8].any()
    assert np.isfinite(np.delete(found, 4, 1)).all()
    assert np.allclose(np.nansum(found, (0, 1, 2)), np.nansum(effect, (0, 1, 2)))
    assert found[1].std() < effect[1].std()
    assert np.allclose(smooth(np.full((1, 5, 1, 1), 3.0)), 3.0)
    assert np.isnan(smooth(np.full((1, 5, 1, 1), np.nan))).all()
    one = np.full((1, 1, 1, 2), 2.0)
    assert np.allclose(smooth(one), one)


def test_smoothing_takes_noise_away_and_leaves_what_is_none():
    """A layer that is seen only now and then is no noise where all layers agree on when."""
    rng = np.random.default_rng(1)
    steps = np.arange(20)
    smooth_part = rng.normal(size=(6, 1)) + rng.normal(size=(6, 1)) * np.cos(steps / 6)
    level = np.stack([smooth_part - 6, smooth_part], -1)[:, :, None]
    noisy = level + rng.normal(0, 0.7, (6, 20, 1, 1)) + rng.normal(0, 0.1, level.shape)

    def off(logs, truth):
        return (logs - truth - (logs - truth).mean((0, 1, 2))).std()

    assert off(np.log(smooth(np.exp(noisy))), level) < 0.6 * off(noisy, level)
    rough = level + np.array([3.0, 0.0])[steps % 2][:, None, None]
    assert off(np.log(smooth(np.exp(rough))), rough) < 0.2


def test_a_host_without_a_graph_is_refused():
    sampler = TracingSampler()
    table = calibrated(sampler, sensitivity=0)
    sampler.trace = lambda pictures: sampler.sample(*pictures[0])
    with pytest.raises(NoGradient, match=r"blocks.0.attn must carry a gradient"):
        measure_gradient(sampler, table, [("a", 0)])
    assert not sampler.session.observers


def test_where_memory_is_short_groups_are_run_if_the_caller_left_it_open():
    def replay(picture, use):
        raise NoGradient("one step needs about 31.2 GiB, 8.0 GiB are free")

    def short(**options):
        sampler = ReplayingSampler(layers=2, steps=3)
        sampler.replay = replay
        return calibrated(sampler, sensitivity=1, **options)

    with pytest.raises(NoGradient, match=r"31\.2 GiB, 8\.0 GiB are free"):
        short(method="gradient")
    table = ScoreTable.from_dict(short().to_dict())
    assert table.sensitivity["method"] == "groups"
    assert stage_of(table).endswith(
        "no gradients: one step needs about 31.2 GiB, 8.0 GiB are free)"
    )
    assert "no gradients" not in stage_of(short(method="groups"))
    by_gradients = calibrated(ReplayingSampler(layers=2, steps=3), sensitivity=1)
    assert by_gradients.sensitivity["method"] == "gradient"


def test_a_pipeline_is_differentiated_as_it_samples():
    pipe = tiny_emoji()
    sampler = PipelineSampler(pipe, {"num_inference_steps": 3})
    assert sampler.pictures([0, 2], 5) == [(0, 5), (2, 6)]
    asked = [p.requires_grad for p in pipe.transformer.parameters()]
    traced = sampler.trace([(2, 6)])
    assert traced.requires_grad
    assert [p.requires_grad for p in pipe.transformer.parameters()] == asked
    torch.testing.assert_close(traced.detach(), sampler.sample(2, 6), atol=1e-5, rtol=1e-5)
    table = calibrate(sampler, [[0], [1]], specs=SPECS, rows=8, sensitivity=2)
    assert table.branches == ["cond", "uncond"]
    assert np.shape(table.sensitivity["effect"]) == (2, 3, 2, 2)


def test_pictures_of_one_graph_are_rated_as_apart():
    """Three pictures, two to a graph: the last one is alone."""
    samplers = [PipelineSampler(tiny_emoji(), {"num_inference_steps": 3}, batch=b) for b in (1, 2)]
    table = calibrate(samplers[0], [[0, 2], [1, 0]], specs=SPECS, rows=8)
    pairs, told = [(0, 5), (2, 6), (1, 9)], []
    apart, together = (
        measure_gradient(sampler, table, pairs, progress=lambda *p: told.append(p[1:]))
        for sampler in samplers
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 3), (2, 3), (3, 3)]
    assert np.allclose(together["effect"], apart["effect"], rtol=0.01)
    assert np.allclose(together["factor"], apart["factor"], rtol=0.01)
    assert together["peak"] == pytest.approx(apart["peak"], rel=1e-4)
