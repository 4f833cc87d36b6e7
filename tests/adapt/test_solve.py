"""The knapsack against brute force, and its bound."""

import itertools

import numpy as np
import pytest
from paced import at_most

from sage_diffusion.adapt.solve import Infeasible, solve


def brute_force(objective, weight, limit):
    rows = range(len(objective))
    return min(
        sum(objective[i, j] for i, j in zip(rows, choice, strict=True))
        for choice in itertools.product(range(objective.shape[1]), repeat=len(objective))
        if sum(weight[i, j] for i, j in zip(rows, choice, strict=True)) <= limit + 1e-9
    )


@pytest.mark.parametrize("whole", [True, False], ids=["integer costs", "real costs"])
def test_optimal(whole):
    rng = np.random.default_rng(int(whole))
    for _ in range(60):
        shape = rng.integers(1, 6), rng.integers(1, 5)
        weight = rng.integers(1, 9, shape).astype(float) if whole else rng.random(shape)
        objective = rng.random(shape) ** 4
        low, high = weight.min(1).sum(), weight.max(1).sum()
        limit = low + rng.random() * (high - low)
        found = solve(objective, weight, limit)
        rows = np.arange(len(objective))
        assert found.weight <= limit + 1e-6
        assert found.objective == pytest.approx(objective[rows, found.index].sum())
        assert found.objective == pytest.approx(brute_force(objective, weight, limit), abs=1e-12)
        assert found.gap < 1e-9


@pytest.mark.parametrize("uniform", [True, False], ids=["equal layers", "unequal layers"])
def test_a_large_model_is_planned_in_time_with_a_small_gap(uniform):
    rng = np.random.default_rng(0)
    cells = 60 * 50
    weight = np.tile([8.0, 6.0, 4.0, 4.0, 3.0, 3.0], (cells, 1))
    if not uniform:
        weight *= rng.choice([1.0, 2.3, 0.7, 1.137], (cells, 1))
    kind = np.array([0, 1e-6, 1e-4, 1.5e-4, 1e-2, 1.1e-2])
    objective = kind * np.exp(rng.normal(0, 1.5, (cells, 1)) + rng.normal(0, 0.3, (cells, 6)))
    with at_most(5000):  # 40 and 400 measured
        found = solve(objective, weight, weight.min(1).sum() * 1.1)
    assert found.gap < 1e-3
    assert found.bound <= found.objective


def test_infeasible_names_the_least():
    with pytest.raises(Infeasible, match="least reachable is 2") as caught:
        solve(np.ones((2, 2)), np.array([[1.0, 3.0], [1.0, 2.0]]), 1.5)
    assert caught.value.best == 2


def test_an_infinite_objective_is_forbidden():
    found = solve(np.array([[np.inf, 5.0]]), np.array([[1.0, 2.0]]), 2.0)
    assert found.index.tolist() == [1]
    with pytest.raises(Infeasible):
        solve(np.array([[np.inf, 5.0]]), np.array([[1.0, 2.0]]), 1.0)


def test_bad_arrays():
    with pytest.raises(ValueError, match="must both be"):
        solve(np.ones((2, 2)), np.ones((2, 3)), 1.0)
    with pytest.raises(ValueError, match="must be numbers"):
        solve(np.full((1, 1), np.nan), np.ones((1, 1)), 1.0)
