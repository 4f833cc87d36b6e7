"""The decode kernel for NVIDIA cards, as compiled, on a simulated card.

The simulated card stops at every access out of bounds and every race.
"""

import pytest
import torch
from helpers import card
from kv_sides import assert_close, data, exact, far, side
from test_kv_decode import SCALE, masks

gluon = pytest.importorskip("sage_diffusion.kernels.kv.gluon")

from sage_diffusion.kernels.kv import layout, triton, tuning  # noqa: E402

#: Card; batch, KV heads, query heads of each, queries, D, tokens; widths of K and V; tokens that
#: share a step of K, channels that share one of V; splits; mask; form of steps and zeros.
CASES = {
    "sm80-2bit": (80, (1, 2, 8, 1, 128, 384), (2, 2), (128, 128), 2, "", "fp16"),
    "sm80-odd": (80, (2, 1, 3, 1, 64, 300), (4, 3), (60, 32), 1, "keys", "fp16"),
    "sm80-16rows": (80, (1, 1, 16, 1, 64, 128), (8, 8), (64, 64), 1, "", "fp16"),
    "sm86-partial": (86, (1, 1, 2, 1, 64, 100), (2, 4), (128, 64), 1, "", "fp16"),
    "sm89-3bit": (89, (1, 1, 8, 1, 128, 128), (3, 2), (128, 32), 1, "", "fp8"),
    "sm89-1bit": (89, (1, 1, 2, 1, 64, 64), (1, 1), (64, 64), 1, "", "fp16"),
    "sm90-queries": (90, (1, 2, 3, 7, 64, 96), (2, layout.TERNARY), (32, 16), 1, "bool", "fp16"),
    "sm90-video": (90, (1, 1, 1, 2, 128, 48), (layout.TERNARY, 2), (24, 128), 1, "additive", "fp8"),
    "sm120-256": (120, (1, 1, 4, 1, 256, 64), (4, 1), (32, 256), 1, "", "fp16"),
    "sm120-one": (120, (1, 1, 1, 1, 64, 1), (2, 2), (1, 64), 1, "", "fp16"),
    "sm120-1bit": (120, (1, 1, 1, 1, 128, 40), (1, 3), (40, 64), 1, "", "fp8"),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel(name):
    cc, shape, widths, groups, split, kind, form = CASES[name]
    batch, heads, group, queries, _, tokens = shape
    q, k, v = data(*shape)
    ks = side(k, widths[0], "channel", groups[0], form)
    vs = side(v, widths[1], "token", groups[1], form)
    mask = masks(batch, heads * group, queries, tokens)[kind] if kind else None
    before = [x.clone() for x in (q, ks.words, vs.words)]
    with card(cc) as gpu:
        parts = gluon.decode(q, ks, vs, SCALE, mask, split=split)
        got = triton.merge(*parts)
    assert [name for name, _ in gpu.launches] == ["decode_kernel", "_merge_kernel"]
    assert parts[0].shape[0] == gpu.launches[0][1][0] <= split
    assert_close(got, exact(q, ks.read(0, tokens), vs.read(0, tokens), SCALE, mask), 3e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, ks.words, vs.words), strict=True))


def test_a_store_with_room_to_grow_is_read_where_it_is():
    """What lies behind the last token may be anything, NaN in steps too."""
    q, k, v = data(1, 2, 1, 1, 64, 32)
    ks, vs = side(k, 2, "channel", 32), side(v, 2, "token", 64)

    def roomy(x, rows, fill):
        store = torch.full((1, 2, rows, x.shape[3]), fill, dtype=x.dtype)
        store[:, :, : x.shape[2]] = x
        return store[:, :, : x.shape[2]]

    wide = [
        s._replace(
            words=roomy(s.words, 96, -1),
            step=roomy(s.step, 96, torch.nan),
            zero=roomy(s.zero, 96, torch.nan),
        )
        for s in (ks, vs)
    ]
    with card(89):
        want, got = (gluon.decode(q, *sides, SCALE, split=1) for sides in ((ks, vs), wide))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_heads_may_lie_beyond_32_bits():
    q, k, v = data(1, 2, 1, 1, 64, 32)
    ks, vs = side(k, 2, "channel", 32), side(v, 2, "token", 64)
    with card(89):
        want = gluon.decode(q, ks, vs, SCALE, split=1)
        got = gluon.decode(q, far(ks), vs, SCALE, split=1), gluon.decode(q, ks, far(vs), SCALE)
    assert all(torch.equal(a, b) for one in got for a, b in zip(want, one, strict=True))


def test_half_precision_queries():
    q, k, v = data(1, 1, 2, 1, 64, 32)
    ks, vs = side(k, 4, "channel", 32), side(v, 4, "token", 64)
    with card(80):
        got = triton.merge(*gluon.decode(q.bfloat16(), ks, vs, SCALE, split=1))
    want = exact(q.bfloat16(), ks.read(0, 32), vs.read(0, 32), SCALE)
    assert_close(got, want, 3e-4)


@pytest.mark.parametrize(
    "tokens,group,tile,count",
    [(1, 128, 128, 1), (312, 312, 64, 5), (256, 128, 64, 4), (100, 24, 16, 9)],
)
def test_tiles_end_with_groups(tokens, group, tile, count):
    assert tuning.tiles(tokens, group, tile) == count


def test_launches_fit_registers_and_groups():
    for width in layout.WIDTHS:
        for dim in (64, 128, 256):
            got = tuning.launch(dim, width, width, 8, 4096)
            assert got.tile * dim * layout.bits(width) <= 128 * 128 * 2 and got.rows == 8
    assert tuning.launch(128, 2, 2, 9, 24).tile == 32
    assert tuning.launch(64, 1, 1, 9, 24).rows == 16
    whole = tuning.launch(128, 2, 2, 8, 128)
    assert (whole.tile, tuning.launch(128, 2, 2, 8, 128, 4).tile) == (128, 64)
    assert tuning.shorter(whole, 1024, 8, 132).tile == 16
    assert tuning.shorter(whole, 1 << 20, 8, 132) == whole
    assert tuning.splits(1000, 8, 132, 4) == 50
    assert tuning.splits(3, 1, 132, 4) == 1
