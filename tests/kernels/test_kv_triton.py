"""Packing, unpacking, merging and the portable decode kernel, as compiled, on a simulated card."""

import math

import pytest
import torch
from helpers import card
from kv_sides import assert_close, data, exact, far, side
from test_kv_decode import SCALE, masks

from sage_diffusion.kernels.kv import layout, reference, tuning
from sage_diffusion.kernels.kv.sides import Turn

triton = pytest.importorskip("sage_diffusion.kernels.kv.triton")


@pytest.mark.parametrize("width,dim", [(8, 64), (4, 80), (3, 128), (2, 64), (1, 96), (1, 256)])
def test_packing_is_bit_exact(width, dim):
    g = torch.Generator().manual_seed(dim)
    shape = (2, 19, dim)
    codes = torch.randint(0, layout.levels(width), shape, dtype=torch.uint8, generator=g)
    with card(89):
        words = triton.pack(codes, width)
        back = triton.unpack(words, width, dim)
    assert torch.equal(words, layout.pack(codes, width))
    assert torch.equal(back, codes)


def test_nothing_is_packed_to_nothing():
    codes = torch.zeros(2, 0, 64, dtype=torch.uint8)
    with card(89) as gpu:
        assert triton.unpack(triton.pack(codes, 3), 3, 64).shape == (2, 0, 64)
    assert not gpu.launches


CASES = {
    "sm80-96": (80, (1, 1, 3, 1, 96, 70), (3, 4), (24, 32), 1, "keys", "fp8"),
    "sm90-splits": (90, (1, 2, 2, 2, 64, 200), (2, 2), (40, 64), 2, "additive", "fp16"),
    "sm120-one": (120, (2, 1, 1, 1, 64, 1), (1, layout.TERNARY), (1, 64), 1, "", "fp16"),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_decode(name):
    cc, shape, widths, groups, split, kind, form = CASES[name]
    batch, heads, group, queries, _, tokens = shape
    q, k, v = data(*shape)
    ks = side(k, widths[0], "channel", groups[0], form)
    vs = side(v, widths[1], "token", groups[1], form)
    mask = masks(batch, heads * group, queries, tokens)[kind] if kind else None
    with card(cc):
        got = triton.merge(*triton.decode(q, ks, vs, SCALE, mask, split=split))
    assert_close(got, exact(q, ks.read(0, tokens), vs.read(0, tokens), SCALE, mask), 1e-3)


def test_heads_may_lie_beyond_32_bits():
    q, k, v = data(1, 2, 1, 1, 64, 32)
    ks, vs = side(k, 2, "channel", 32), side(v, 2, "token", 64)
    with card(89):
        want = triton.decode(q, ks, vs, SCALE, split=1)
        got = triton.decode(q, far(ks), vs, SCALE), triton.decode(q, ks, far(vs), SCALE)
    assert all(torch.equal(a, b) for one in got for a, b in zip(want, one, strict=True))


def test_merging_splits_of_which_some_saw_nothing():
    g = torch.Generator().manual_seed(0)
    parts, lse = torch.randn(3, 1, 2, 2, 64, generator=g), torch.randn(3, 1, 2, 2, generator=g)
    lse[1] = -torch.inf
    lse[:, 0, 0, 0] = -torch.inf
    parts[lse == -torch.inf] = 0.0
    with card(80):
        got = triton.merge(parts, lse)
    natural = lse * math.log(2)
    want = reference.merge(list(zip(parts, natural, strict=True)))
    assert_close(got, want, 1e-6)


def turning(dim, batch):
    angles = 1e5 ** -(torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    return Turn(angles, 1.1, torch.tensor([40, -7])[:batch])


ROPE_CASES = {
    "sm80-96": (80, (1, 1, 3, 1, 96, 150), (3, 4), (32, 32), 2, "keys", "fp8"),
    "sm90-group-of-24": (90, (2, 1, 2, 2, 64, 200), (2, 2), (24, 64), 3, "additive", "fp16"),
    "sm120-long-group": (120, (1, 2, 1, 1, 64, 300), (4, 2), (128, 32), 2, "", "fp16"),
}


@pytest.mark.parametrize("name", ROPE_CASES)
def test_keys_before_rope_are_turned_in_the_kernel(name):
    cc, shape, widths, groups, split, kind, form = ROPE_CASES[name]
    batch, heads, group, queries, dim, tokens = shape
    q, k, v = data(*shape)
    turn = turning(dim, batch)
    ks = side(k, widths[0], "channel", groups[0], form)
    vs = side(v, widths[1], "token", groups[1], form)
    mask = masks(batch, heads * group, queries, tokens)[kind] if kind else None
    with card(cc):
        got = triton.merge(*triton.decode(q, ks, vs, SCALE, mask, turn, split=split))
    keys = turn.keys(ks.read(0, tokens), 0)
    assert_close(got, exact(q, keys, vs.read(0, tokens), SCALE, mask), 2e-3)


def test_groups_that_tiles_do_not_divide_are_not_turned():
    said = "tiles of 32 tokens must divide K's groups, got 40"
    assert tuning.refuse_turn("sm_90", 40, 64) == said
    assert tuning.refuse_turn("sm_90", 24, 64) is None is tuning.refuse_turn("sm_90", 64, 64)
    assert tuning.refuse_turn("gfx1201", 48, 64) is None  # tiles of 16
    assert "registers of RDNA 3" in tuning.refuse_turn("gfx1100", 32, 64)
