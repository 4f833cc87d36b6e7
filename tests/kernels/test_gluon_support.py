"""What the Gluon kernel serves, as data, and the token orders of its operands."""

import pytest
import torch

from sage_diffusion.kernels.attention.gluon_support import unsupported
from sage_diffusion.kernels.formats import Precision, unpack_fp4
from sage_diffusion.kernels.quantize import permute, reference
from sage_diffusion.kernels.spec import AttentionSpec


@pytest.mark.parametrize(
    "spec,capability,hip,head_dim,reason",
    [
        ("int4/fp8-fast", (8, 9), None, 128, None),
        ("int4/int8", (8, 0), None, 1, None),
        ("int8/fp8-fast", (12, 0), None, 64, None),
        (
            "int4/int8",
            (12, 0),
            None,
            64,
            "int4 tensor cores exist on sm_80 .. sm_89, not on sm_120",
        ),
        ("int4/fp8-fast", (8, 6), None, 64, "fp8 needs sm_89 or newer, found sm_86"),
        ("int8/int8", (9, 0), None, 64, "found sm_90"),
        ("int8/int8", (7, 5), None, 64, "found sm_75"),
        ("int8/int8", None, "gfx942", 64, "needs an NVIDIA card, found gfx942"),
        ("int8/fp16", (8, 9), None, 64, "reads P and V in int8, fp4, or fp8 with the fp16"),
        ("fp4/fp8-fast", (12, 0), None, 64, None),
        ("fp4/fp4", (12, 0), None, 128, None),
        ("int8/fp4", (8, 9), None, 64, "fp4 tensor cores behind mma.sync exist on sm_12x"),
        ("fp4/fp8-fast", (8, 9), None, 64, "fp4 tensor cores behind mma.sync exist on sm_12x"),
        ("fp8/fp8", (12, 0), None, 64, "int4, int8 or fp4, not in fp8"),
        ("int4/int8", (8, 0), None, 160, None),
        ("int8/int8", (8, 0), None, 160, "int8 fits into registers up to head_dim 128, got 160"),
    ],
)
def test_unsupported(spec, capability, hip, head_dim, reason):
    got = unsupported(AttentionSpec.parse(spec), capability, hip, head_dim)
    assert (got is None) if reason is None else (reason in got)


def test_two_accumulator_tiles_make_one_operand_word():
    """A thread's four neighbours in V's storage are its columns of two n8 tiles of S."""
    order = permute.token_order().tolist()
    assert sorted(order) == list(range(32))
    for thread in range(4):
        for half in range(2):
            at = 16 * half + 4 * thread
            first = 16 * half + 2 * thread
            assert order[at : at + 4] == [first, first + 1, first + 8, first + 9]


def test_columns_of_a_thread_stand_side_by_side():
    order = permute.column_order().tolist()
    assert sorted(order) == list(range(64))
    for position, column in enumerate(order):
        assert column % 8 // 2 == position // 16  # mma.m16n8's accumulator layout


def test_one_fp4_scale_spans_two_threads():
    """A word of P's operand is one thread's columns of four n8 tiles; two words share a scale."""
    order = permute.fp4_token_order()
    assert order.sort().values.tolist() == list(range(32))
    for thread in range(4):
        word = order[8 * thread : 8 * thread + 8].tolist()
        assert word == [8 * j + 2 * thread + c for j in range(4) for c in range(2)]
    groups = permute.group_tokens(torch.arange(64))
    for i, group in enumerate(groups):
        stored = order.repeat(2)[16 * i : 16 * i + 16] + 32 * (i // 2)
        assert group.tolist() == stored.sort().values.tolist()
    assert torch.equal(permute.ungroup_tokens(groups), torch.arange(64))


def test_permuted_fp4_value_round_trips():
    v = torch.randn(1, 2, 70, 40, generator=torch.Generator().manual_seed(0))
    value = reference.quantize_value(v, Precision.FP4)
    permuted = permute.permute_value(value)
    tokens = permute.fp4_token_order() + 32
    want = unpack_fp4(value.data)[..., tokens]
    assert torch.equal(unpack_fp4(permuted.data)[..., 32:64], want)
    # Micro scale i of a tile belongs to 16 stored positions.
    assert torch.equal(permuted.micro[:, :, 1, :, 3].float(), value.micro[..., 7].float())
    back = permute.restore_value(permuted)
    assert torch.equal(back.data, value.data)
    assert torch.equal(back.micro.float(), value.micro.float())


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_permuted_value_round_trips(precision):
    v = torch.randn(1, 2, 70, 40, generator=torch.Generator().manual_seed(0))
    value = reference.quantize_value(v, precision)
    permuted = permute.permute_value(value)
    token = permute.token_order()[5] + 32
    assert torch.equal(permuted.data[..., 32 + 5].float(), value.data[..., token].float())
    assert not torch.equal(permuted.data.float(), value.data.float())
    assert torch.equal(permute.restore_value(permuted).data.float(), value.data.float())
