"""The Torch quantizers: rounding, scales, rotation, clipping."""

import pytest
import torch
from helpers import fused_view

from sage_diffusion.kernels.formats import Precision, unpack_int4
from sage_diffusion.kernels.quantize import reference
from sage_diffusion.kernels.quantize.limits import SHRINKAGE
from sage_diffusion.plan.signs import step_seed

QK = [Precision.INT8, Precision.INT4, Precision.FP8, Precision.FP4]
PV = [Precision.INT8, Precision.FP8, Precision.FP4]


def test_int8_rounds_ties_to_even():
    x = torch.zeros(1, 1, 1, 64)
    x[..., :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    codes = reference.quantize_rows(x, Precision.INT8)
    assert codes.data[0, 0, 0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    assert codes.scale.item() == 1.0


@pytest.mark.parametrize("precision", QK)
def test_zero_rows_have_a_plain_scale(precision):
    x = torch.zeros(1, 1, 3, 40)
    codes = reference.quantize_rows(x, precision)
    assert torch.equal(codes.scale, torch.ones(1, 1, 3))
    assert torch.equal(reference.dequantize_rows(codes), torch.zeros(1, 1, 3, 64))


@pytest.mark.parametrize("precision", PV)
def test_zero_channels_have_a_plain_scale(precision):
    v = torch.randn(1, 1, 70, 8)
    v[..., 3] = 0.0
    codes = reference.quantize_value(v, precision)
    assert codes.scale[0, 0, 3] == 1.0
    assert torch.equal(reference.dequantize_value(codes)[..., 3], v[..., 3])


@pytest.mark.parametrize(
    "precision,worst,block",
    [
        (Precision.INT8, 0.5 / 127, 1),
        (Precision.INT8, 0.5 / 127, 64),
        (Precision.INT4, 0.5 / 7, 1),
        (Precision.INT4, 0.5 / 7, 64),
        (Precision.FP8, 2**-4, 1),
        (Precision.FP8, 2**-4, 64),
        (Precision.FP4, 0.25, 1),  # always one scale per row
    ],
)
def test_rows_come_back_within_half_a_step(precision, worst, block):
    """INT: half a step of the largest; FP8: half an ulp; FP4: half the widest gap, 4 to 6."""
    x = fused_view(2, 3, 100, 64, seed=0)
    codes = reference.quantize_rows(x, precision, block=block)
    limit = x.float().abs().amax((2, 3), keepdim=True) if block > 1 else x.abs().amax(-1, True)
    error = (reference.dequantize_rows(codes) - x.float()).abs()
    assert (error <= limit.float() * worst * 1.001).all()


@pytest.mark.parametrize("precision", PV)
@pytest.mark.parametrize("smooth", [False, True])
def test_values_come_back(precision, smooth):
    v = fused_view(1, 2, 70, 40, seed=1) + 8
    mean = reference.token_mean(v) if smooth else None
    codes = reference.quantize_value(v, precision, mean=mean)
    padding = codes.data.view(torch.uint8)[..., 70 // (2 if precision is Precision.FP4 else 1) :]
    assert not padding.any()
    step = {Precision.INT8: 0.5 / 127, Precision.FP8: 2**-4, Precision.FP4: 0.26}[precision]
    top = (v.float() - (0 if mean is None else mean[:, :, None])).abs().amax(2, True)
    assert ((reference.dequantize_value(codes) - v.float()).abs() <= top * step).all()


def test_fast_values_leave_room_for_an_fp16_sum():
    v = fused_view(1, 1, 64, 16, seed=2)
    codes = reference.quantize_value(v, Precision.FP8, fast=True).data.float()
    assert codes.abs().max() == 2.25
    assert codes.abs().amax() * 448 * 64 < torch.finfo(torch.float16).max


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rotation_is_orthogonal(dim):
    matrix = reference.rotate(torch.eye(dim))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-6, rtol=0)
    signs = reference.hadamard_signs(dim, None, torch.device("cpu"))
    assert 0.35 < (signs > 0).float().mean() < 0.65
    # A constant row, Hadamard's worst case, is spread over the channels by the signs.
    assert reference.rotate(torch.ones(1, dim)).abs().max() < 0.5 * dim**0.5


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_signs_of_every_seed_are_as_good_as_drawn_ones(dim):
    """Rotations of different seeds differ in half of the signs, and by no pattern."""
    seeds = torch.tensor([step_seed(0, step) for step in range(200)], dtype=torch.int32)
    signs = torch.stack([reference.hadamard_signs(dim, seed, seed.device) for seed in seeds])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    others = ~torch.eye(200, dtype=torch.bool)
    agree = (signs @ signs.T / dim**0.5)[others]  # of drawn ones: a normal variable
    assert 0.9 < agree.std() < 1.1 and agree.abs().max() < 5.5
    # From one seed to the next: spread over the channels too, as a constant row is.
    moved = torch.cat([signs, signs[1:] * signs[:-1]])
    assert reference.rotate(moved).abs().amax(-1).mean() < 3.3
    matrix = reference.rotate(torch.eye(dim), seeds[7])
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-6, rtol=0)
    zero = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(reference.rotate(torch.eye(dim), zero), reference.rotate(torch.eye(dim)))


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.FP4])
def test_clipping_never_raises_the_squared_error(precision):
    x = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(3))
    x[..., 0, 0] = 30.0

    def error(clip):
        codes = reference.quantize_rows(x, precision, clip=clip)
        return ((reference.dequantize_rows(codes) - x) ** 2).sum(-1)

    plain, clipped = error(False), error(True)
    # The search counts in steps of 2^-14 of a squared step.
    assert (clipped <= plain * 1.001).all()
    assert clipped.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("precision", SHRINKAGE)
