"""Dealing out a budget (bits, ranks, tokens) by one global level that a binary search finds.

PrefixKV (2412.03409) searches one level of importance that all layers reach; reverse water-filling
searches one level of distortion.  Both are :func:`allocate`: every item takes the option of least
``loss + level * cost``, and the level is the smallest at which the costs meet the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 100  # halvings: more than float64 has bits


def allocate(losses: Tensor, costs: Tensor, budget: float) -> Tensor:
    """One option for each item.

    Args:
        losses: ``[N, O]``, what each option of each item loses.
        costs: ``[O]`` or ``[N, O]``, what it costs; not negative.
        budget: of the sum of the costs.

    Returns:
        ``[N]`` int64: the lower convex hull's choice, then the best single steps that still fit.

    Raises:
        ValueError: the cheapest options cost more.
    """
    losses, costs = losses.double(), costs.double().expand(losses.shape)
    least = float(costs.amin(1).sum())
    if least > budget * (1 + 1e-9):
        raise ValueError(
            f"budget must be at least {least:.6g}, which the cheapest options cost, "
            f"got {budget:.6g}"
        )

    def chosen(level: float) -> Tensor:
        return (losses + level * costs).argmin(1)

    def cost(choice: Tensor) -> float:
        return float(costs.gather(1, choice[:, None]).sum())

    spread = costs[costs > 0].min() if bool((costs > 0).any()) else torch.ones(())
    low, high = 0.0, float((losses.amax() - losses.amin()).clamp(min=1e-300) / spread) * 2
    if cost(chosen(low)) <= budget:
        return chosen(low)
    while cost(chosen(high)) > budget:
        high *= 2
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5 if low else high / 16
        if not low < middle < high:
            break
        low, high = (low, middle) if cost(chosen(middle)) <= budget else (middle, high)
    return _fill(losses, costs, budget, chosen(high))


def _fill(losses: Tensor, costs: Tensor, budget: float, choice: Tensor) -> Tensor:
    """Spend what is left: the steps of best gain for their cost, as long as one fits."""
    choice = choice.clone()
    spent = costs.gather(1, choice[:, None])
    gain = losses.gather(1, choice[:, None]) - losses
    extra = costs - spent
    left = budget - float(spent.sum())
    worth = torch.where((gain > 0) & (extra > 0) & (extra <= left), gain / extra, -torch.inf)
    best, option = worth.max(1)
    for item in best.argsort(descending=True).tolist():
        if best[item] == -torch.inf:
            break
        price = float(extra[item, option[item]])
        if price <= left:
            choice[item], left = option[item], left - price
    return choice
