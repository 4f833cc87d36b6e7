"""Errors that add up over steps and branches, and plans that know it."""

import itertools

import numpy as np
import pytest

from sage_diffusion.adapt.coupling import (
    Coupling,
    correlation_matrix,
    exchange,
    groups_of,
    lower_bound,
)
from sage_diffusion.adapt.gradient import _Tally
from sage_diffusion.adapt.planner import Unreachable, make_plan, plan_index, predict, problem
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError

SPECS = ("int8/fp8-fast", "int4/fp8-fast")


def decaying(steps, rate=0.6, branches=1):
    lags = np.zeros((branches, branches, steps))
    for b in range(branches):
        lags[b, b] = rate ** np.arange(steps)
    return lags


def small(layers=2, steps=4, seed=0):
    """A coupling of two options, 8 bit first, and their times."""
    random = np.random.default_rng(seed)
    own = np.stack([np.full((layers, steps), 0.01), random.uniform(0.5, 2.0, (layers, steps))], -1)
    matrix = np.stack([np.eye(steps), correlation_matrix(decaying(steps))])
    time = np.broadcast_to([2.0, 1.0], own.shape).copy()
    return Coupling(np.sqrt(own), np.eye(2), matrix), time, np.ones((layers, steps), bool)


def best_of_all(coupling, time, limit):
    layers, cells, options = time.shape
    found = np.inf
    for choice in itertools.product(range(options), repeat=layers * cells):
        index = np.array(choice).reshape(layers, cells)
        if np.take_along_axis(time, index[..., None], 2).sum() <= limit:
            found = min(found, coupling.total(index))
    return found


def test_formats_of_q_and_k_round_alike():
    formats, member = groups_of(("fp16", "int8/fp16", "int8/int8", "int4/int8"))
    assert formats == ("int8", "int4")
    assert member.tolist() == [[0, 0], [1, 0], [1, 0], [0, 1]]


def test_a_correlation_that_is_none_becomes_the_nearest_one():
    fine = correlation_matrix(decaying(6, branches=2))
    assert np.allclose(fine[0], [1, 0, 0.6, 0, 0.36, 0, 0.216, 0, 0.1296, 0, 0.07776, 0])
    lags = np.array([[[1.0, 0.9, -0.9, 0.5]]])  # no three steps can do that
    found = correlation_matrix(lags)
    assert np.linalg.eigvalsh(found).min() > -1e-9 and np.allclose(np.diag(found), 1)
    assert np.abs(found).max() <= 1 + 1e-9


def test_lags_look_forward_from_the_first_branch():
    lags = decaying(2, branches=2)
    lags[0, 1, 1] = 0.3  # the second branch, one step after the first
    found = correlation_matrix(lags).reshape(2, 2, 2, 2)
    assert found[0, 0, 1, 1] == pytest.approx(0.3) == found[1, 1, 0, 0]
    assert found[0, 1, 1, 0] == pytest.approx(0)


def test_totals_are_the_quadratic_form():
    coupling, _, _ = small()
    index = np.array([[0, 1, 1, 0], [1, 1, 0, 1]])
    want = 0.0
    for layer in range(2):
        for option in range(2):
            r = np.where(index[layer] == option, coupling.root[layer, :, option], 0)
            want += r @ coupling.matrix[option] @ r
    assert coupling.total(index) == pytest.approx(want)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [9, 11, 13])
def test_exchange_comes_near_the_best_of_all_choices(seed, limit):
    coupling, time, exists = small(seed=seed)
    start = np.ones((2, 4), dtype=np.int64)
    found = exchange(coupling, time, exists, start, limit, branches=1)
    best = best_of_all(coupling, time, limit)
    assert np.take_along_axis(time, found[..., None], 2).sum() <= limit
    assert best * (1 - 1e-9) <= coupling.total(found) <= best * 1.05
    least = lower_bound(coupling, time, exists, limit)
    assert 0.5 * best < least <= best * (1 + 1e-9)
    assert (start == 1).all()  # the caller's


def test_like_cells_alternate_where_neighbours_err_alike():
    steps = 10
    own = np.broadcast_to([0.0, 1.0], (1, steps, 2))
    coupling = Coupling(
        np.sqrt(own), np.eye(2), np.stack([correlation_matrix(decaying(steps))] * 2)
    )
    time = np.broadcast_to([2.0, 1.0], own.shape)
    start = np.repeat([[0, 1]], 5, 1)  # five in 8 bit, then five in 4 bit
    found = exchange(coupling, time, np.ones((1, steps), bool), start, 15.0, branches=1)
    assert found.sum() == 5
    assert (found[:, 1:] & found[:, :-1]).sum() == 0
    dear = exchange(coupling, time, np.ones((1, steps), bool), start, 15.0, branches=1, price=1.0)
    assert (dear == start).all()
    none = exchange(coupling, time, np.zeros((1, steps), bool), start, 15.0, branches=1)
    assert (none == start).all()  # cells that don't exist stay


