"""Every method through the same questions."""

import pytest
import torch

from sage_diffusion.kernels.kv.quantize import dequantize, quantize
from sage_diffusion.kv.decode import attend as attend_packed
from sage_diffusion.kv.method import Place
from sage_diffusion.kv.methods.gear import Gear
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.vidkv import VidKV, fourier, inverse_fourier
from sage_diffusion.kv.parts import attend
from sage_diffusion.kv.presets import PRESETS, method

PLACE = Place(0, 2, 64, 64, torch.float32, torch.device("cpu"))


def past(tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, tokens, 64, generator=g) for _ in "kv")


#: Those that need a calibration, many layers or queries have tests of their own.
OTHERS = ("calibrated", "matryoshka", "prefixkv", "xkv")


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith(OTHERS)])
def test_a_body_is_read_attended_to_cropped_selected_and_counted(name):
    body = method(name).body(PLACE)
    k, v = past(20 * body.unit)
    body.append(k[:, :, : 15 * body.unit], v[:, :, : 15 * body.unit])
    body.append(k[:, :, 15 * body.unit :], v[:, :, 15 * body.unit :])
    assert body.tokens == 20 * body.unit
    got_k, got_v = body.read()
    assert got_k.shape == k.shape and got_v.shape == v.shape
    middle = body.read(7, 9)
    assert torch.equal(middle[0], got_k[:, :, 7:9]) and torch.equal(middle[1], got_v[:, :, 7:9])
    used = sum(body.parts().values())
    assert used <= body.nbytes <= used * 9 // 8 + 4096
    body.select(torch.tensor([1]))
    assert torch.equal(body.read()[0], got_k[1:])
    body.crop(3 * body.unit)
    assert body.tokens == 3 * body.unit
    torch.testing.assert_close(body.read()[0], got_k[1:, :, : 3 * body.unit])


def test_more_bits_are_nearer():
    k, v = past(320)
    errors = []
    for bits in (1, 2, 3, 4, 8):
        body = Kivi(bits, bits).body(PLACE)
        body.append(k, v)
        errors.append(sum((a - b).norm() for a, b in zip(body.read(), (k, v), strict=True)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 50


def test_the_kernels_sides_are_what_is_read():
    k, v = past(320)
    body = Kivi(3, 2).body(PLACE)
    body.append(k, v)
    q = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(9))
    mask = torch.rand(2, 1, 2, 320, generator=torch.Generator().manual_seed(4)) < 0.7
    got = attend_packed(q, body.k.side(), body.v.side(), 0.1, mask)
    want = body.attend(q, 0.1, mask)
    torch.testing.assert_close(got.out, want.out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-4, rtol=1e-4)


def test_wide_channels_have_more_bits():
    k, v = past(320)
    k[:, 0, :, :32] *= 10
    k[:, 1, :, 32:] *= 10
    body = Kivi((4, 2), 2).body(PLACE)
    body.append(k, v)
    got = body.read()[0]
    for head, wide in ((0, slice(0, 32)), (1, slice(32, 64))):
        four = dequantize(quantize(k[:, head, :, wide], 4, "channel", 32), 4, "channel")
        torch.testing.assert_close(got[:, head, :, wide], four)
    equal = Kivi(3, 2).body(PLACE)
    equal.append(k, v)
    assert (got - k).norm() < 0.6 * (equal.read()[0] - k).norm()
    q = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(9))
    want = attend(q, *body.read(), 0.1)
    torch.testing.assert_close(body.attend(q, 0.1).out, want.out)
    body.to("cpu")
    assert body.parts()["k.order"] == 2 * 64 * 2
    with pytest.raises(ValueError, match="3 shares of equal size must divide the head's 64"):
        Kivi((4, 2, 1), 2).body(PLACE)


def test_the_fourier_coefficients_of_real_channels_are_as_many_and_as_large():
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    z = fourier(x)
    assert z.shape == x.shape
    torch.testing.assert_close(z.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(inverse_fourier(z), x)


def test_vidkv_gives_two_bits_to_the_channels_of_largest_range():
    k, v = past(320)
    k[..., ::2] *= 20
    body = VidKV().body(PLACE)
    body.append(k, v)
    assert body.constants["k.order"][:32].tolist() == list(range(0, 64, 2))
    got_k, got_v = body.read()
    two = dequantize(quantize(k[..., ::2], 2, "channel", 32), 2, "channel")
    torch.testing.assert_close(got_k[..., ::2], two)
    spectrum = fourier(k[..., 1::2])
    one = dequantize(quantize(spectrum, 1, "channel", 32), 1, "channel")
    torch.testing.assert_close(got_k[..., 1::2], inverse_fourier(one))
    three = dequantize(quantize(v, "ternary", "channel", 32), "ternary", "channel")
    torch.testing.assert_close(got_v, three)
    with pytest.raises(ValueError, match="an even number of the head's 64 channels"):
        VidKV(k_bits=1.3).body(PLACE)


def test_gear_adds_a_low_rank_and_exact_outliers_to_the_codes():
    g = torch.Generator().manual_seed(5)
    k, v = past(640)
    for x in (k, v):  # what quantization leaves has a part of low rank, and there are outliers
        x += torch.randn(2, 2, 640, 3, generator=g) @ torch.randn(2, 2, 3, 64, generator=g)
    k[0, 1, 100, 7] = 30.0
    v[1, 0, 200, 9] = -30.0
    errors = {}
    for made in (Kivi(2, 2), Gear(outliers=0), Gear(prompt_rank=0), Gear()):
        body = made.body(PLACE)
        body.append(k[:, :, :512], v[:, :, :512])
        for start in (512, 576):
            body.append(k[:, :, start : start + 64], v[:, :, start : start + 64])
        got = body.read()
        errors[made] = sum((a - b).norm() for a, b in zip(got, (k, v), strict=True))
        if getattr(made, "outliers", 0):
            assert got[0][0, 1, 100, 7] == 30 and got[1][1, 0, 200, 9] == -30
    plain, ranked, sparse, both = errors.values()
    assert both < ranked < plain and both < sparse < plain


def test_gear_cuts_factors_and_outliers_with_the_tokens():
    k, v = past(768)
    body = Gear().body(PLACE)
    for piece in (slice(0, 512), slice(512, 576), slice(576, 640)):
        body.append(k[:, :, piece], v[:, :, piece])
    want = body.read()
    for tokens in (576, 320):
        body.crop(tokens)
        for got, was in zip(body.read(), want, strict=True):
            assert torch.equal(got, was[:, :, :tokens])
        body.append(k[:, :, 640:704], v[:, :, 640:704])
        again = Gear().body(PLACE)
        again.append(k[:, :, :512], v[:, :, :512])
        again.append(k[:, :, 640:704], v[:, :, 640:704])
        tail = body.read(tokens, tokens + 64), again.read(512, 576)
        assert all(torch.equal(a, b) for a, b in zip(*tail, strict=True))
        body.crop(tokens)


def test_gear_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="unit must be a multiple of the group, 32"):
        Gear(unit=40).body(PLACE)
    with pytest.raises(ValueError, match="ranks must be at most the unit"):
        Gear(prompt_rank=65).body(PLACE)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"must be one of lossless, .*, got 'k5v5'"):
        method("k5v5")
    assert method(Kivi(5, 5)) == Kivi(5, 5)
