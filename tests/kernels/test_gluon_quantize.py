"""The quantizer that stores V's tokens in the tensor cores' order, as compiled."""

import pytest

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
