"""Codes of keys and values in groups: error, rounding of steps and zeros, ternary and sign."""

import pytest
import torch

from sage_diffusion.kernels.kv import layout
from sage_diffusion.kernels.kv.quantize import decode, dequantize, quantize

MINMAX = (8, 4, 3, 2)


def data(*shape, seed=0, mean=1.0):
    g = torch.Generator().manual_seed(seed)
    spread = 0.2 + 3.0 * torch.rand(shape[-1], generator=g)
    return torch.randn(shape, generator=g) * spread + mean * torch.randn(shape[-1], generator=g)


def groups_of(x, axis, group):
    """``[.., group]`` last, from ``[T, D]``."""
    if axis == "token":
        return x.unflatten(-1, (-1, group))
    return x.transpose(-1, -2).unflatten(-1, (-1, group))


@pytest.mark.parametrize("form", ["fp16", "fp8"])
@pytest.mark.parametrize("axis,group", [("token", 32), ("token", 64), ("channel", 24)])
@pytest.mark.parametrize("width", MINMAX)
def test_every_value_is_within_half_a_step(width, axis, group, form):
    x = data(2, 48, 64)
    got = quantize(x, width, axis, group, form)
    shape = (2, 48, 64 // group) if axis == "token" else (2, 2, 64)
    assert got.step.shape == got.zero.shape == shape
    assert got.codes.shape == x.shape and got.codes.dtype == torch.uint8
    assert int(got.codes.max()) == layout.levels(width) - 1
    step, _ = decode(got.step, got.zero, width)
    step = step if axis == "token" else step.transpose(-1, -2)
    error = groups_of((dequantize(got, width, axis) - x).abs(), axis, group)
    # The rounding of a 16-bit step cuts off 2^-11 of the range.
    slack = 0.5 + (layout.levels(width) * 2.0**-9 if form == "fp16" else 1e-3)
    assert (error <= step[..., None] * slack).all()


@pytest.mark.parametrize("width", MINMAX)
def test_eight_bits_round_a_step_to_nearest_and_widen_few(width):
    x = data(64, 128, mean=0.0)
    eight, full = (quantize(x, width, "token", 64, form) for form in ("fp8", "fp16"))
    ratio = decode(eight.step, None, width)[0] / decode(full.step, None, width)[0]
    assert ratio.min() >= 15 / 16 - 1e-3 and ratio.max() < 1.26
    if width < 4:  # where 1/16 of a step and of a zero are less than half a step
        assert ratio.max() <= 17 / 16 + 1e-3 and (ratio < 1).any()


def test_a_ternary_scale_has_the_least_squared_error():
    x = data(20, 64, mean=0.0)
    got = quantize(x, layout.TERNARY, "token", 32)
    assert got.zero is None
    error = groups_of((dequantize(got, layout.TERNARY, "token") - x).square(), "token", 32).sum(-1)
    parts = groups_of(x, "token", 32)
    best = torch.full_like(error, torch.inf)
    for k in range(1, 33):  # every threshold, by definition
        chosen = parts.abs() >= parts.abs().topk(k, -1).values[..., -1:]
        scale = (parts.abs() * chosen).sum(-1, keepdim=True) / k
        best = torch.minimum(best, (parts - scale * parts.sign() * chosen).square().sum(-1))
    assert torch.allclose(error, best, rtol=1e-3)


def test_one_bit_is_the_sign_and_the_mean_magnitude():
    x = data(20, 64, mean=0.0)
    got = quantize(x, 1, "channel", 10)
    back = dequantize(got, 1, "channel")
    assert torch.equal(back > 0, x > 0)
    want = groups_of(x.abs(), "channel", 10).mean(-1)
    assert torch.allclose(groups_of(back.abs(), "channel", 10)[..., 0], want, rtol=1e-3)


@pytest.mark.parametrize("form", ["fp16", "fp8"])
@pytest.mark.parametrize("width", layout.WIDTHS)
def test_constant_and_extreme_groups_stay_finite(width, form):
    x = torch.zeros(5, 64)
    x[1] = 3.0
    x[2] = -1e-9
    x[3] = torch.linspace(-1e9, 1e9, 64)
    x[4, 0] = 6e4
    back = dequantize(quantize(x, width, "token", 32, form), width, "token")
    assert back.isfinite().all()
    assert back[0].abs().max() < 1e-4
    if width in MINMAX:
        assert torch.allclose(back[1], x[1], rtol=1 / 256 if form == "fp8" else 1e-3)


def test_input_may_be_half_or_empty_and_is_not_changed():
    x = data(32, 64).bfloat16()
    before = x.clone()
    a, b = quantize(x, 4, "channel", 32), quantize(x.float(), 4, "channel", 32)
    assert torch.equal(a.codes, b.codes) and torch.equal(x, before)
    empty = quantize(x[:0], 2, "token", 32)
    assert dequantize(empty, 2, "token").shape == (0, 64)


def test_bad_input_is_refused():
    x = data(30, 64)
    with pytest.raises(ValueError, match="group must divide the 30 tokens, got 24"):
        quantize(x, 2, "channel", 24)
    with pytest.raises(ValueError, match="group must divide the 64 channels, got 0"):
        quantize(x, 2, "token", 0)
    with pytest.raises(ValueError, match="axis must be token or channel, got 'row'"):
        quantize(x, 2, "row", 32)
    with pytest.raises(ValueError, match="form must be fp16 or fp8, got 'fp32'"):
        quantize(x, 2, "token", 32, "fp32")
    with pytest.raises(ValueError, match="width must be one of"):
        quantize(x, 6, "token", 32)
