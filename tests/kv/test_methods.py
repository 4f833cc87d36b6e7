"""Every method through the same questions."""

import pytest
import torch

from sage_diffusion.kv.method import Place
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.presets import PRESETS, method

PLACE = Place(0, 2, 64, 64, torch.float32, torch.device("cpu"))


def past(tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, tokens, 64, generator=g) for _ in "kv")


@pytest.mark.parametrize("name", PRESETS)
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


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"must be one of lossless, .*, got 'k5v5'"):
        method("k5v5")
    assert method(Kivi(5, 5)) == Kivi(5, 5)
