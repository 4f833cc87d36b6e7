"""Ids changed by hand, and what they look like."""

import pytest
import torch

from sage_diffusion.vq import Residual, SimVQ, VectorQuantizer
from sage_diffusion.vq.edit import paint, palette, shuffle, swap, touched
from sage_diffusion.vq.families import compact
from sage_diffusion.vq.pictures import code_sheet, token_map, usage_map
from sage_diffusion.vq.tokenizer import TokenizerError


def tiny(quantizer=None):
    torch.manual_seed(0)
    settings = {"widths": [8, 12], "depths": [1, 1]}
    return compact.make(quantizer or SimVQ(6, 50), settings).eval()


def some_ids(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


EVERYWHERE = torch.ones(1, 1, 1, dtype=torch.bool)


def test_a_mask_touches_every_token_that_it_is_painted_on():
    mask = torch.zeros(24, 16)
    mask[7, 15] = 1
    grid = touched(mask, 3, 2)
    assert grid.tolist() == [[[False, True], [False, False], [False, False]]]
    assert touched(torch.full((1, 5, 7), 0.4), 3, 2).sum() == 0
    assert touched(torch.ones(2, 3, 2), 6, 4).shape == (2, 6, 4)  # a coarser mask than tokens


@pytest.mark.parametrize("levels", [(), (2,)])
def test_only_masked_tokens_change(levels):
    ids = some_ids(2, 3, 4, *levels)
    before, where = ids.clone(), torch.zeros(1, 3, 4, dtype=torch.bool)
    where[0, 1] = True
    for changed in (
        paint(ids, where, 7, 50),
        swap(ids, where, int(ids.flatten()[0]), int(ids[0, 1, 0].flatten()[0]), 50),
        shuffle(ids, where, 3),
    ):
        assert torch.equal(changed[:, [0, 2]], ids[:, [0, 2]])
        assert not torch.equal(changed, ids)
    assert (paint(ids, where, 7, 50)[:, 1] == 7).all()
    moved = shuffle(ids, where, 3)
    assert torch.equal(moved, shuffle(ids, where, 3))
    for i in range(2):  # the same tokens, levels together, each picture its own
        rows = sorted(map(str, ids[i, 1].tolist()))
        assert rows == sorted(map(str, moved[i, 1].tolist()))
    assert torch.equal(ids, before)


def test_swapped_twice_is_the_same():
    ids = some_ids(1, 8, 8)
    a, b = int(ids[0, 0, 0]), int(ids[0, 0, 1])
    assert a != b
    once = swap(ids, EVERYWHERE, a, b, 50)
    assert torch.equal(once == a, ids == b) and torch.equal(once == b, ids == a)
    assert torch.equal(swap(once, EVERYWHERE, a, b, 50), ids)


@pytest.mark.parametrize(
    "quantizer", [SimVQ(6, 50), Residual([SimVQ(6, 50), VectorQuantizer(6, 50)])]
)
def test_a_palette_keeps_the_most_used_and_takes_the_nearest(quantizer):
    tokenizer = tiny(quantizer)
    levels = () if quantizer.levels == 1 else (2,)
    ids = some_ids(1, 6, 6, *levels)
    ids[0, :4] = ids[0, 0, 0]  # used most
    out = palette(tokenizer, ids, EVERYWHERE, 5)
    flat = out.view(-1, *levels)
    assert len(flat.unique(dim=0)) == 5 and torch.equal(out[0, :4], ids[0, :4])
    vectors = quantizer.decode(flat.unique(dim=0)[None])[0]
    mine = quantizer.decode(ids.view(1, -1, *levels))[0]
    got = quantizer.decode(out.view(1, -1, *levels))[0]
    mode = "donot_use_mm_for_euclid_dist"
    nearest = torch.cdist(mine, vectors, compute_mode=mode).min(1).values
    torch.testing.assert_close((got - mine).norm(dim=1), nearest, atol=1e-5, rtol=1e-4)
    assert torch.equal(palette(tokenizer, ids, EVERYWHERE, 10**6), ids)


def test_ids_out_of_range_are_refused():
    ids = some_ids(1, 2, 2)
    for change in (
        lambda: paint(ids, EVERYWHERE, 50, 50),
        lambda: swap(ids, EVERYWHERE, 1, -1, 50),
    ):
        with pytest.raises(TokenizerError, match=r"an id must be 0 \.\. 49, got"):
            change()
    with pytest.raises(TokenizerError, match="at least 1 token, got 0"):
        palette(tiny(), ids, EVERYWHERE, 0)
    with pytest.raises(TokenizerError):
        palette(tiny(), ids + 50, EVERYWHERE, 2)


def test_equal_ids_have_equal_colours_and_others_differ():
    picture = token_map(torch.arange(12).view(1, 3, 4), scale=2)
    assert picture.shape == (1, 3, 6, 8) and picture.min() >= 0 and picture.max() <= 1
    colours = picture[0, :, ::2, ::2].flatten(1).t()
    assert (torch.cdist(colours, colours) + torch.eye(12) > 0.1).all()
    assert torch.equal(
        token_map(torch.tensor([[[3, 3]]]), 1)[..., 0],
        token_map(torch.tensor([[[3, 5]]]), 1)[..., 0],
    )


def test_usage_is_brighter_where_more():
    ids = torch.tensor([0] * 50 + [1] * 5 + [4])
    picture = usage_map(ids, 5, scale=1)
    assert picture.shape == (1, 3, 3, 3)
    light = picture.sum(1).flatten()
    assert light[0] > light[1] > light[4] > light[2] == light[3] == light[8]
    assert usage_map(ids, 1, scale=3).shape == (1, 3, 3, 3)


def test_a_sheet_shows_each_code_as_the_decoder_does():
    tokenizer = tiny()
    sheet = code_sheet(tokenizer, torch.tensor([3, 9, 3]), columns=2)
    assert sheet.shape == (1, 3, 2 * 17 + 1, 2 * 17 + 1)
    first, second, third = sheet[..., 1:17, 1:17], sheet[..., 1:17, 18:34], sheet[..., 18:34, 1:17]
    torch.testing.assert_close(first, third)
    assert not torch.equal(first, second)
    plain = tokenizer.decode(torch.full((1, 4, 4), 3))[..., 8:24, 8:24]
    torch.testing.assert_close(first, plain)
    with pytest.raises(TokenizerError, match="at least one id"):
        code_sheet(tokenizer, torch.tensor([], dtype=torch.int64))