def test_signs_tell_the_correlation_whatever_the_size():
    random = np.random.default_rng(0)
    tally = _Tally((3, 40, 1, 1))
    final = np.zeros(4)
    for _ in range(60):
        noise = random.normal(size=(4, 3, 41, 1, 1))
        effects = noise[:, :, 1:] + noise[:, :, :-1]  # correlation 0.5 with the next, then 0
        effects *= np.exp(random.normal(0, 3, (4, 3, 40, 1, 1)))  # chaotic pictures
        tally.add(_Final(final), effects)
    found = tally.correlation()[0, 0, 0]
    assert found[0] == 1
    assert found[1] == pytest.approx(0.5, abs=0.03) and abs(found[2]) < 0.03
    copy = _Tally((3, 40, 1, 1))
    copy.load(tally.to_dict())
    assert np.array_equal(copy.correlation(), tally.correlation())


class _Final(np.ndarray):
    """Final latents of which only these are asked."""

    def __new__(cls, array):
        return np.asarray(array).view(cls)

    def numel(self):
        return self.size


def table_of(layers=3, steps=12):
    """All cells measured and rated; neighbouring steps of 4 bit err alike."""
    random = np.random.default_rng(1)
    table = ScoreTable(SPECS, steps, {"model": "made up"})
    effect = np.zeros((layers, steps, 1, 2))
    for i in range(layers):
        for step in range(steps):
            error = np.array([1e-6, 1e-3]) * np.exp(random.normal(0, 0.5))
            effect[i, step, 0] = error
            table.saw(f"blocks.{i}", step, None, 1.0, 1)
            table.add(f"blocks.{i}", step, None, np.stack([1 - error, error**0.5, error], -1))
    lags = np.stack([decaying(steps, 0.0), decaying(steps, 0.7)])
    table.sensitivity = {
        "method": "gradient",
        "layers": list(table.layers),
        "branches": list(table.branches),
        "effect": effect.tolist(),
        "factor": [1.0, 2.5],
        "correlation": lags.tolist(),
        "peak": 2.0,
    }
    return ScoreTable.from_dict(table.to_dict())


def test_one_spec_everywhere_keeps_its_measured_total():
    task = problem(table_of())
    for k, name in enumerate(task.specs):
        assert predict(task, name)[1] == pytest.approx(task.quality(task.damage[..., k].sum()))


def test_plans_hold_their_budget_and_know_how_errors_add_up():
    table = table_of()
    independent = table_of()
    del independent.sensitivity["correlation"]
    task = problem(table)
    made = make_plan(table, budget=0.22)
    before = make_plan(independent, budget=0.22)
    assert made.time <= 0.22 * (1 + 1e-9)
    assert made.ideal_quality > predict(task, before.plan)[1] + 0.5
    assert made.quality >= made.ideal_quality - 0.25 - 1e-6
    assert 0 < made.gap < 0.5
    assert (plan_index(table, made.plan, made.specs) == made.index).all()


def test_floors_hold_and_unreachable_ones_say_the_best():
    table = table_of()
    made = make_plan(table, floor=25.0, specs=SPECS)
    assert made.quality >= 25.0 - 1e-6
    assert made.time < predict(problem(table), "int8/fp8-fast")[0]
    with pytest.raises(Unreachable, match=r"keeps 90.0 dB, the best reachable is 49\.\d dB"):
        make_plan(table, floor=90.0, specs=SPECS)
    with pytest.raises(Unreachable, match=r"the fastest takes 0\.188"):
        make_plan(table, budget=0.1)


def test_a_broken_correlation_is_refused_with_its_path():
    data = table_of().to_dict()
    data["sensitivity"]["correlation"][1][0][0][3] = 1.5
    with pytest.raises(TableError, match=r"sensitivity\.correlation must be within -1\.0 \.\. 1"):
        ScoreTable.from_dict(data)
    data["sensitivity"]["correlation"] = [[[1.0]]]
    with pytest.raises(TableError, match=r"correlation must be numbers in lists of 2 x 1 x 1 x 12"):
        ScoreTable.from_dict(data)
