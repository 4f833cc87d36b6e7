"""Calibration of a tiny random transformer: live, resumable, without loss."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from adapt_host import LOOPS, TinySampler

from sage_diffusion.adapt.calibrate import CalibrationError, Calibrator, calibrate
from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.planner import make_plan, plan_index
from sage_diffusion.adapt.sensitivity import Groups, cell_weights, stage_of
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError
from sage_diffusion.attend.rows import RowCall, measure
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan

SPECS = ("int8/fp8-fast", "int4/fp8-fast")


def run(sampler, **options):
    options = {"specs": SPECS, "sensitivity": 0, "rows": 16} | options
    return calibrate(sampler, options.pop("prompts", ["a", "bb"]), **options)


def test_every_row_and_column_has_a_measured_cell():
    for layers, steps in ((4, 12), (2, 8), (6, 10), (1, 5)):
        table = run(TinySampler(layers=layers, steps=steps), bar_db=1e9)
        measured = table.measured
        assert measured.any(1).all()
        assert measured.any(0).all()
        if layers >= 4 and steps % 4 == 0:
            assert measured.mean() == 0.25
    assert table.layers == ["blocks.0.attn"]
    assert table.schedule == [1, 0.8, 0.6, 0.4, 0.2] or np.allclose(
        table.schedule, [1, 0.8, 0.6, 0.4, 0.2]
    )


def test_scores_have_mean_and_spread_and_outliers():
    table = run(TinySampler(), share=1, seeds=(0, 1))
    assert (table.count == 4).all()
    # Both have the same FP8 P V: where its error is all there is, the two are even, and rounding
    # that differs between processors decides.
    score, error = table.metric("score"), table.metric("error")
    assert (score[..., 0] > score[..., 1] - 1e-4).all()
    assert (score[..., 0] > score[..., 1] + 1e-4).mean() > 0.9
    assert error[..., 1].mean() > 5 * error[..., 0].mean()
    assert (table.spread("error") > 0).all()
    assert (table.outliers > 2).all()
    assert (table.filled_work() == 2 * 2 * 40 * 40 * 32).all()
    assert len(table.runs) == 4


def test_a_sampling_run_is_not_changed_by_watching():
    sampler = TinySampler()
    before = sampler.sample("a", 0)
    run(sampler)
    assert (sampler.sample("a", 0) == before).all()
    assert not sampler.session.observers


def test_all_calls_of_a_cell_count_by_their_elements():
    """Text, a reference and the picture, one call each: the last is most of it."""
    spec = AttentionSpec.parse("int4/fp8-fast")
    session = AttentionSession(PrecisionPlan("fp16", sign_seed=None))
    watcher = Calibrator([spec], session, share=1, rows=80, seed=0)
    session.observers.append(watcher)
    session.start(1, [1.0])
    session.begin_step(0, 1.0)
    random = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 120, 32, generator=random)
    parts, alone = [(8, 8), (32, 40), (80, 120)], []
    for queries, keys in parts:
        q = torch.randn(1, 2, queries, 32, generator=random)
        q *= 4 if queries == 8 else 1  # text errs more
        seen = q, k[:, :, :keys], v[:, :, :keys]
        session.layer("single.00")(*seen)
        alone.append(measure(RowCall(*seen, torch.arange(queries)), [spec])[0].double())
    table = ScoreTable((str(spec),), 1)
    watcher.store(table)
    assert alone[0][2] > 1.5 * alone[2][2]
    shares = torch.tensor([8, 32, 80]).double() / 120
    assert np.allclose(table.mean[0, 0, 0, 0], shares @ torch.stack(alone), rtol=1e-4)
    assert table.count.sum() == 1 and table.calls.sum() == 3
    assert table.filled_work().sum() == 2 * 32 * sum(q * k for q, k in parts)
    assert table.tokens == {"single.00": (80, 120)}


def test_a_poisoned_layer_is_found():
    specs = [spec + "-balance" for spec in SPECS]  # balance heals the layer
    table = run(TinySampler(poison=2), share=1, specs=specs)
    by_layer = np.nanmean(table.metric("score")[..., 1], (1, 2))
    assert by_layer.argmin() == 2
    assert by_layer[2] < 0.9 * np.delete(by_layer, 2).min()
    assert table.outliers[..., 1].mean((1, 2)).argmax() == 2


class Interrupted(TinySampler):
    """Ctrl-C in the middle of a run, once some of its cells are measured."""

    def __init__(self, run, **options):
        super().__init__(**options)
        self.last = run
        self.session.observers.append(self)

    def observe(self, event):
        if self.runs == self.last and event.step == self.steps // 2:
            raise KeyboardInterrupt


def test_interrupted_and_resumed_is_the_same_as_never_interrupted(tmp_path):
    path = tmp_path / "scores.json"
    options = {"prompts": ["a", "bb", "ccc"], "path": path, "share": 0.5, "bar_db": 1e9}
    sampler = Interrupted(3)
    with pytest.raises(KeyboardInterrupt):
        run(sampler, **options)
    assert ScoreTable.load(path).runs == [("a", 0), ("bb", 0)]
    assert sampler.session.observers == [sampler]
    again = TinySampler()
    seen = []
    resumed = run(again, progress=lambda p: seen.append((p.stage, p.done, p.total)), **options)
    assert again.runs == 1  # the two finished runs were not repeated
    assert seen[0] == ("measure", 1, 3)
    straight = run(TinySampler(), **options | {"path": None})
    assert np.allclose(resumed.mean, straight.mean, rtol=1e-5, equal_nan=True)
    assert (resumed.count == straight.count).all()
    assert ScoreTable.load(path).to_dict() == resumed.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_the_same_sampler_goes_on_after_an_interruption(tmp_path):
    options = {"path": tmp_path / "scores.json", "share": 1}
    sampler = Interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        run(sampler, **options)
    resumed = run(sampler, **options)
    straight = run(TinySampler(), **options | {"path": None})
    assert np.allclose(resumed.mean, straight.mean, rtol=1e-5)
    assert resumed.runs == straight.runs


def test_an_interrupted_end_to_end_stage_goes_on(tmp_path):
    options = {"path": tmp_path / "scores.json", "share": 1, "sensitivity": 2}
    options["prompts"] = ["a", "bb"]
    sampler = Interrupted(9, layers=2, steps=4)  # two runs to measure, one reference
    with pytest.raises(KeyboardInterrupt):
        run(sampler, **options)
    stored = ScoreTable.load(options["path"])
    assert stored.sensitivity is None
    assert len(stored.unfinished["runs"]) == 5
    again = TinySampler(layers=2, steps=4)
    resumed = run(again, **options)
    assert resumed.unfinished is None
    straight = TinySampler(layers=2, steps=4)
    expected = run(straight, **options | {"path": None}).sensitivity
    for key in ("weight", "layer_effect", "factor", "peak"):  # files keep six digits
        assert np.allclose(resumed.sensitivity[key], expected[key], rtol=1e-4)
    assert again.runs == straight.runs - 2 - 5
    stored.save(options["path"])  # asked for fewer pictures: what was begun is of no use
    runs = again.runs
    assert run(again, **options | {"sensitivity": 1}).sensitivity is not None
    assert again.runs == runs + (straight.runs - 2) // 2


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_file_is_never_half_written(tmp_path, monkeypatch, failure, at):
    path = tmp_path / "scores.json"
    options = {"prompts": ["a", "bb", "ccc"], "path": path, "share": 0.5, "bar_db": 1e9}
    real, calls = getattr(os, at), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise failure
        return real(*arguments)

    monkeypatch.setattr(os, at, fails)
    with pytest.raises(type(failure)):
        run(TinySampler(), **options)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]
    assert ScoreTable.load(path).runs == [("a", 0)]  # whole, as the first run left it
    monkeypatch.undo()
    resumed = run(TinySampler(), **options)
    straight = run(TinySampler(), **options | {"path": None})
    assert np.allclose(resumed.mean, straight.mean, rtol=1e-5, equal_nan=True)


def test_doubtful_cells_are_measured_too():
    table = run(TinySampler(layers=6, steps=12), bar_db=1e-6)
    assert table.extra
    assert table.measured.mean() > 0.5
    assert len(table.extra_runs) == 2


def test_tables_of_other_models_and_settings_are_refused(tmp_path):
    path = tmp_path / "scores.json"
    run(TinySampler(), path=path)
    kept = path.read_bytes()
    other = TinySampler(layers=5)
    other.attach()
    with pytest.raises(TableError, match=r"another model: 1 layers here.*blocks\.4\.attn"):
        run(other, path=path)
    with pytest.raises(TableError, match=r"other specs: specs \['int8/fp8-fast', .*, now \['int8"):
        run(TinySampler(), path=path, specs=("int8/int8",))
    with pytest.raises(TableError, match="other settings: rows 16, now 8; delete"):
        run(TinySampler(), path=path, rows=8)
    with pytest.raises(TableError, match="other settings: sign_seed 0, now 3; delete"):
        run(TinySampler(), path=path, sign_seed=3)
    guided = TinySampler()
    guided.settings = {"guidance": 3.0}
    with pytest.raises(TableError, match=r"other settings: guidance None, now 3\.0; delete"):
        run(guided, path=path)
    with pytest.raises(CalibrationError, match="had 9 steps, the table is of 8"):
        run(TinySampler(steps=9), path=path, prompts=["a", "bb", "ccc"])
    named = TinySampler()
    named.model = "OtherDiT"
    with pytest.raises(TableError, match="made for TinyDiT, this is OtherDiT"):
        run(named, path=path)
    assert path.read_bytes() == kept


def test_tables_of_before_the_signs_are_continued(tmp_path):
    path = tmp_path / "scores.json"
    table = run(TinySampler(), path=path, sign_seed=None)
    data = table.to_dict()
    assert data["settings"].pop("sign_seed") is None
    path.write_text(json.dumps(data))
    again = run(TinySampler(), path=path, sign_seed=None)
    assert again.runs == table.runs and again.unquantized.sign_seed is None


@pytest.mark.parametrize("method", ["groups", "auto"])
def test_candidates_are_measured_with_the_signs_of_their_sequence(method):
    """Every call of every run, sensitivity's too, and what comes of it says so."""

    class Watched(TinySampler):
        def sample(self, prompt, seed):
            seeds.add(self.session.plan.sign_seed)
            return super().sample(prompt, seed)

    seeds = set()
    table = run(Watched(layers=2), sign_seed=5, sensitivity=2, method=method)
    assert seeds == {5} and table.settings["sign_seed"] == 5
    fixed = run(TinySampler(layers=2), sign_seed=None)
    assert run(TinySampler(layers=2)).unquantized.sign_seed == 0 and not fixed.unquantized.sign_seed
    assert not np.array_equal(fixed.mean, run(TinySampler(layers=2), sign_seed=5).mean)


