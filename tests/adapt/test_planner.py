"""Planning, compression into rules, plans that move."""

import json

import numpy as np
import pytest

from sage_diffusion.adapt.compress import compress, rules_of
from sage_diffusion.adapt.costs import CYCLES, CostTableError, load_costs, relative_cost
from sage_diffusion.adapt.planner import (
    Unreachable,
    make_plan,
    plan_index,
    predict,
    predicted_time,
    problem,
)
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.plan import PlanError, PrecisionPlan, step_progress
from sage_diffusion.plan.globs import cover, escape, step_range

SPECS = ("int8/fp16", "int8/fp8-fast", "int4/fp8-fast")


def table_of(layers=8, steps=10, seed=0, branches=("both",), names="blocks.{}.attn"):
    """A full table whose errors vary over layers and steps by orders of magnitude."""
    rng = np.random.default_rng(seed)
    table = ScoreTable(SPECS, steps, {"model": "M", "layers": []}, schedule=None)
    level = np.exp(rng.normal(0, 1.2, (layers, 1)) + np.linspace(0, 2, steps) * rng.normal())
    for i in range(layers):
        for s in range(steps):
            for branch in branches:
                error = level[i, s] * np.array([1e-6, 1e-4, 1e-2])
                values = np.stack([1 - error, np.sqrt(error), error], -1)
                table.saw(names.format(i), s, branch, 1.0 + i % 3, 1)
                table.add(names.format(i), s, branch, values)
    table.fingerprint["layers"] = list(table.layers)
    return table


@pytest.mark.parametrize("settings", [{}, {"sign_seed": None}, {"sign_seed": 0}])
def test_a_plan_rotates_as_its_table_was_measured(settings):
    """Tables of before the sequences knew one rotation: so do their plans."""
    table = table_of()
    table.settings = dict(settings)
    plan = make_plan(table, budget=0.2063).plan
    assert plan.sign_seed == settings.get("sign_seed")
    assert PrecisionPlan.from_json(plan.to_json()).sign_seed == plan.sign_seed


def test_the_best_plan_within_a_time():
    table = table_of()
    made = make_plan(table, budget=0.2063, max_loss_db=0)
    assert made.time <= 0.2063 + 1e-9
    assert made.gap < 1e-6
    assert made.quality == pytest.approx(made.ideal_quality)
    task = problem(table)
    uniform = predict(task, "int4/fp8-fast")
    assert uniform[0] == pytest.approx(0.1875)
    assert made.quality > uniform[1] + 2
    # What the rules resolve to is what was planned, and what is predicted of them.
    assert np.array_equal(plan_index(table, made.plan, made.specs), made.index)
    assert predict(task, made.plan) == pytest.approx((made.time, made.quality))
    assert predicted_time(table, made.plan, "rtx4090") == pytest.approx(made.time)


def test_the_fastest_plan_above_a_floor():
    table = table_of()
    task = problem(table)
    floor = predict(task, "int8/fp8-fast")[1] - 1
    made = make_plan(table, floor=floor, max_loss_db=0)
    assert made.quality >= floor - 1e-6
    assert made.time < 0.5
    better = make_plan(table, floor=floor + 6)
    assert better.time > made.time


def test_few_rules_for_a_stated_loss():
    table = table_of(layers=24, steps=30, seed=1)
    exact = make_plan(table, budget=0.45, max_loss_db=0)
    few = make_plan(table, budget=0.45, max_loss_db=0.25)
    assert len(few.plan.rules) < len(exact.plan.rules)
    assert few.quality >= few.ideal_quality - 0.25 - 1e-6
    assert few.time <= 0.45 + 1e-9
    assert np.array_equal(plan_index(table, few.plan, few.specs), few.index)


@pytest.mark.parametrize("seed", range(6))
def test_rules_resolve_to_the_table(seed):
    rng = np.random.default_rng(seed)
    branches = ["cond", "uncond"] if seed % 2 else ["both"]
    layers = [f"double.{i}.attn" for i in range(12)] + [f"single.{i}.attn" for i in range(13)]
    index = rng.integers(0, 3, (25, 9, len(branches)))
    index[3:9] = index[3]
    index[:, 4] = 1
    exists = np.ones(index.shape, dtype=bool)
    packed = rules_of(index, exists, SPECS, layers, branches)
    plan = PrecisionPlan(packed.default, packed.rules)
    plan = PrecisionPlan.from_json(plan.to_json())
    for i, layer in enumerate(layers):
        for s in range(9):
            for b, branch in enumerate(branches):
                spec = plan.resolve(layer, step_progress(s, 9), branch=branch)
                assert str(spec) == SPECS[index[i, s, b]]


