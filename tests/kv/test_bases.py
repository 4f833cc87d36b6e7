"""Eigenbases of a covariance under a metric."""

import torch

from sage_diffusion.kv.bases import eigenbasis


def moments(d=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(d, 4 * d, generator=g) for _ in "CF")
    return torch.randn(d, generator=g), a @ a.T / 40, b @ b.T / 40


def test_there_and_back_is_exact():
    mean, covariance, metric = moments()
    basis = eigenbasis(mean, covariance, metric)
    k = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(basis.decode(basis.encode(k)), k, atol=1e-4, rtol=1e-4)


def test_coefficients_are_white_and_errors_cost_their_weights():
    mean, covariance, metric = moments()
    basis = eigenbasis(mean, covariance, metric)
    white = basis.into.T @ covariance @ basis.into
    torch.testing.assert_close(white, torch.eye(12), atol=1e-4, rtol=0)
    damped = metric + 1e-3 * metric.diagonal().mean() * torch.eye(12)
    cost = basis.back @ damped @ basis.back.T
    torch.testing.assert_close(cost, basis.weights.diag(), atol=1e-3, rtol=1e-3)
    assert (basis.weights.diff() <= 0).all()


def test_without_a_metric_it_is_pca():
    mean, covariance, _ = moments()
    weights = eigenbasis(mean, covariance).weights
    torch.testing.assert_close(
        weights / weights.sum(), torch.linalg.eigvalsh(covariance).flip(0) / covariance.trace()
    )


def test_a_basis_per_head_mixes_no_heads():
    mean, covariance, metric = moments()
    basis = eigenbasis(mean, covariance, metric, heads=3)
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 3) == 1
    assert (basis.into[~blocks] == 0).all() and (basis.back[~blocks] == 0).all()