def test_bad_arguments():
    for prompts in (["a"], ["a", "a"]):
        with pytest.raises(CalibrationError, match="at least 2 different prompts, got 1"):
            run(TinySampler(), prompts=prompts)
    with pytest.raises(CalibrationError, match="no attention call was seen"):
        run(TinySampler(layers=0))
    with pytest.raises(CalibrationError, match="nothing to calibrate"):
        run(TinySampler(), specs=("fp16",))
    with pytest.raises(CalibrationError, match="share must be"):
        run(TinySampler(), share=0)


def test_sensitivity_predicts_mixed_runs():
    sampler = TinySampler(layers=3, steps=6)
    table = run(sampler, share=1, sensitivity=2)
    found = table.sensitivity
    assert found["spec"] == "int4/fp8-fast"
    assert np.shape(found["weight"]) == (3, 5, 1)
    assert found["method"] == "groups" and found["fit"]["checked_db"] < 3
    assert (cell_weights(table) > 0).all()
    for check in found["checks"]:
        assert abs(10 * np.log10(check["predicted"] / check["measured"])) < 3
    copy = ScoreTable.from_dict(table.to_dict())
    assert np.array_equal(cell_weights(copy), cell_weights(table))


def test_further_seeds_are_taken_and_another_count_is_run_again(tmp_path):
    options = {"path": tmp_path / "scores.json", "share": 1, "specs": SPECS[1:]}
    seen = []

    class Listed(TinySampler):
        def sample(self, prompt, seed):
            if self.session.plan.default.quantized:  # the uniform run, one of each pair
                seen.append((prompt, seed))
            return super().sample(prompt, seed)

    sampler = Listed(layers=1, steps=4)
    assert stage_of(run(sampler, **options)) == "the local error of attention"
    table = run(sampler, sensitivity=3, **options)
    assert seen == [("a", 0), ("bb", 0), ("a", 1)]
    assert stage_of(table).endswith(", 6 pictures)") or stage_of(table).endswith("6 pictures")
    runs = sampler.runs
    assert run(sampler, sensitivity=3, **options).sensitivity == table.sensitivity
    assert sampler.runs == runs
    assert run(sampler, sensitivity=1, **options).sensitivity["asked"] == 1
    kept = ScoreTable.load(options["path"])
    kept.sensitivity["fit"]["ridge"] = None
    made = make_plan(kept, budget=0.9, costs=LOOPS)
    assert "which runs of groups did not improve on" in made.plan.calibration["stage"]


