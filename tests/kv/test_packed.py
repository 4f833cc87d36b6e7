"""One side's codes, steps and zeros: appended, read back, cut."""

import pytest
import torch

from sage_diffusion.kv.packed import Groups, PackedSide
from sage_diffusion.kv.store import Store, select


def rounded(x, groups):
    """Min-max quantization of ``x`` written out."""
    x, axis = groups.split(x)
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    low = low.half().float()
    step = ((high - low) / (2**groups.width - 1)).half().float()
    codes = ((x - low) / step).round().clamp(0, 2**groups.width - 1)
    return (codes * step + low).flatten(axis - 1, axis)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_what_is_read_is_what_min_max_rounds_to(width, axis):
    x = torch.randn(2, 3, 640, 64, generator=torch.Generator().manual_seed(width))
    side = PackedSide(Groups(width, axis))
    for piece in x.split([32, 32, 320, 256], 2):
        side.append(piece)
    want = rounded(x, side.groups)
    torch.testing.assert_close(side.read(0, 640), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(side.read(250, 530), side.read(0, 640)[:, :, 250:530])
    side.cut(288)
    side.append(x[:, :, 320:352])
    torch.testing.assert_close(side.read(0, 288), want[:, :, :288], atol=1e-5, rtol=0)
    again = rounded(x[:, :, 320:352], side.groups)
    torch.testing.assert_close(side.read(288, 320), again, atol=1e-5, rtol=0)


def test_codes_take_their_bits():
    side = PackedSide(Groups(3, "channel"))
    side.append(torch.randn(1, 2, 1024, 64))
    assert side.stores["codes"].used * 8 == 3 * 2 * 1024 * 64
    assert side.stores["steps"].used * 8 == 16 * 2 * 1024 * 64 // 32


def test_equal_elements_are_kept():
    side = PackedSide(Groups(2, "token"))
    side.append(torch.full((1, 1, 3, 32), 0.1))
    torch.testing.assert_close(side.read(0, 3), torch.full((1, 1, 3, 32), 0.1))


def test_groups_must_divide():
    with pytest.raises(ValueError, match="groups of 48 channels must divide the head's 64"):
        Groups(2, "token", 48).check(64)


def test_a_store_grows_in_eighths_and_keeps_nothing_of_the_caller():
    store, rows = Store(axis=1), torch.arange(24.0).view(1, 24)
    for row in rows.split(1, 1):
        store.append(row)
    assert torch.equal(store.read(), rows)
    assert store.used == 96 and 96 <= store.nbytes <= 96 * 9 // 8
    rows.zero_()
    assert store.read()[0, 5] == 5
    store.cut(3)
    store.map(select(torch.tensor([0, 0])))
    assert store.read().tolist() == [[0, 1, 2]] * 2 and store.nbytes == store.used
