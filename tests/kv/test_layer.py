"""A layer's past: exact sink, body that is compressed once, exact window."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.methods.kivi import Kivi, PackedBody
from sage_diffusion.kv.methods.lossless import Lossless
from sage_diffusion.kv.report import bytes_at


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


@pytest.mark.parametrize("tokens,settled", [(300, True), (300, False), (100, True)])
def test_nothing_of_the_caller_is_kept_or_changed(tokens, settled):
    layer, (k, v) = Layer(Kivi(8, 8)), past(tokens)
    layer.append(k, v)
    if settled:
        layer.settle()
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


def test_what_is_not_finite_is_kept_exact_and_counted():
    k, v = past(300)
    k[0, 1, 100, 3] = torch.inf
    v[1, 0, 150, 0] = torch.nan
    v[1, 0, 151, 0] = 7e4  # beyond what FP16 steps can say
    layer = Layer(Kivi(4, 4))
    layer.append(k, v)
    layer.settle()
    assert layer.kept_exact == 3
    got_k, got_v = layer.read()
    assert torch.equal(got_k[:, :, 100], k[:, :, 100])
    assert torch.equal(got_v[:, :, 150:152].nan_to_num(9), v[:, :, 150:152].nan_to_num(9))
    assert got_k[:, :, 101:].isfinite().all() and got_v[:, :, :150].isfinite().all()
    torch.testing.assert_close(got_v[:, :, 32:150], v[:, :, 32:150], atol=0.25, rtol=0)
    q = torch.randn(2, 2, 1, 32)
    seen = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    seen[..., [100, 150]] = False
    assert not layer.attend(q, 0.2).isfinite().all()  # as an exact cache would
    layer.crop(120)
    assert layer.kept_exact == 0 and layer.tokens == 120


class Attended(Kivi):
    heavy = 0.05


def test_heavy_hitters_are_those_that_the_newest_queries_attend_to():
    k, v = past(600)
    q = torch.randn(2, 4, 80, 32, generator=torch.Generator().manual_seed(3)) * 3
    scores = torch.einsum("bgld,bgtd->bglt", q[:, :, -64:], k.repeat_interleave(2, 1)) * 0.2
    weights = scores.softmax(-1).square().sum((1, 2))[:, 32 : 32 + 416]
    layer = Layer(Attended(2, 2))
    layer.append(k, v)
    layer.observe(q, 0.2)
    layer.settle()
    assert layer.compressed == 416 and layer.heavy == 21
    got_k, got_v = layer.read()
    best = weights.topk(21, 1).indices + 32
    for row in range(2):
        for got, want in ((got_k, k), (got_v, v)):
            near = (got[row] - want[row]).abs().amax((0, 2)) < 0.02
            assert set(near[32:448].nonzero()[:, 0].add(32).tolist()) == set(best[row].tolist())
    twins = [x.repeat_interleave(2, 1) for x in (got_k, got_v)]
    mask = torch.rand(2, 1, 80, 600, generator=torch.Generator().manual_seed(4)) < 0.7
    for seen in (None, mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        want = scaled_dot_product_attention(q, *twins, attn_mask=seen, scale=0.2)
        torch.testing.assert_close(layer.attend(q, 0.2, seen), want, atol=1e-4, rtol=1e-4)
    heavy = layer.heavy
    layer.crop(200)
    assert 0 < layer.heavy < heavy
    torch.testing.assert_close(layer.read()[0], got_k[:, :, :200])


def test_heavy_hitters_are_found_while_decoding_too():
    k, v = past(400, batch=1)
    k[:, :, 250] *= 4
    layer, q = Layer(Attended(2, 2), sink=0, window=64), k[:, :, 250:251] * 0.7
    for i in range(400):
        layer.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        layer.attend(q, 0.2)
    layer.settle()
    assert layer.compressed == 320 and layer.heavy == 16
    assert (layer.read()[0][:, :, 250] - k[:, :, 250]).abs().max() < 0.05


@pytest.mark.parametrize("level", [0, 6])
def test_a_parked_layer_comes_back_bit_for_bit(level):
    layer, k, v = filled(Attended(2, 2, form="fp8"), tokens=400)
    layer.observe(torch.randn(2, 4, 8, 32), 0.2)
    layer.append(k, v)
    layer.settle()
    want = [x.clone() for x in layer.read()]
    before = layer.nbytes
    assert layer.heavy
    layer.park("cpu", level)
    assert layer.parked
    if level:
        assert layer.nbytes < before
    with pytest.raises(RuntimeError, match="layer 0 is parked: unpark it"):
        layer.append(k, v)
    if level:
        with pytest.raises(RuntimeError, match="must be unparked before it is used"):
            layer.read()
    layer.unpark()
    assert all(torch.equal(a, b) for a, b in zip(layer.read(), want, strict=True))
    layer.append(k[:, :, :50], v[:, :, :50])
    assert layer.tokens == 850
    with pytest.raises(ValueError, match="level must be 0 to 9, got 10"):
        layer.park(level=10)


def test_bytes_at_another_length_follow_from_what_is_compressed():
    layer, _, _ = filled(Kivi(2, 2), tokens=160 + 1024)
    longer, _, _ = filled(Kivi(2, 2), tokens=160 + 4096)
    assert bytes_at(layer, 160 + 4096) == sum(longer.parts().values())
    short, _, _ = filled(Kivi(2, 2), tokens=100)
    assert bytes_at(short, 150) == 150 * 2 * 2 * 2 * 32 * 4
    with pytest.raises(ValueError, match="nothing is yet: layer 0 holds 100 tokens"):
        bytes_at(short, 4096)


def test_k_before_rope_is_rotated_by_each_tokens_position():
    class Shift:
        def rotate(self, x, positions, inverse=False):
            return x.float() + (-1 if inverse else 1) * positions[:, None, :, None]

    seen = []

    class Spy(Lossless):
        pre_rope, exact = True, False

        def body(self, place):
            body = super().body(place)
            append = body.append
            body.append = lambda k, v: (seen.append(k), append(k, v))
            return body

    k, v = past(300)
    positions = torch.stack((torch.arange(300), torch.arange(300) - 70)).clamp(min=0)  # left pad
    layer = Layer(Spy(), window=40, rope=Shift())
    layer.append(k + positions[:, None, :, None], v, positions)
    layer.settle()
    want = k[:, :, 32 : 32 + layer.compressed]
    torch.testing.assert_close(torch.cat(seen, 2), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(layer.read()[0], k + positions[:, None, :, None], atol=1e-4, rtol=0)
    layer.select(torch.tensor([1]))
    want = (k + positions[:, None, :, None])[1:]
    torch.testing.assert_close(layer.read()[0], want, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="compresses K before RoPE, and how layer 0 rotates"):
        Layer(Spy())


def test_a_kernel_is_told_how_k_before_rope_turns(monkeypatch):
    class Turning:
        def rotate(self, x, positions, inverse=False):
            angle = positions[:, None, :, None] * 0.5 ** torch.arange(16) * (1 - 2 * inverse)
            a, b = x.float().chunk(2, 3)
            cos, sin = angle.cos(), angle.sin()
            return torch.cat((a * cos - b * sin, b * cos + a * sin), 3)

    given = []
    attend = PackedBody.attend
    monkeypatch.setattr(
        PackedBody, "attend", lambda *args: (given.append(args[-1]), attend(*args))[1]
    )
    k, v = past(300)
    positions = torch.arange(300) - torch.tensor([[0], [20]])  # left padding of one sequence
    layer = Layer(Kivi(8, 8, pre_rope=True), window=40, rope=Turning())
    layer.append(k, v, positions)
    layer.settle()
    layer.attend(k[:, :, -1:], 0.2)
    (rotation,) = given
    x, turn = k[:, :, :50], rotation.turn()
    torch.testing.assert_close(turn.keys(x, 7), rotation(x, 7), atol=1e-3, rtol=0)
    assert turn.first.tolist() == [32, 12]


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
