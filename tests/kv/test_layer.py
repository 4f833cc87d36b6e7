"""A layer's past: exact sink, body that is compressed once, exact window."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.lossless import Lossless


def past(tokens, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, tokens, 32, generator=g) for _ in "kv")


def filled(method, tokens=300, **settings):
    layer, (k, v) = Layer(method, **settings), past(tokens)
    layer.append(k, v)
    layer.settle()
    return layer, k, v


def test_sink_and_window_are_exact_and_the_rest_is_compressed():
    layer, k, v = filled(Kivi(4, 4), sink=32, window=100)
    assert layer.tokens == 300 and layer.compressed == 160  # 168 left the window: 5 units of 32
    got_k, got_v = layer.read()
    for got, want in ((got_k, k), (got_v, v)):
        assert torch.equal(got[:, :, :32], want[:, :, :32])
        assert torch.equal(got[:, :, 192:], want[:, :, 192:])
        assert not torch.equal(got[:, :, 32:192], want[:, :, 32:192])
        torch.testing.assert_close(got, want, atol=0.25, rtol=0)


def test_one_by_one_compresses_the_same_as_at_once():
    k, v = past(200)
    at_once, one_by_one = (Layer(Kivi(2, 2), sink=8, window=40) for _ in range(2))
    at_once.append(k, v)
    at_once.settle()
    for i in range(200):
        one_by_one.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    one_by_one.settle()
    assert one_by_one.compressed == at_once.compressed == 128
    assert all(torch.equal(a, b) for a, b in zip(one_by_one.read(), at_once.read(), strict=True))


@pytest.mark.parametrize("window", [0, 40])
def test_attending_is_attention_over_what_is_read(window):
    layer, _, _ = filled(Kivi(3, 2), sink=5, window=window)
    q = torch.randn(2, 6, 3, 32, generator=torch.Generator().manual_seed(2))
    k, v = (x.repeat_interleave(3, 1) for x in layer.read())
    mask = torch.ones(2, 1, 3, 300, dtype=torch.bool)
    mask[1, :, :, :70] = False  # left padding
    got = layer.attend(q, 0.2, mask)
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2)
    torch.testing.assert_close(got, want)


def test_nothing_of_the_caller_is_kept_or_changed():
    layer, k, v = filled(Kivi(8, 8))
    before = k.clone()
    want = layer.read()[0].clone()
    assert torch.equal(k, before)
    k.zero_()
    v.zero_()
    assert torch.equal(layer.read()[0], want)


@pytest.mark.parametrize("tokens", [299, 250, 192])
def test_a_crop_inside_the_window_leaves_no_trace(tokens):
    layer, k, v = filled(Kivi(2, 2), window=100)
    layer.crop(tokens)
    again = layer.compressed
    layer.append(k[:, :, tokens:], v[:, :, tokens:])
    layer.settle()
    whole, _, _ = filled(Kivi(2, 2), window=100)
    assert again == layer.compressed == whole.compressed
    assert all(torch.equal(a, b) for a, b in zip(layer.read(), whole.read(), strict=True))


def test_a_crop_into_the_body_keeps_whole_units_as_codes():
    layer, _, _ = filled(Kivi(4, 4), window=100)
    want = layer.read()[0][:, :, :110]
    layer.crop(110)
    assert layer.tokens == 110 and layer.compressed == 64
    torch.testing.assert_close(layer.read()[0], want)
    with pytest.raises(ValueError, match="must leave the 32 tokens of the sink, got 20"):
        layer.crop(20)
    layer.reset()
    assert layer.tokens == 0


def test_batches_are_selected_and_reordered():
    layer, _, _ = filled(Kivi(4, 4))
    k, v = (x.clone() for x in layer.read())
    layer.select(torch.tensor([1, 0, 1]))
    assert layer.batch == 3
    assert torch.equal(layer.read()[0], k[[1, 0, 1]])
    assert torch.equal(layer.read()[1], v[[1, 0, 1]])


def test_lossless_is_bit_exact():
    layer, k, v = filled(Lossless())
    assert layer.compressed == 140
    assert torch.equal(layer.read()[0], k) and torch.equal(layer.read()[1], v)


def test_other_tokens_are_refused():
    layer, k, v = filled(Kivi(4, 4))
    with pytest.raises(ValueError, match="layer 0 holds 2 heads of 32 and 32 channels, got K"):
        layer.append(k[..., :16], v)
    with pytest.raises(ValueError, match="must not be negative, got -1 and 128"):
        Layer(Kivi(), sink=-1)
