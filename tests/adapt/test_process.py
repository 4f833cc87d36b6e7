"""The structured process against the plain formulas, and where there is little to learn from."""

import numpy as np
import pytest
import torch

from sage_diffusion.adapt import process


def cells(shape=(3, 5, 2), share=0.5, seed=0):
    """Values of some cells ``[L, S, B]``, and which are known, at uneven counts by layer."""
    rng = np.random.default_rng(seed)
    known = rng.random(shape) < share
    known[0, 0, 0] = True
    return rng.normal(size=shape), known


def dense(values, known, theta):
    """Mean, standard deviation and log likelihood by one matrix over all cells."""
    steps = values.shape[1]
    at = np.argwhere(np.ones(values.shape))
    layer, step, branch = (at[:, i, None] == at[None, :, i] for i in range(3))
    gap = np.abs(at[:, 1, None] - at[None, :, 1]) * 3**0.5 / (np.exp(theta[6]) * max(steps, 2))
    smooth = (1 + gap) * np.exp(-gap)
    v = np.exp(theta[:6])
    own = v[0] + v[1] * smooth + branch * (v[2] + v[3] * smooth)
    common = 100 + v[4] * smooth + branch * (100 + v[5] * smooth)
    prior = layer * own + common + 1e-6 * (step & branch)
    noise = np.exp(theta[7]) + 1e-8
    k = known.ravel()
    inner = prior[np.ix_(k, k)] + noise * np.eye(k.sum())
    gain = prior[:, k] @ np.linalg.inv(inner)
    y = values.ravel()[k]
    variance = np.diag(prior) - (gain * prior[:, k]).sum(1) + noise
    likelihood = -(np.linalg.slogdet(inner)[1] + y @ np.linalg.solve(inner, y)) / 2
    return (gain @ y).reshape(values.shape), np.sqrt(variance).reshape(values.shape), likelihood


@pytest.mark.parametrize("block", [1, 10**6])
def test_blocks_and_what_is_common_give_the_whole_matrix(monkeypatch, block):
    monkeypatch.setattr(process, "_BLOCK", block)  # layer by layer, or all at once
    values, known = cells()
    known[1] = False  # a layer of which nothing is known
    theta = np.log([0.5, 0.3, 0.2, 0.4, 0.6, 0.1, 0.3, 0.05])
    some = process.Known.of(known)
    found = process._Posterior(some, some.gather(values), torch.from_numpy(theta))
    mean, deviation = (x.numpy().reshape(values.shape) for x in found.predict())
    expected = dense(values, known, theta)
    assert np.allclose(mean, expected[0], atol=1e-6)
    assert np.allclose(deviation, expected[1], atol=1e-6)
    assert np.isclose(-float(found.surprise()), expected[2], atol=1e-6)


def test_what_was_drawn_from_a_process_lies_within_its_bars():
    rng = np.random.default_rng(0)
    steps = np.arange(24)
    smooth = np.exp(-(((steps[:, None] - steps) / 6) ** 2) / 2)
    root = np.linalg.cholesky(smooth + 1e-9 * np.eye(24))
    values = 5 + 2 * rng.normal(size=(12, 1, 1)) + (root @ rng.normal(size=(24, 12))).T[..., None]
    values = values + 0.1 * rng.normal(size=values.shape)
    known = rng.random(values.shape) < 0.4
    found = process.fit(values, known)
    off = np.abs(values - found.mean)[~known]
    assert 0.9 < np.mean(off < 1.96 * found.deviation[~known]) < 0.99
    assert np.sqrt(np.mean(off**2)) < 0.25
    far = np.zeros(24, bool)
    far[:12] = True
    gone = known & ~far[None, :, None]
    blind = process.fit(values, gone, found.theta)
    assert blind.deviation[:, 0].mean() > 2 * found.deviation[:, 0].mean()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 1), (6, 1, 2), (4, 5, 2)])
@pytest.mark.parametrize("level", [0.0, -30.0])
def test_values_that_do_not_differ_stay(shape, level):
    _, known = cells(shape)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        found = process.fit(np.full(shape, level), known)
    assert np.allclose(found.mean, level, atol=1e-4)
    assert (found.deviation > 0).all() and (found.deviation < 1e-3).all()