@pytest.mark.parametrize("layers,steps,share", [(6, 20, 0.15), (4, 20, 0.12), (40, 50, 0.25)])
def test_no_more_is_measured_than_asked(layers, steps, share):
    """Nor much less, and every layer in every stretch of steps."""
    session = AttentionSession("fp16")
    session.start(steps, [1 - i / steps for i in range(steps)])
    for i in range(layers):
        session.layer(str(i))
    watcher = Calibrator([], session, share=share, rows=1, seed=0)
    cells = itertools.product(range(layers), range(steps), ("cond", "uncond"))
    chosen = np.array([watcher.chooses(str(i), step, b) for i, step, b in cells])
    chosen = chosen.reshape(layers, steps, 2)
    assert 0.8 * share <= chosen.mean() <= 1.1 * share
    period = round(1 / share)
    for first in range(0, steps - period + 1, period):
        assert (chosen[:, first : first + period].sum(1) == 1).all()
    if layers > period:
        assert chosen.any((0, 2)).all()


def test_a_small_model_is_measured_enough_to_complete():
    sampler = TinySampler(layers=1, steps=24)
    table = run(sampler, share=0.1)
    assert 10 <= table.measured.sum() < 24 and sampler.runs == 2
    assert np.isfinite(complete(table).error).all()
    assert run(TinySampler(layers=1, steps=4), share=0.1).measured.all()
    assert run(TinySampler(layers=4, steps=1), share=0.1).measured.all()