def test_equal_layers_share_a_rule():
    index = np.zeros((20, 10, 1), dtype=int)
    index[[1, 4, 7], 6:] = 2
    names = [f"blocks.{i}.attn" for i in range(20)]
    packed = rules_of(index, np.ones_like(index, dtype=bool), SPECS, names, ["both"])
    assert [rule.layers for rule in packed.rules] == ["blocks.[147].attn"]
    index[:, :2] = 1
    packed = rules_of(index, np.ones_like(index, dtype=bool), SPECS, names, ["both"])
    assert [rule.layers for rule in packed.rules] == ["blocks.[147].attn", "*"]


@pytest.mark.parametrize("apart", [False, True])
def test_branches_that_a_layer_never_serves_cost_no_rule(apart):
    rng = np.random.default_rng(0)
    layers, branches = ["cond.0.attn", "cond.1.attn", "full.attn"], ["both", "cond", "uncond"]
    index = rng.integers(0, 3, (3, 6, 3))  # noise where nothing is called
    exists = np.zeros(index.shape, dtype=bool)
    exists[:2, :, 1] = exists[2, :, 1:] = True
    index[:2, :, 1], index[2, :, 1], index[2, :, 2] = 1, 2, 0 if apart else 2
    packed = rules_of(index, exists, SPECS, layers, branches)
    assert len(packed.rules) == (2 if apart else 1), packed.rules
    plan = PrecisionPlan(packed.default, packed.rules)
    for (i, s, b), option in np.ndenumerate(packed.index):
        branch = None if branches[b] == "both" else branches[b]
        assert str(plan.resolve(layers[i], step_progress(s, 6), branch=branch)) == SPECS[option]
    assert np.array_equal(packed.index[exists], index[exists])


def test_compression_keeps_the_limit_on_damage():
    table = table_of(layers=12, steps=20, seed=3)
    task = problem(table)
    made = make_plan(table, floor=predict(task, "int8/fp8-fast")[1] - 2, max_loss_db=0)
    limit = task.allowed_damage(made.quality)
    packed = compress(
        task.damage,
        task.time,
        task.exists,
        made.index,
        task.specs,
        table.layers,
        table.branches,
        max_loss=1.1,
        limit_damage=limit,
    )
    time, damage = task.totals(packed.index)
    assert damage <= limit * (1 + 1e-6)
    assert len(packed.rules) <= len(made.plan.rules)
    assert time < 0.6


def test_a_single_step_is_planned_for_any_schedule():
    table = table_of(steps=1)
    table.schedule, table.schedule_unit = [14.6], "sigma"
    made = make_plan(table, budget=0.3)
    assert made.plan.schedule is None and 0 < made.time <= 0.3
    specs = {str(made.plan.resolve(name, at)) for name in table.layers for at in (0.0, 0.5, 1.0)}
    assert specs == {str(made.plan.resolve(name, 0.0)) for name in table.layers}


def test_unreachable_says_what_is_reachable():
    table = table_of()
    with pytest.raises(Unreachable, match=r"fastest takes 0\.188"):
        make_plan(table, budget=0.15)
    best = predict(problem(table), "int8/fp16")[1]
    with pytest.raises(Unreachable, match=f"best reachable is {best:.1f} dB"):
        make_plan(table, floor=900, specs=SPECS)
    with pytest.raises(ValueError, match="give either floor or budget"):
        make_plan(table)
    with pytest.raises(PlanError, match="int4/int8 was not calibrated"):
        make_plan(table, budget=0.5, specs=["int4/int8"])
    with pytest.raises(PlanError, match="nothing is known of int8/int8"):
        predict(problem(table), "int8/int8")


