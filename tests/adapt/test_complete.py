"""Completion on tables whose truth is known."""

import numpy as np
import pytest
from from_file import from_file
from scipy.stats import spearmanr

from sage_diffusion.adapt.complete import complete, complete_log
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError

by_low_rank = from_file("benchmarks/low_rank.py").complete_log


def low_rank(layers=16, steps=24, specs=2, seed=0):
    """Logarithms ``[L, S, 1, K]`` of rank 2 over smooth steps, 5 % noise."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    u = rng.normal(size=(layers, 2))
    base = u[:, :1] * np.cos(3 * t) + u[:, 1:] * t**2 + rng.normal(size=(layers, 1))
    level = np.array([-9.0, -3.0, -7.0])[:specs]
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


def table_of(truth, mask):
    names = ("int8/fp16", "int8/int8", "int8/fp8")[: truth.shape[-1]]
    table = ScoreTable(names, truth.shape[1])
    for i in range(truth.shape[0]):
        for s in range(truth.shape[1]):
            table.saw(f"blocks.{i}", s, None, 1.0, 1)
            if mask[i, s, 0]:
                error = np.exp(truth[i, s, 0])
                table.add(f"blocks.{i}", s, None, np.stack([0 * error, 0 * error, error], -1))
    return table


@pytest.fixture(scope="module")
def usual():
    """A truth, the measured quarter, and the table completed from it."""
    truth = low_rank()
    mask = quarter(*truth.shape[:2])
    return truth, mask, complete(table_of(truth, mask))


def test_a_quarter_tells_the_rest_and_the_bars_are_honest(usual):
    truth, mask, found = usual
    filled, bar = np.log(found.error), found.bar_db * np.log(10) / 10
    missing = ~mask[..., 0]
    for k in range(truth.shape[-1]):
        pair = truth[:, :, 0, k][missing], filled[:, :, 0, k][missing]
        assert spearmanr(*pair).statistic >= 0.97
    off = np.abs(filled - truth)[missing]
    assert 0.92 <= np.mean(off <= bar[missing]) <= 0.98


def test_it_beats_low_rank_where_there_is_noise():
    rng = np.random.default_rng(3)
    truth = low_rank(12, 20, 1) + rng.normal(0, 0.7, (12, 20, 1, 1))
    mask = quarter(*truth.shape[:2])
    shown = np.where(mask[..., None], truth, 0)
    error = [np.std((f(shown, mask)[0] - truth)[~mask]) for f in (complete_log, by_low_rank)]
    assert error[0] < 0.97 * error[1]


def test_rows_alone_are_worse(usual):
    truth, mask, found = usual
    filled = np.log(found.error)
    missing = ~mask[..., 0]
    known = np.where(mask[..., None], truth, np.nan)
    rows = np.broadcast_to(np.nanmean(known, 1, keepdims=True), truth.shape)
    error = [np.sqrt(np.mean((x - truth)[missing] ** 2)) for x in (filled, rows)]
    assert error[0] < 0.4 * error[1]


def test_measured_cells_keep_their_values(usual):
    truth, mask, found = usual
    assert np.allclose(found.error[mask], np.exp(truth[mask]))
    assert np.isfinite(found.error).all()
    assert 0 < found.rms_db < 3
    assert (found.bar_db[mask] == 0).all() and (found.bar_db[~mask] > 0).all()
    full = complete(table_of(truth, np.ones_like(mask)))
    assert full.rms_db == 0 and not full.bar_db.any()


def test_what_a_spec_made_infinite_is_completed():
    truth = low_rank(6, 8)
    mask = np.ones((6, 8, 1), dtype=bool)
    table = table_of(truth, mask)
    table.mean[2, 3, 0, 1] = np.nan
    found = complete(table)
    assert abs(np.log(found.error[2, 3, 0, 1]) - truth[2, 3, 0, 1]) < 1
    assert np.argwhere(found.bar_db).tolist() == [[2, 3, 0, 1]]


@pytest.mark.parametrize("shape", [(1, 20, 1), (20, 1, 1), (1, 24, 2)])
def test_a_single_layer_or_step_is_enough(shape):
    rng = np.random.default_rng(0)
    truth = -5 + rng.normal(0, 0.1, (*shape, 1))
    mask = rng.random(shape) < 0.7
    filled, bar = complete_log(np.where(mask[..., None], truth, 0), mask)
    off = np.abs(filled - truth)[~mask]
    assert off.max() < 1 and np.mean(off <= bar[~mask]) >= 0.8


def test_equal_errors_everywhere_are_no_trouble():
    values = np.full((4, 10, 1, 1), -7.0)
    mask = quarter(4, 10)
    filled, bar = complete_log(values, mask)
    assert np.allclose(filled, -7, atol=1e-3) and (bar < 0.01).all()


def test_a_cell_that_a_step_cache_skipped_is_unknown_not_zero():
    truth = low_rank(8)
    mask = quarter(*truth.shape[:2])
    mask[3, 5:15] = False
    table = table_of(truth, mask)
    table.work[3, 5:15], table.calls[3, 5:15] = np.nan, 0
    found = complete(table)
    assert (found.error[3, 5:15] > 0).all()
    assert found.bar_db[3, 9].mean() > found.bar_db[3, [0, 23]].mean()
    assert table.exists[3, 5:15].all()
    assert (table.filled_work()[3] == 1).all()


def test_a_layer_or_a_step_that_was_never_measured_is_completed_with_wider_bars():
    truth = low_rank(8)
    mask = quarter(*truth.shape[:2])
    mask[:, 9] = False
    mask[5] = False
    filled, bar = complete_log(np.where(mask[..., None], truth, 0), mask)
    rest = ~mask[..., 0]
    rest[5], rest[:, 9] = False, False
    assert np.isfinite(filled).all()
    assert bar[5].mean() > 2 * bar[:, :, 0][rest].mean()
    assert np.mean(np.abs(filled - truth)[5] <= bar[5]) >= 0.9
    others = np.delete(np.arange(8), 5)
    assert np.mean(np.abs(filled - truth)[others, 9] <= bar[others, 9]) >= 0.8
    assert np.abs(filled - truth)[others, 9].max() < 1.5  # its neighbours tell


@pytest.mark.parametrize("seed", [141, 201])
def test_a_likelihood_without_a_maximum_is_no_trouble(seed):
    """Few of some cells stand out by a million: anything explains them."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, [7, 13, 3]))
    specs = rng.integers(1, 4)
    values = rng.normal(size=(*shape, specs))
    values = np.where(rng.random(values.shape) < 0.05, 1e6, 0.0)
    mask = rng.random(shape) < rng.choice([0.1, 0.3, 0.9])
    filled, bar = complete_log(np.where(mask[..., None], values, 0), mask)
    assert np.isfinite(filled).all() and np.isfinite(bar).all() and (bar > 0).all()


def test_too_little_is_refused():
    truth = low_rank(6, 8)
    mask = np.zeros((6, 8, 1), dtype=bool)
    mask[0, :3] = True
    with pytest.raises(TableError, match="only 3 cells are measured"):
        complete(table_of(truth, mask))
    with pytest.raises(TableError, match="nothing was measured"):
        complete(table_of(truth, np.zeros_like(mask)))
