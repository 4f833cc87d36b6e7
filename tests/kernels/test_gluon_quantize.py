"""The quantizer that stores V's tokens in the tensor cores' order, as compiled."""

import pytest
import torch

pytest.importorskip("triton")

from helpers import card, fused_view, same_bits

from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.quantize import reference, triton
from sage_diffusion.kernels.quantize.permute import permute_value


@pytest.mark.parametrize("cc,precision", [(80, Precision.INT8), (89, Precision.FP8)])
def test_permuted_value_is_bit_exact(cc, precision):
    v = fused_view(1, 2, 70, 40, 1)
    fast = precision is Precision.FP8
    with card(cc):
        got = triton.quantize_value(v, precision, fast=fast, permuted=True)
    want = permute_value(reference.quantize_value(v, precision, fast=fast))
    assert same_bits(got.data, want.data) and same_bits(got.scale, want.scale)


@pytest.mark.parametrize("cc,dim,dtype", [(100, 64, torch.float16), (120, 40, torch.bfloat16)])
def test_permuted_fp4_value_is_bit_exact(cc, dim, dtype):
    """In two passes: the extremes, and the codes."""
    v = fused_view(1, 2, 70, dim, 1, dtype) + 3
    v[..., 1], v[..., 2, 0] = 0.0, 3e38 if dtype is torch.bfloat16 else 6e4
    options = {"mean": reference.token_mean(v), "clip": True} if cc == 120 else {}
    with card(cc) as gpu:
        got = triton.quantize_value(v, Precision.FP4, permuted=True, **options)
    assert [name for name, _ in gpu.launches] == ["_stats_kernel", "_quantize_value_kernel"]
    want = permute_value(reference.quantize_value(v, Precision.FP4, **options))
    assert same_bits(got.data, want.data) and same_bits(got.scale, want.scale)
    assert same_bits(got.micro, want.micro)
    assert got.precision is Precision.FP4 and got.length == 70
