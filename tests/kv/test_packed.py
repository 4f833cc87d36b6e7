"""One side's codes, steps and zeros: appended, read back, cut."""

import pytest
import torch

from sage_diffusion.kernels.kv.quantize import decode, dequantize, quantize
from sage_diffusion.kv.packed import Grouping, PackedSide
from sage_diffusion.kv.store import Store, select


def rounded(x, g):
    """What the quantizer's twin makes of ``x``."""
    return dequantize(quantize(x, g.width, g.axis, g.size, g.form), g.width, g.axis)


CASES = [(w, a, "fp16") for w in (1, 2, 3, 4, 8, "ternary") for a in ("channel", "token")]
CASES += [(2, a, "fp8") for a in ("channel", "token")]


@pytest.mark.parametrize(("width", "axis", "form"), CASES)
def test_what_is_read_is_what_was_quantized(width, axis, form):
    x = torch.randn(2, 3, 640, 64, generator=torch.Generator().manual_seed(1))
    side = PackedSide(Grouping(width, axis, form=form), 64)
    for piece in x.split([32, 32, 320, 256], 2):
        side.append(piece)
    want = rounded(x, side.grouping)
    torch.testing.assert_close(side.read(0, 640), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(side.read(250, 530), side.read(0, 640)[:, :, 250:530])
    side.cut(288)
    side.append(x[:, :, 320:352])
    torch.testing.assert_close(side.read(0, 288), want[:, :, :288], atol=1e-5, rtol=0)
    again = rounded(x[:, :, 320:352], side.grouping)
    torch.testing.assert_close(side.read(288, 320), again, atol=1e-5, rtol=0)


def test_codes_take_their_bits():
    side = PackedSide(Grouping(3, "channel"), 64)
    side.append(torch.randn(1, 2, 1024, 64))
    assert side.stores["codes"].used * 8 == 3 * 2 * 1024 * 64
    assert side.stores["steps"].used * 8 == 16 * 2 * 1024 * 64 // 32


@pytest.mark.parametrize("form", ["fp16", "fp8"])
def test_the_largest_step_is_known(form):
    side = PackedSide(Grouping(2, "token", form=form), 64)
    x = torch.randn(1, 2, 48, 64, generator=torch.Generator().manual_seed(0))
    side.append(x * torch.tensor([1.0, 9.0, 3.0]).repeat_interleave(16)[:, None])
    side.append(x[:, :, :0])
    step, _ = decode(side.stores["steps"].read(), None, 2)
    assert side.side().largest == float(step.max())


def test_equal_elements_are_kept():
    side = PackedSide(Grouping(2, "token"), 32)
    side.append(torch.full((1, 1, 3, 32), 0.1))
    torch.testing.assert_close(side.read(0, 3), torch.full((1, 1, 3, 32), 0.1), atol=5e-5, rtol=0)


def test_groups_must_divide():
    with pytest.raises(ValueError, match="groups of 48 channels must divide the head's 64"):
        PackedSide(Grouping(2, "token", 48), 64)
    with pytest.raises(ValueError, match="width must be one of"):
        PackedSide(Grouping(5, "channel"), 64)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize("dim", [32, 80, 128])
def test_products_with_codes_are_products_with_what_they_stand_for(width, dim):
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(2, 3, 160, dim, generator=g)
    q, p = torch.randn(2, 3, 4, dim, generator=g), torch.rand(2, 3, 4, 96, generator=g)
    size = 16 if dim == 80 else 32
    keys, values = (PackedSide(Grouping(width, a, size), dim) for a in ("channel", "token"))
    keys.append(x)
    values.append(x)
    want = q @ keys.read(64, 150).transpose(2, 3)
    torch.testing.assert_close(keys.scores(q, 64, 150), want, atol=1e-4, rtol=1e-4)
    want = p @ values.read(64, 160)
    torch.testing.assert_close(values.weighted(p, 64, 160), want, atol=1e-4, rtol=1e-4)


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
