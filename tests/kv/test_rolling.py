"""Bodies that forget their oldest tokens, and the memory that layers are decoded into."""

import pytest
import torch

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.lossless import Lossless
from sage_diffusion.kv.rolling import Rolling
from sage_diffusion.kv.scratch import Scratch


def tokens(count, seed=0, batch=2, heads=3, dim=64):
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, count, dim, generator=random) for _ in "kv")


def layer_of(method, sink=0, window=0, count=200, step=40):
    """A layer after ``count`` tokens in steps, and the tokens."""
    layer = Layer(method, sink, window)
    k, v = tokens(count)
    for start in range(0, count, step):
        layer.append(k[:, :, start : start + step], v[:, :, start : start + step])
    return layer, k, v


def test_spans_hold_what_one_body_would():
    rolled, _, _ = layer_of(Rolling(Kivi(4, 4), span=64), sink=8, window=20)
    whole, _, _ = layer_of(Kivi(4, 4), sink=8, window=20)
    assert rolled.compressed == whole.compressed > 64
    for mine, other in zip(rolled.read(), whole.read(), strict=True):
        torch.testing.assert_close(mine, other)
    query = torch.randn(2, 6, 5, 64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(rolled.attend(query, 0.1), whole.attend(query, 0.1))


def test_the_oldest_span_goes_and_the_sink_stays():
    layer, k, v = layer_of(Rolling(Lossless(), span=32), sink=8, window=24)
    before = layer.tokens
    assert layer.body.drop() == 32
    assert layer.tokens == before - 32
    kept = [*range(8), *range(40, 200)]
    assert torch.equal(layer.read()[0], k[:, :, kept])
    assert torch.equal(layer.read()[1], v[:, :, kept])
    nbytes = layer.nbytes
    layer.body.drop()
    assert layer.nbytes < nbytes


def test_a_body_without_spans_goes_on():
    layer, k, _ = layer_of(Rolling(Lossless(), span=1000), count=80)
    assert layer.compressed == 40 and layer.body.drop() == 40 and layer.tokens == 40
    more = tokens(8, seed=5)
    layer.append(*more)
    assert torch.equal(layer.read()[0], torch.cat([k[:, :, 40:], more[0]], 2))


@pytest.mark.parametrize("left", [0, 10, 32, 64, 95, 130])
def test_crop_through_spans(left):
    layer, k, _ = layer_of(Rolling(Lossless(), span=32), count=160)
    layer.crop(left)
    assert layer.tokens == left
    more = tokens(32, seed=5)
    layer.append(*more)
    assert torch.equal(layer.read()[0], torch.cat([k[:, :, :left], more[0]], 2))


def test_a_method_that_counts_positions_is_refused():
    class BeforeRope(Lossless):
        pre_rope = True

    with pytest.raises(ValueError, match="before RoPE and can't drop"):
        Rolling(BeforeRope())
    with pytest.raises(ValueError, match="span must be at least 1"):
        Rolling(Lossless(), span=0)


def test_sequences_are_selected_and_counted_in_every_span():
    layer, k, _ = layer_of(Rolling(Lossless(), span=32), sink=8, window=24)
    layer.select(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.read()[0], k[[1, 1, 0]])
    filled = layer.parts()
    assert filled["k.exact"] == 3 * 3 * 64 * 4 * layer.compressed


def test_scratch_holds_one_layer_and_is_used_again():
    layer, k, v = layer_of(Rolling(Lossless(), span=32), sink=8, window=24)
    scratch = Scratch()
    found = scratch.fill(layer)
    assert torch.equal(found[0], k) and torch.equal(found[1], v)
    assert scratch.nbytes == k.numel() * 4 * 2
    other, _, _ = layer_of(Rolling(Kivi(4, 4), span=32), sink=8, window=24)
    again = scratch.fill(other)
    assert again[0].data_ptr() == found[0].data_ptr()
    torch.testing.assert_close(again[0], other.read()[0])
    scratch.clear()
    assert scratch.nbytes == 0


def test_scratch_follows_dtype_and_batch():
    scratch = Scratch()
    layer, _, _ = layer_of(Kivi(4, 4), count=80)
    scratch.fill(layer)
    layer.select(torch.tensor([0]))
    assert scratch.fill(layer)[0].shape == (1, 3, 80, 64)
    half = Layer(Kivi(4, 4), 0, 0)
    k, v = tokens(80)
    half.append(k.bfloat16(), v.bfloat16())
    half.settle()
    assert scratch.fill(half)[1].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no tokens"):
        scratch.fill(Layer(Lossless()))
