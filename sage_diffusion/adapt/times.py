"""What every cell of a model's sampling run takes in every spec, as a card predicts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sage_diffusion.adapt.costs import Costs, call_milliseconds, relative_cost
from sage_diffusion.adapt.table import ScoreTable


def cell_times(table: ScoreTable, specs: Sequence[str], costs: Costs) -> np.ndarray:
    """Predicted times ``[L, S, B, K]``, as shares of the time of FP16 attention in all cells.

    Whole calls where the costs are a card's and the table knows how many tokens its calls have;
    else, as in tables of before, the main loops alone, weighted by their work.

    Args:
        table: its calls are read, no scores.
        specs: K of them.
        costs: of a card or of a file.

    Raises:
        CostTableError: the card can't run one of them.
    """
    work, dims = table.filled_work(), table.head_dims()
    if not of_calls(table, costs):
        loops = [[relative_cost(name, costs, dim) for name in specs] for dim in dims]
        return (work / work.sum())[..., None] * np.array(loops)[:, None, None]
    scale = 1.0
    if costs.tokens is not None:
        scale = costs.tokens / max(q_len for q_len, _ in table.tokens.values())
    calls = np.maximum(table.filled_calls(), 1)
    names = ("fp16", *specs)
    times = np.zeros((*work.shape, len(names)))
    for i, (layer, dim) in enumerate(zip(table.layers, dims, strict=True)):
        q_len, k_len = table.tokens[layer]
        heads = work[i] / calls[i] / (q_len * k_len * dim)
        sizes = (q_len * scale, k_len * scale if k_len == q_len else k_len, dim)
        for k, name in enumerate(names):
            launches = call_milliseconds(name, costs, *sizes, heads=0)
            head = call_milliseconds(name, costs, *sizes, heads=1) - launches
            times[i, ..., k] = calls[i] * (launches + heads * head)
    times[~table.exists] = 0
    return times[..., 1:] / times[..., 0].sum()


def of_calls(table: ScoreTable, costs: Costs) -> bool:
    """Are the times those of whole calls?"""
    return costs.whole and set(table.layers) <= set(table.tokens)
