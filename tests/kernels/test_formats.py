"""Number formats and packing."""

import pytest
import torch
from helpers import same_bits

from sage_diffusion.kernels import formats
from sage_diffusion.kernels.formats import Precision


def test_every_fp4_code_round_trips():
    codes = torch.arange(16, dtype=torch.uint8)
    values = formats.decode_fp4(codes)
    assert values.tolist()[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values.tolist()[9:] == [-0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    assert torch.equal(formats.encode_fp4(values), codes)


def test_fp4_rounds_to_nearest_ties_to_even_and_saturates():
    cases = {
        0.25: 0.0,  # between 0 (code 0) and 0.5 (code 1)
        0.75: 1.0,
        1.25: 1.0,
        1.75: 2.0,
        2.5: 2.0,
        3.5: 4.0,
        5.0: 4.0,
        0.26: 0.5,
        5.01: 6.0,
        100.0: 6.0,
    }
    x = torch.tensor(list(cases))
    want = torch.tensor(list(cases.values()))
    assert torch.equal(formats.decode_fp4(formats.encode_fp4(x)), want)
    assert torch.equal(formats.decode_fp4(formats.encode_fp4(-x)), -want)


def test_nibbles_round_trip_low_first():
    codes = torch.arange(-8, 8, dtype=torch.int8)
    packed = formats.pack_nibbles(codes)
    assert packed[0] == (0x9 << 4 | 0x8)  # -8 in the low, -7 in the high nibble
    assert same_bits(formats.unpack_int4(packed), codes)
    assert torch.equal(
        formats.unpack_fp4(formats.pack_nibbles(torch.arange(16))),
        formats.decode_fp4(torch.arange(16)),
    )


@pytest.mark.parametrize("dim,padded", [(1, 64), (64, 64), (65, 128), (128, 128), (256, 256)])
def test_padded_dim(dim, padded):
    assert formats.padded_dim(dim) == padded


@pytest.mark.parametrize("dim", [0, 257])
def test_padded_dim_refuses(dim):
    with pytest.raises(ValueError, match=f"between 1 and 256, got {dim}"):
        formats.padded_dim(dim)


def test_precision_reads_like_its_name():
    assert str(Precision.INT8) == "int8" and Precision("fp4").bits == 4
    assert {p: p.qmax for p in Precision}[Precision.FP8] == torch.finfo(torch.float8_e4m3fn).max