def test_costs(tmp_path):
    for card in CYCLES:
        assert load_costs(card)["fp16"] > 0
    assert relative_cost("int4/fp8-fast", load_costs("rtx4090")) == 0.1875
    assert relative_cost("int8/fp16+rotate", load_costs("rtx4090")) == 0.625
    assert relative_cost("int4/fp8-fast+smooth_v", load_costs("rtx4090"), 64) == 200 / 1024
    assert relative_cost("int8/fp8", load_costs("rtx4090"), 64) == 0.375
    small = load_costs({"fp16": 8, "fp16@64": 4, "int8/fp8@64": 1})
    assert relative_cost("int8/fp8", small, 64) == 0.25
    with pytest.raises(CostTableError, match=r"no cost of int8/fp8 is known .* int8/fp8@64"):
        relative_cost("int8/fp8", small)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"fp16": 2, "int8/fp8-fast": 1}))
    assert relative_cost("int8/fp8-fast", load_costs(path)) == 0.5
    assert problem(table_of(), path).specs == ("fp16", "int8/fp8-fast")
    assert problem(table_of(), path, ["int8/fp8-fast"]).specs == ("int8/fp8-fast",)
    with pytest.raises(CostTableError, match="card must be one of"):
        load_costs("gtx1080")
    with pytest.raises(CostTableError, match="must be a positive number"):
        load_costs({"fp16": 1, "int8/fp8": 0})
    with pytest.raises(CostTableError, match="must name fp16"):
        load_costs({"int8/fp8": 1})
    for text, message in (
        ('{"fp16": NaN}', "fp16 must be a finite number"),
        ('{"fp16": "2"}', "fp16 must be a positive number, got '2'"),
        ('{"fp16": true}', "fp16 must be a positive number, got True"),
        (f'{{"fp16": {"9" * 5000}}}', "fp16 must be a finite number"),
        ('{"fp16": ' + "[" * 20_000, r"fp16\[0\].* must have at most 64"),
        ('{"fp16": 1, "fp16": 2}', "fp16 must occur once"),
        ('{"fp16": 2, "int8": 1, "int8/fp8": 2}', "int8/fp8 must be one cost of int8/fp8"),
        (f'{{"{"x" * 10**6}": 1}}', r"xxx\.\.\.: 'xxx.* is not an attention spec"),
        ('{"fp16@64": 1, "\\ud800": 1}', "must be a key of Unicode text"),
        (f'["{"y" * 10**6}"]', r"must be an object of spec -> number, got \['yyy"),
    ):
        path.write_text(text)
        with pytest.raises(CostTableError, match=message) as caught:
            load_costs(path)
        assert len(str(caught.value)) < 500
    path.write_bytes(b"\xef\xbb\xbf" + b'{"fp16": 2, "int8/fp8": 1}')
    assert load_costs(path) == {"fp16": 2.0, "int8/fp8": 1.0}
    with pytest.raises(CostTableError, match="fp16 must be a positive number, got a whole number"):
        load_costs({"fp16": 10**5000})
    with pytest.raises(CostTableError, match="can run none"):
        problem(table_of(), {"fp16": 1.0})


def test_globs_match_exactly():
    names = [f"a.{i}.x" for i in range(24)] + [f"b.{i}.x" for i in range(3)] + ["odd[1]*"]
    rng = np.random.default_rng(0)
    from fnmatch import fnmatchcase

    for _ in range(30):
        chosen = [name for name in names if rng.random() < 0.4] or names[:1]
        globs = cover(chosen, names)
        hit = [name for name in names if any(fnmatchcase(name, g) for g in globs)]
        assert hit == chosen
        assert len(globs) <= len(chosen)
    assert cover(names, names) == ["*"]
    assert cover(names[:24], names) == ["a.*.x"]
    assert fnmatchcase("odd[1]*", escape("odd[1]*"))
    assert not fnmatchcase("odd1x", escape("odd[1]*"))


def test_step_ranges_hold_exactly_their_steps():
    for steps in (2, 7, 50):
        for first in range(steps):
            for stop in range(first + 1, steps + 1):
                start, end = step_range(first, stop, steps)
                plan = PrecisionPlan.from_json(
                    json.dumps(
                        {
                            "version": 1,
                            "default": "fp16",
                            "rules": [{"start": start, "end": end, "spec": "int8/fp8"}],
                        }
                    )
                )
                inside = [
                    s for s in range(steps) if plan.resolve("a", step_progress(s, steps)).quantized
                ]
                assert inside == list(range(first, stop))
