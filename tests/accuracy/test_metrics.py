import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sage_diffusion.accuracy import metrics


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    return x, (x + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)


def test_tensor_metrics_match_numpy() -> None:
    y, x = pair((2, 3, 40, 8))
    a, b = x.double().numpy().ravel(), y.double().numpy().ravel()
    found = metrics.tensor_metrics(x, y)
    assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert found.rel_l1 == pytest.approx(np.abs(a - b).sum() / np.abs(b).sum(), rel=1e-12)
    assert found.rmse == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=1e-12)
    assert found.max_abs == np.abs(a - b).max()
    assert found.score == pytest.approx(found.cosine * (1 - found.rel_l1), rel=1e-12)
    single = metrics.cosine(x, y), metrics.rel_l1(x, y), metrics.rmse(x, y), metrics.max_abs(x, y)
    assert single == tuple(found)


def test_sums_do_not_overflow_half_precision() -> None:
    x = torch.full((4096,), 300.0, dtype=torch.float16)
    found = metrics.tensor_metrics(x, x * 1.25)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert found.rel_l1 == pytest.approx(0.2)
    assert found.rmse == 75


def test_relative_l1_is_relative_to_the_exact_tensor() -> None:
    assert metrics.rel_l1(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])) == 1.0


@pytest.mark.parametrize(
    ("actual", "exact", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], (1.0, 0.0, 0.0, 0.0)),
        ([1.0, 0.0], [0.0, 0.0], (0.0, math.inf, math.sqrt(0.5), 1.0)),
        ([0.0, 0.0], [2.0, 0.0], (0.0, 1.0, math.sqrt(2), 2.0)),
        ([1.0, 2.0], [1.0, 2.0], (1.0, 0.0, 0.0, 0.0)),
        ([-1.0, 0.0], [1.0, 0.0], (-1.0, 2.0, math.sqrt(2), 2.0)),
    ],
)
def test_degenerate_tensors(actual: list, exact: list, expected: tuple) -> None:
    found = metrics.tensor_metrics(torch.tensor(actual), torch.tensor(exact))
    assert tuple(found) == pytest.approx(expected)


def test_nan_is_not_hidden() -> None:
    found = metrics.tensor_metrics(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    assert all(math.isnan(value) for value in found)
    assert math.isnan(metrics.psnr(torch.tensor([math.nan]), torch.tensor([1.0])))
    zero = metrics.tensor_metrics(torch.tensor([math.nan]), torch.tensor([0.0]))
    assert math.isnan(zero.cosine) and math.isnan(zero.rel_l1)


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_psnr_matches_scikit_image(data_range: float) -> None:
    y, x = (z * data_range for z in pair((3, 16, 20)))
    expected = peak_signal_noise_ratio(
        y.double().numpy(), x.double().numpy(), data_range=data_range
    )
    assert metrics.psnr(x, y, data_range) == pytest.approx(expected, rel=1e-9)


def test_psnr_of_equal_pictures_is_infinite() -> None:
    x = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert metrics.psnr(x, x.clone()) == math.inf


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 11, 30), (3, 40, 17)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_matches_scikit_image(shape: tuple[int, ...], data_range: float) -> None:
    y, x = (z * data_range for z in pair(shape))
    expected = structural_similarity(
        x.double().numpy(),
        y.double().numpy(),
        data_range=data_range,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert metrics.ssim(x, y, data_range) == pytest.approx(expected, abs=1e-10)
    assert expected < 0.99  # the noise is visible, so an ssim that is always 1 fails
    assert metrics.ssim(y, y, data_range) == pytest.approx(1.0, abs=1e-12)


def test_latent_cosine_is_the_mean_over_samples() -> None:
    reference = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    latents = torch.tensor([[0.0, 1.0], [100.0, 0.0]])
    assert metrics.latent_cosine(latents, reference) == 0.5


def test_wrong_shapes_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(3,\)"):
        metrics.tensor_metrics(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="must not be empty"):
        metrics.tensor_metrics(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 24"):
        metrics.ssim(torch.zeros(3, 10, 24), torch.zeros(3, 10, 24))
    with pytest.raises(ValueError, match=r"shape \[C, H, W\]"):
        metrics.ssim(torch.zeros(24, 24), torch.zeros(24, 24))
    with pytest.raises(ValueError, match="data_range must be positive, got 0"):
        metrics.psnr(torch.zeros(2), torch.zeros(2), 0)


@pytest.mark.parametrize(
    ("value", "written"),
    [(1.5, 1.5), (None, None), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan")],
)
def test_json_numbers_come_back(value: float | None, written: float | str | None) -> None:
    assert metrics.json_number(value) == written
    back = metrics.number_from_json(written)
    assert back == value or (math.isnan(value) and math.isnan(back))
