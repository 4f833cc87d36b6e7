"""Metrics of tensors and pictures, as the papers on quantized attention use them.

Cosine similarity, relative L1 distance and RMSE over the flattened tensors are the three columns of
SageAttention's tables (2410.02367 section 4.6, 2411.10958 section 4).  All sums run in float64
(float32 on devices that have none).

Edge cases: two equal tensors have cosine 1 and relative L1 0, also if both are zero; against an
exact tensor of zeros any other has cosine 0 and relative L1 infinity; equal pictures have infinite
PSNR; NaN in gives NaN out.  In JSON infinity and NaN are the strings ``"inf"``, ``"-inf"`` and
``"nan"`` (:func:`json_number`): JSON has no such numbers, and null means "not measured".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5


class TensorMetrics(NamedTuple):
    """How far a tensor is from the exact one; see :func:`tensor_metrics`."""

    cosine: float
    rel_l1: float
    rmse: float
    max_abs: float

    @property
    def score(self) -> float:
        """:func:`score` of the cosine and the relative L1."""
        return score(self.cosine, self.rel_l1)


def tensor_metrics(actual: Tensor, exact: Tensor) -> TensorMetrics:
    """Every metric of two tensors of one shape, with one transfer from the device.

    Raises:
        ValueError: the shapes differ or the tensors are empty.
    """
    x, y = _pair(actual, exact)
    difference = x - y
    sums = torch.stack(
        [
            x.dot(y),
            x.dot(x),
            y.dot(y),
            difference.abs().sum(),
            y.abs().sum(),
            difference.dot(difference),
            difference.abs().max(),
        ]
    )
    xy, xx, yy, error, size, squares, largest = sums.tolist()
    # The true value lies in [-1, 1]; rounding may leave it by an ulp.
    denominator = math.sqrt(xx) * math.sqrt(yy)
    if denominator:
        cosine = xy / denominator
        cosine = max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else math.nan
    else:
        cosine = 1.0 if xx == yy else 0.0 if xx == xx and yy == yy else math.nan
    if size:
        rel_l1 = error / size
    else:
        rel_l1 = 0.0 if error == 0 else math.inf if error == error else math.nan
    return TensorMetrics(cosine, rel_l1, math.sqrt(squares / x.numel()), largest)


def cosine(actual: Tensor, exact: Tensor) -> float:
    """Cosine similarity of the flattened tensors."""
    return tensor_metrics(actual, exact).cosine


def rel_l1(actual: Tensor, exact: Tensor) -> float:
    """``sum |actual - exact| / sum |exact|``."""
    return tensor_metrics(actual, exact).rel_l1


def rmse(actual: Tensor, exact: Tensor) -> float:
    """Root of the mean squared difference."""
    return tensor_metrics(actual, exact).rmse


def max_abs(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference."""
    return tensor_metrics(actual, exact).max_abs


def score(cosine: float, rel_l1: float) -> float:
    """``cos * (1 - L1)``, by which SageAttention chooses its kernel (2410.02367 section 4.5)."""
    return cosine * (1.0 - rel_l1)


def psnr(picture: Tensor, reference: Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of tensors of one shape; infinite if they are equal.

    Args:
        picture, reference: any shape; values span ``data_range``.
        data_range: distance of the smallest and the largest possible value.
    """
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    error = rmse(picture, reference)
    if error == 0:
        return math.inf
    return 20 * (math.log10(data_range) - math.log10(error)) if error == error else math.nan


def ssim(picture: Tensor, reference: Tensor, data_range: float = 1.0) -> float:
    """Structural similarity with a Gaussian window of 11 pixels, sigma 1.5 (Wang et al., 2004).

    Mean over the channels and over the positions where the window fits.

    Args:
        picture, reference: ``[C, H, W]``, height and width at least 11.
        data_range: distance of the smallest and the largest possible value.
    """
    if picture.shape != reference.shape or picture.ndim != 3:
        raise ValueError(
            "pictures must both have shape [C, H, W], "
            f"got {tuple(picture.shape)} and {tuple(reference.shape)}"
        )
    if min(picture.shape[1:]) < SSIM_WINDOW:
        raise ValueError(
            f"pictures must have at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, "
            f"got {picture.shape[1]} x {picture.shape[2]}"
        )
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    dtype = _wide(picture)
    x, y = picture.to(dtype)[:, None], reference.to(picture.device, dtype)[:, None]
    offsets = torch.arange(SSIM_WINDOW, dtype=dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    window = window / window.sum()

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.mean().item()


def latent_cosine(latents: Tensor, reference: Tensor) -> float:
    """Mean over the batch of the cosine similarity of each sample's latent, ``[B, ...]``."""
    if latents.shape != reference.shape or not latents.ndim or not len(latents):
        raise ValueError(
            "latents must have the same shape [B, ...], "
            f"got {tuple(latents.shape)} and {tuple(reference.shape)}"
        )
    pairs = zip(latents, reference, strict=True)
    return sum(cosine(x, y) for x, y in pairs) / len(latents)


def json_number(value: float | None) -> float | str | None:
    """A number that JSON can hold; infinity and NaN become strings."""
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def number_from_json(value: float | str | None) -> float | None:
    """Inverse of :func:`json_number`."""
    return None if value is None else float(value)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _pair(actual: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    if actual.shape != exact.shape:
        raise ValueError(
            f"tensors must have the same shape, got {tuple(actual.shape)} and {tuple(exact.shape)}"
        )
    if not actual.numel():
        raise ValueError("tensors must not be empty")
    dtype = _wide(actual)
    return (
        actual.detach().to(dtype).flatten(),
        exact.detach().to(actual.device, dtype).flatten(),
    )
