"""The twin of the decode kernels against float64, and the merging of parts."""

import pytest
import torch
from kv_sides import assert_close, data, exact, side

from sage_diffusion.kernels.kv import layout, reference
from sage_diffusion.kernels.kv.sides import check

SCALE = 0.125


@pytest.mark.parametrize("tile", [16, 100, 4096])
@pytest.mark.parametrize("k_width,v_width", [(8, 4), (3, 2), (2, layout.TERNARY), (1, 1)])
def test_twin_is_attention_on_what_the_codes_stand_for(k_width, v_width, tile):
    q, k, v = data(2, 2, 3, 2, 64, 130)
    ks, vs = side(k, k_width, "channel", 24), side(v, v_width, "token", 32)
    got = reference.decode(q, ks, vs, SCALE, tile=tile)
    assert_close(got, exact(q, ks.read(0, 130), vs.read(0, 130), SCALE), 1e-5)


@pytest.mark.parametrize("axes", [("token", "token"), ("channel", "channel"), ("token", "channel")])
def test_twin_takes_any_axes(axes):
    q, k, v = data(1, 2, 1, 1, 64, 96)
    ks, vs = side(k, 4, axes[0], 32), side(v, 4, axes[1], 16)
    got = reference.decode(q, ks, vs, SCALE, tile=32)
    assert_close(got, exact(q, ks.read(0, 96), vs.read(0, 96), SCALE), 1e-5)


def masks(batch, heads, queries, tokens):
    g = torch.Generator().manual_seed(1)
    seen = torch.rand(batch, heads, queries, tokens, generator=g) < 0.5
    seen[:, :, 0] = False  # sees nothing
    return {
        "keys": torch.arange(tokens) < tokens - 9,
        "bool": seen,
        "additive": torch.where(seen, torch.randn(seen.shape, generator=g), -torch.inf),
    }


@pytest.mark.parametrize("kind", ["keys", "bool", "additive"])
def test_twin_masks(kind):
    q, k, v = data(2, 1, 2, 3, 64, 72)
    ks, vs = side(k, 4, "channel", 24), side(v, 4, "token", 64)
    mask = masks(2, 2, 3, 72)[kind]
    got = reference.decode(q, ks, vs, SCALE, mask, tile=24)
    assert_close(got, exact(q, ks.read(0, 72), vs.read(0, 72), SCALE, mask), 1e-5)


def test_parts_merge_to_the_whole():
    q, k, v = data(1, 2, 2, 1, 64, 96)
    ks, vs = side(k, 4, "channel", 32), side(v, 4, "token", 32)
    tail_k, tail_v = k[:, :, :40], v[:, :, :40]
    nothing = torch.zeros(1, 4, 1, 64), torch.full((1, 4, 1), -torch.inf)
    merged = reference.merge(
        (reference.decode(q, ks, vs, SCALE), exact(q, tail_k, tail_v, SCALE), nothing)
    )
    whole = [torch.cat((a.read(0, 96), b), 2) for a, b in ((ks, tail_k), (vs, tail_v))]
    assert_close(merged, exact(q, *whole, SCALE), 1e-5)


def test_a_side_must_fit():
    _, k, _ = data(1, 2, 1, 1, 64, 96)
    good = side(k, 4, "channel", 32)
    check("k", good)
    with pytest.raises(ValueError, match="k: 97 tokens in groups of 32 per channel do not fit"):
        check("k", good._replace(tokens=97))
    with pytest.raises(ValueError, match="at width 3 must have 6 words, got 8"):
        check("k", good._replace(width=3))
    with pytest.raises(TypeError, match="int32 words"):
        check("k", good._replace(words=good.words.long()))
    with pytest.raises(ValueError, match="start must be a multiple of 32, got 16"):
        good.read(16, 64)
