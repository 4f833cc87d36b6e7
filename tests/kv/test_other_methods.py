"""xKV, MatryoshkaKV and PrefixKV, by the formulas that they publish."""

import pytest
import torch

from sage_diffusion.kv.calibration import Calibration, CalibrationError
from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.method import Place
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.matryoshka import Matryoshka
from sage_diffusion.kv.methods.prefixkv import PrefixKV
from sage_diffusion.kv.methods.xkv import XKV
from sage_diffusion.kv.moments import LayerMoments

CPU = torch.device("cpu")


def place(layer=0, calibration=None, shared=None):
    return Place(
        layer, 2, 16, 16, torch.float32, CPU, None, calibration, {} if shared is None else shared
    )


def low_rank(tokens, rank, seed=0, batch=2):
    """Four layers' K in one subspace."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(rank, 4, 32, generator=g)
    z = torch.randn(batch, tokens, rank, generator=torch.Generator().manual_seed(seed))
    x = torch.einsum("btr,rld->lbtd", z, mix)
    return x.unflatten(3, (2, 16)).transpose(2, 3)  # [layer, B, H, T, D]


@pytest.fixture
def group():
    shared = {}
    return [XKV(k_rank=0.125, v_rank=0.25, unit=8).body(place(i, None, shared)) for i in range(4)]


def test_xkv_shares_coefficients_and_really_stores_factors(group):
    k = low_rank(40, 16)
    for body, x in zip(group, k, strict=True):
        body.append(x, x)
    for body, x in zip(group, k, strict=True):
        for got in body.read():
            torch.testing.assert_close(got, x, atol=1e-3, rtol=1e-3)
    stored = sum(n for body in group for name, n in body.parts().items() if "factors" in name)
    assert stored == 2 * 40 * (16 + 32) * 4  # one copy for four layers, ranks of 1/8 and 1/4
    assert all(body.parts()["k.waiting"] == 0 for body in group)
    held, basis = sum(body.nbytes for body in group), 4 * 32 * (16 + 32) * 4 * 2
    assert held <= (stored + basis) * 9 / 8  # what waited is gone, not only forgotten


def test_xkv_is_exact_until_its_group_is_whole_and_projects_what_comes_later(group):
    k, later = low_rank(16, 16), low_rank(8, 16, seed=5)
    for i, body in enumerate(group):
        body.append(k[i], k[i])
        if i < 3:
            assert torch.equal(body.read()[0], k[i])
    group[0].append(later[0], later[0])
    assert torch.equal(group[0].read(16, 24)[0], later[0])
    for body, x in zip(group[1:], later[1:], strict=True):
        body.append(x, x)
    torch.testing.assert_close(group[0].read(12, 24)[0][:, :, 4:], later[0], atol=1e-3, rtol=1e-3)


def calibration():
    parts = []
    for layer in range(2):
        moments = LayerMoments()
        k = low_rank(256, 6, seed=layer, batch=1)[layer, 0]
        v = low_rank(256, 20, seed=layer, batch=1)[layer, 0]
        moments.k.append(k.transpose(0, 1).flatten(1).half())
        moments.add_sides(k, v)
        received = torch.ones(100) if layer else torch.ones(100).cumsum(0) ** 8
        moments.received.append(received)
        parts.append(moments.tensors(2))
    tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return Calibration("abc", (0, 1), tensors | {"heavy": torch.ones(2, 2)})


def test_matryoshka_gives_ranks_to_those_that_need_them():
    made = calibration()
    ranks = Matryoshka(0.5).ranks(made)
    assert ranks.sum() <= 0.5 * 16 * ranks.numel() and ranks[:, 1].sum() > ranks[:, 0].sum()
    assert (Matryoshka(0.5, adaptive=False).ranks(made) == 8).all()
    body = Matryoshka(0.75).body(place(0, made))
    k = low_rank(64, 6, seed=9)[0]
    body.append(k, k)
    torch.testing.assert_close(body.read()[0], k, atol=0.15, rtol=0.05)  # K has rank 6
    assert body.nbytes < 1.2 * sum(body.parts().values())  # nothing of other layers is held
    torch.testing.assert_close(body.read(5, 9)[0], body.read()[0][:, :, 5:9])
    with pytest.raises(CalibrationError):
        Matryoshka().body(place())


def test_matryoshka_s_coordinates_may_have_few_bits():
    made, k = calibration(), low_rank(96, 6, seed=9)[0]
    errors, sizes = [], []
    for width in (2, 4, 8):
        body = Matryoshka(0.5, width=width).body(place(0, made))
        body.append(k[:, :, :64], k[:, :, :64])
        body.append(k[:, :, 64:], k[:, :, 64:])
        assert body.unit == 32 and torch.equal(body.read(40, 70)[0], body.read()[0][:, :, 40:70])
        errors.append((body.read()[0] - k).norm())
        sizes.append(sum(x.used for name, x in body.stores.items() if ".codes" in name))
        body.crop(64)
        assert body.read()[1].shape == k[:, :, :64].shape
    assert errors == sorted(errors, reverse=True)
    assert sizes[2] == 2 * sizes[1] == 4 * sizes[0]
    with pytest.raises(ValueError, match="width must be one of"):
        Matryoshka(width=7).body(place(0, made))


@pytest.mark.parametrize("width", [None, 4])
def test_of_a_layer_no_coordinate_may_be_kept(width):
    made, method = calibration(), Matryoshka(0.01, width=width)
    assert not method.ranks(made)[0].any()
    body, k = method.body(place(0, made)), low_rank(64, 6)[0]
    body.append(k, k)
    means = made.tensors["post.mean"][0].float()  # [2, H, D]
    for got, mean in zip(body.read(5, 40), means, strict=True):
        assert torch.equal(got, mean[:, None].expand(2, -1, 35, -1))
    body.select(torch.tensor([1]))
    body.crop(32)
    assert body.read()[0].shape == (1, 2, 32, 16)


class Rope:
    """Turns pairs of channels; position 0 leaves all as it is."""

    def rotate(self, x, positions, inverse=False):
        angle = positions[:, None, :, None] * (-0.1 if inverse else 0.1)
        even, odd = x.float().chunk(2, 3)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((even * cos - odd * sin, even * sin + odd * cos), 3)


@pytest.mark.parametrize(
    "of", [Kivi(8, 8, group=16), Kivi(8, 8, group=16, pre_rope=True), Matryoshka(1.0, False, 8)]
)
def test_what_is_kept_may_be_compressed_by_another_method(of):
    """Projection, quantization and eviction compose; K before RoPE has the positions of its own."""
    layer = Layer(PrefixKV(0.5, of), sink=4, window=12, rope=Rope(), calibration=calibration())
    k = low_rank(144, 6)[0]
    v = low_rank(144, 6, seed=1)[0]
    k, v = Rope().rotate(k, torch.arange(144)[None]), v[:, [1, 0]]
    q = k[:, :, [20, 50]]
    layer.append(k, v)
    layer.observe(q, 0.25)
    layer.settle()
    body = layer.body
    assert layer.compressed == 128 and body.of.tokens == body.stores["index"].length
    assert 0 < body.of.tokens < 128 and body.of.tokens % body.unit == 0
    got = layer.attend(q, 0.25)
    kept = body.stores["index"].read().long()
    seen = torch.zeros(2, 144, dtype=torch.bool)
    seen[:, :4] = seen[:, 132:] = True
    seen.scatter_(1, kept + 4, True)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, seen[:, None, None], scale=0.25
    )
    assert (got - want).norm() < 0.05 * want.norm()
    layer.select(torch.tensor([1]))
    layer.crop(70)
    assert body.of.tokens % body.unit == 0 and layer.attend(q[1:], 0.25).isfinite().all()


def test_what_compresses_the_kept_moves_with_them():
    for move in (lambda body: body.to("meta"), lambda body: body.park("meta", 0)):
        body = PrefixKV(0.5, Matryoshka()).body(place(0, calibration()))
        assert body.of.constants
        move(body)
        assert all(x.is_meta for x in body.of.constants.values())


def test_what_is_kept_must_be_one_layer_s():
    for of in (XKV(), PrefixKV()):
        with pytest.raises(ValueError, match="evicts nothing and that looks at one layer"):
            PrefixKV(0.5, of).body(place())


def test_prefixkv_keeps_what_the_newest_queries_look_at():
    layer = Layer(PrefixKV(0.25), sink=4, window=8)
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 112, 16, generator=g) for _ in "kv")
    q = k[:, :, [20, 50]] * 4  # looks at these two
    layer.append(k, v)
    layer.observe(q, 0.25)
    layer.settle()
    assert layer.compressed == 100 and layer.tokens == 112
    kept = layer.body.stores["index"].read()[0]
    assert kept.numel() == 25 and {16, 46} <= set(kept.tolist())
    mask = torch.zeros(112, dtype=torch.bool)
    mask[[*range(4), *(kept + 4).tolist(), *range(104, 112)]] = True
    got = layer.attend(q, 0.25)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[None], scale=0.25)
    torch.testing.assert_close(got, want)
    layer.crop(60)
    assert layer.tokens == 60 and (layer.body.stores["index"].read() < 56).all()
    with pytest.raises(ValueError, match="evicted tokens"):
        layer.read()


def test_prefixkv_gives_flat_layers_more_tokens():
    made = calibration()
    peaked, flat = (PrefixKV(0.4).body(place(i, made)).share for i in range(2))
    assert peaked < 0.4 < flat and (peaked + flat) / 2 == pytest.approx(0.4, abs=0.01)
