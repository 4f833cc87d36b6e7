"""Dealing out a budget by one global level."""

import pytest
import torch

from sage_diffusion.kv.allocation import allocate


def test_large_variances_get_the_bits():
    variance = torch.tensor([1.0, 16.0, 256.0])
    bits = torch.arange(9.0)
    losses = variance[:, None] * 4.0**-bits
    chosen = allocate(losses, bits, 9)
    assert chosen.tolist() == [1, 3, 5]  # reverse water-filling: two bits for a factor of 16


def test_an_option_above_the_convex_hull_is_never_taken_by_the_level():
    losses = torch.tensor([[1.0, 3.0, 0.1]] * 4)  # the middle one costs and makes it worse
    chosen = allocate(losses, torch.tensor([0.0, 1.0, 2.0]), 5)
    assert sorted(chosen.tolist()) == [0, 0, 2, 2]


def test_what_is_left_is_spent_where_it_fits():
    losses = torch.tensor([[4.0, 1.0], [2.0, 1.5]])
    costs = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert allocate(losses, costs, 4).tolist() == [1, 1]
    assert allocate(losses, costs, 2).tolist() == [0, 1]


def test_a_budget_below_the_cheapest_is_refused():
    with pytest.raises(ValueError, match="at least 4"):
        allocate(torch.ones(2, 2), torch.tensor([2.0, 3.0]), 3)


def test_never_over_the_budget():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(200, 6, generator=generator).sort(1, descending=True).values
    costs = torch.tensor([0.0, 2.1, 3.1, 4.1, 5.1, 6.1])
    for budget in (10.0, 123.4, 700.0, 5000.0):
        chosen = allocate(losses, costs, budget)
        assert float(costs[chosen].sum()) <= budget + 1e-6