def test_a_half_of_guidance_that_is_not_seen_weighs_less():
    table = run(TinySampler(layers=2, steps=4), share=1)
    halves = ScoreTable.from_dict(table.to_dict())
    halves.branches = ["cond", "uncond"]
    for name in ("count", "mean", "m2", "work", "calls", "outliers"):
        setattr(halves, name, np.repeat(getattr(table, name), 2, 2))
    groups = Groups.of(halves, complete(halves).error, 2, 2)
    assert groups.branches == [["cond"], ["uncond"]] and len(groups.masks) == 2 + 2 + 2 + 2
    plans = groups.plans(halves)
    for mask, plan in zip(groups.masks, plans, strict=False):
        index = plan_index(halves, plan, ("fp16", *halves.specs))
        at = np.ix_([0, 1], [0, 0, 1, 1], [0, 1])
        assert ((index > 0) == mask[at]).all()
    error = complete(halves).error
    true = groups.sums(halves, error) * np.array([1.0, 0.01])[:, None]
    found = groups.fit(halves, error, errors_of(groups, true))
    halves.sensitivity = found | {"peak": 1.0}
    weights = cell_weights(ScoreTable.from_dict(halves.to_dict()))
    assert (weights[:, :, 0] > 4 * weights[:, :, 1]).all()
    old = dict(halves.sensitivity)
    del old["branches"]  # as tables of before have it
    old["weight"] = np.array(old["weight"])[..., 0].tolist()
    halves.sensitivity = old
    weights = cell_weights(ScoreTable.from_dict(halves.to_dict()))
    assert np.array_equal(weights[:, :, 0], weights[:, :, 1])


def errors_of(groups, true):
    """Final squared errors ``[runs, 1]`` if group's effects ``true [LG, SG, BG, K]`` add up."""
    masked = [(mask * true[..., groups.low]).sum() for mask in groups.masks]
    return np.array([*masked, *true.sum((0, 1, 2))])[:, None]
