"""Words of packed codes: every width, any number of tokens and channels."""

import itertools

import pytest
import torch

from sage_diffusion.kernels.kv import layout

WIDTHS = layout.WIDTHS


def codes(*shape, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, layout.levels(width), shape, dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens,dim", [(1, 64), (24, 128), (129, 256), (0, 64), (7, 80), (3, 1)])
def test_codes_come_back(width, tokens, dim):
    x = codes(2, 3, tokens, dim, width=width)
    words = layout.pack(x, width)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, tokens, layout.row_words(dim, width))
    assert torch.equal(layout.unpack(words, width, dim), x)


@pytest.mark.parametrize("width", WIDTHS)
def test_bits_stored_are_those_of_the_width(width):
    assert 32 * layout.row_words(128, width) == 128 * layout.bits(width)
    assert sum(layout.planes(width)) == layout.bits(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_bit_has_a_place_of_its_own(width):
    """As the module's docstring says, one code at a time."""
    dim = 64
    for channel, bit in itertools.product((0, 1, 2, 17, 30, 47, 63), range(layout.bits(width))):
        x = torch.zeros(1, dim, dtype=torch.uint8)
        if 1 << bit >= layout.levels(width):
            continue
        x[0, channel] = 1 << bit
        m, g, h = channel // 16, channel % 16 // 2, channel % 2
        slot = g * (dim // 16) + m
        first, p = 0, layout.bits(width)
        if width == 3:
            first, p = (0, 2) if bit < 2 else (dim // 16, 1)
        shift = bit - (2 if (width, p) == (3, 1) else 0)
        if p == 1:
            word, place = slot // 8 // 2, 2 * (slot % 8) + slot // 8 % 2
        else:
            word, place = slot // (16 // p), p * (slot % (16 // p))
        want = torch.zeros(1, layout.row_words(dim, width), dtype=torch.int64)
        want[0, first + word] = 1 << (16 * h + place + shift)
        assert torch.equal(layout.pack(x, width).long() & 0xFFFFFFFF, want)


@pytest.mark.parametrize("width", WIDTHS)
def test_appending_is_writing_rows(width):
    """Groups of any size; what stands before them is not touched."""
    x = codes(2, 100, 64, width=width)
    store = torch.zeros(2, 128, layout.row_words(64, width), dtype=torch.int32)
    at = 0
    for count in (24, 1, 40, 35):
        store[:, at : at + count] = layout.pack(x[:, at : at + count], width)
        at += count
    assert torch.equal(store[:, :100], layout.pack(x, width))
    assert not store[:, 100:].any()


def test_a_strided_view_is_packed_and_not_changed():
    x = codes(2, 9, 3, 64, width=3)
    view, before = x.transpose(1, 2), x.clone()
    assert torch.equal(layout.pack(view, 3), layout.pack(view.contiguous(), 3))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dim", [1, 5, 64, 128])
def test_parked_trits_come_back_in_a_fifth_of_the_bytes(dim):
    x = codes(3, 7, dim, width=layout.TERNARY)
    packed = layout.pack_trits(x)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 7, -(-dim // 5))
    assert torch.equal(layout.unpack_trits(packed, dim), x)


def test_bad_input_is_refused():
    x = codes(2, 64, width=2)
    with pytest.raises(ValueError, match="width must be one of 8, 4, 3, 2, ternary, 1, got 5"):
        layout.pack(x, 5)
    with pytest.raises(ValueError, match="got True"):
        layout.bits(True)
    with pytest.raises(ValueError, match="width ternary must be below 3, got 3"):
        layout.pack(torch.full_like(x, 3), layout.TERNARY)
    with pytest.raises(TypeError, match="codes must be uint8"):
        layout.pack(x.long(), 2)
    with pytest.raises(TypeError, match="words must be int32"):
        layout.unpack(x, 2, 64)
    with pytest.raises(ValueError, match="must have 4 words, got 5"):
        layout.unpack(torch.zeros(1, 5, dtype=torch.int32), 2, 64)