def test_clipping_shrinks_rows_by_a_known_share(precision, dim):
    torch.manual_seed(0)
    x = torch.randn(1, 1, 2**19 // dim, dim)
    found = reference.dequantize_rows(reference.quantize_rows(x, precision, clip=True))
    share = 1 - ((found * x).sum() / x.square().sum()).item()
    assert share == pytest.approx(SHRINKAGE[precision][dim], abs=3e-4)


def test_clipping_lowers_the_squared_error_of_fp4_values():
    v = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(3))
    plain, clipped = (
        (reference.dequantize_value(reference.quantize_value(v, Precision.FP4, clip=c)) - v) ** 2
        for c in (False, True)
    )
    assert clipped.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("precision", QK)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e15, 3e38])
def test_extreme_inputs_stay_finite(precision, magnitude):
    x = torch.randn(1, 1, 5, 64, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
    x = (x * magnitude).to(torch.bfloat16)
    mean = reference.token_mean(x)
    assert mean.isfinite().all()
    codes = reference.quantize_rows(x, precision, mean=mean, rotation=True, clip=True)
    assert reference.dequantize_rows(codes).isfinite().all()
    assert codes.scale.isfinite().all() and (codes.scale > 0).all()


@pytest.mark.parametrize("precision", QK)
def test_caller_tensors_are_unchanged(precision):
    x = fused_view(1, 2, 65, 40, seed=5)
    mean = reference.block_mean(x, 128)
    before, mean_before = x.clone(), mean.clone()
    reference.quantize_rows(x, precision, mean=mean, rotation=True, clip=True, multiplier=0.1)
    assert torch.equal(x, before) and torch.equal(mean, mean_before)


def test_block_mean_counts_the_tokens_of_a_short_block():
    x = fused_view(1, 2, 200, 8, seed=6).float()
    means = reference.block_mean(x, 128)
    torch.testing.assert_close(means[:, :, 0], x[:, :, :128].mean(2))
    torch.testing.assert_close(means[:, :, 1], x[:, :, 128:].mean(2))


def test_int4_codes_stay_symmetric():
    x = fused_view(1, 1, 64, 64, seed=7)
    codes = unpack_int4(reference.quantize_rows(x, Precision.INT4, clip=True).data)
    assert codes.min() >= -7 and codes.max() <= 7
