"""The fit of groups to runs: better than the local error where runs say so, and never worse."""

import numpy as np
import pytest

from sage_diffusion.adapt import ridge


def runs(shape, checks=2, seed=0):
    """Each group of layers, steps and branches alone, then mixed ones; local errors of groups."""
    rng = np.random.default_rng(seed)
    masks = [at == i for at in np.indices(shape) for i in range(at.max() + 1)]
    masks += [rng.random(shape) < 0.5 for _ in range(checks)]
    return rng.lognormal(0, 1, shape), masks


def errors(local, masks, rate):
    return np.array([(mask * local * rate).sum() for mask in masks])


def test_what_the_runs_say_is_found_and_checked():
    local, masks = runs((6, 5, 2))
    rate = 0.3 * np.exp(np.linspace(-1, 1, 6)[:, None, None] + np.array([1.0, -1.0]))
    rate = np.broadcast_to(rate, local.shape)
    found = ridge.fit(local, masks, errors(local, masks, rate), 2)
    assert np.isfinite(found.weight) and (found.rate > 0).all()
    assert found.checked_db < 0.5 * found.local_checked_db
    off = np.log(found.rate / rate)
    assert np.sqrt(np.mean(off**2)) < 0.4 * np.std(np.log(rate))
    data = found.to_dict()
    assert data["ridge"] == found.weight and data["checked_db"] <= data["local_checked_db"]


def test_the_local_error_is_kept_where_runs_are_noise():
    local, masks = runs((6, 5, 1), checks=4)
    rng = np.random.default_rng(1)
    measured = errors(local, masks, 2.0)
    measured[:-4] *= rng.lognormal(0, 1, len(masks) - 4)
    found = ridge.fit(local, masks, measured, 4)
    assert np.isinf(found.weight) and found.to_dict()["ridge"] is None
    assert np.ptp(found.rate) == 0
    assert found.checked_db == found.local_checked_db


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 1), (2, 1, 2)])
def test_few_groups(shape):
    local, masks = runs(shape)
    found = ridge.fit(local, masks, errors(local, masks, 0.5), 2)
    assert np.allclose(found.rate, 0.5, rtol=1e-6)


def test_groups_without_error_and_runs_without_effect():
    local, masks = runs((4, 3, 1))
    local[1] = 0  # its layers are never called
    measured = errors(local, masks, 1.0)
    assert np.allclose(ridge.fit(local, masks, measured, 2).rate, 1, rtol=1e-6)
    nothing = ridge.fit(local, masks, np.zeros(len(masks)), 2)
    assert np.isfinite(nothing.rate).all() and (nothing.rate < 1e-100).all()
