"""Low-rank completion on tables whose truth is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from sage_diffusion.adapt.complete import complete, complete_log
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError


def low_rank(layers=24, steps=30, specs=3, seed=0):
    """Logarithms ``[L, S, 1, K]`` of rank 2 over smooth steps, 5 % noise."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    u = rng.normal(size=(layers, 2))
    base = u[:, :1] * np.cos(3 * t) + u[:, 1:] * t**2 + rng.normal(size=(layers, 1))
    level = np.array([-9.0, -7.0, -3.0])[:specs]
    noise = rng.normal(0, 0.05, (layers, steps, specs))
    return (base[..., None] + level + noise)[:, :, None]


def quarter(layers, steps, seed=0):
    """One measured cell of each layer in every four steps, ``[L, S, 1]`` bool."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((layers, steps, 1), dtype=bool)
    for i in range(layers):
        for first in range(0, steps, 4):
            mask[i, min(first + rng.integers(4), steps - 1), 0] = True
    return mask


def test_a_quarter_tells_the_rest_and_the_bar_is_honest():
    truth = low_rank()
    mask = quarter(*truth.shape[:2])
    shown = np.where(mask[..., None], truth, np.nan)
    shown = np.where(np.isnan(shown), 0, shown)
    filled, bar, doubt, rank = complete_log(shown, mask)
    missing = ~mask[..., 0]
    for k in range(truth.shape[-1]):
        pair = truth[:, :, 0, k][missing], filled[:, :, 0, k][missing]
        assert spearmanr(*pair).statistic >= 0.97
    real = np.sqrt(np.mean((filled - truth)[missing] ** 2))
    assert 0.5 * real < bar < 2.5 * real
    assert rank >= 1
    assert doubt.shape == mask.shape


def test_rows_alone_are_worse():
    truth = low_rank()
    mask = quarter(*truth.shape[:2])
    filled, *_ = complete_log(np.where(mask[..., None], truth, 0), mask)
    missing = ~mask[..., 0]
    known = np.where(mask[..., None], truth, np.nan)
    rows = np.broadcast_to(np.nanmean(known, 1, keepdims=True), truth.shape)
    error = [np.sqrt(np.mean((x - truth)[missing] ** 2)) for x in (filled, rows)]
    assert error[0] < 0.4 * error[1]


def table_of(truth, mask):
    table = ScoreTable(tuple(f"int8/{pv}" for pv in ("fp16", "int8", "fp8")), truth.shape[1])
    for i in range(truth.shape[0]):
        for s in range(truth.shape[1]):
            table.saw(f"blocks.{i}", s, None, 1.0, 1)
            if mask[i, s, 0]:
                error = np.exp(truth[i, s, 0])
                table.add(f"blocks.{i}", s, None, np.stack([0 * error, 0 * error, error], -1))
    return table


def test_measured_cells_keep_their_values():
    truth = low_rank()
    mask = quarter(*truth.shape[:2])
    found = complete(table_of(truth, mask))
    assert np.allclose(found.error[mask], np.exp(truth[mask]))
    assert np.isfinite(found.error).all()
    assert 0 < found.bar_db < 3
    assert (found.doubt_db[mask] == 0).all()
    full = complete(table_of(truth, np.ones_like(mask)))
    assert full.bar_db == 0


def test_a_cell_that_a_step_cache_skipped_is_unknown_not_zero():
    truth = low_rank()
    mask = quarter(*truth.shape[:2])
    mask[3, 5:15] = False
    table = table_of(truth, mask)
    table.work[3, 5:15], table.calls[3, 5:15] = np.nan, 0
    found = complete(table)
    assert (found.error[3, 5:15] > 0).all()
    assert table.exists[3, 5:15].all()
    assert (table.filled_work()[3] == 1).all()


def test_too_little_is_refused():
    truth = low_rank(6, 8)
    mask = np.zeros((6, 8, 1), dtype=bool)
    mask[0, :3] = True
    with pytest.raises(TableError, match="only 3 cells are measured"):
        complete(table_of(truth, mask))
    with pytest.raises(TableError, match="nothing was measured"):
        complete(table_of(truth, np.zeros_like(mask)))
