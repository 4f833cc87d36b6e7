"""Distance between the distributions of two sets of pictures."""

import pytest
import torch

from sage_diffusion.adapt.frechet import frechet_distance, picture_features


def test_frechet_distance_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(150, 6, generator=generator, dtype=torch.float64) * 1.5 + 0.3
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.tensor(sqrtm((cov_a @ cov_b).numpy()).real)
    expected = shift + cov_a.trace() + cov_b.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features():
    pictures = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    features = picture_features(pictures)
    assert features.shape == (5, 48)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 1) == pytest.approx(48, rel=1e-6)
    with pytest.raises(ValueError, match="at least two members"):
        frechet_distance(features[:1], features)
