"""Codes into words and back: every way of it is the readable one, bit for bit."""

import pytest
import torch
from helpers import card

from sage_diffusion.kernels.kv import layout
from sage_diffusion.kv import codes
from sage_diffusion.kv.columns import Columns


def some(width, dim, tokens=19):
    g = torch.Generator().manual_seed(dim)
    return torch.randint(
        0, layout.levels(width), (2, 3, tokens, dim), dtype=torch.uint8, generator=g
    )


@pytest.mark.parametrize("dim", [16, 64, 80, 256])
@pytest.mark.parametrize("width", layout.WIDTHS)
def test_on_a_cpu_by_columns(width, dim):
    given = some(width, dim)
    words = codes.pack(given, width)
    assert torch.equal(words, layout.pack(given, width))
    got = codes.unpack(words, width, dim)
    assert got.dtype == torch.uint8 and torch.equal(got, given)
    floats = Columns.of(width, dim).floats(words, {})
    assert torch.equal(Columns.of(width, dim).gather(floats), given.float())


@pytest.mark.parametrize("width,dim", [(3, 64), (4, 80)])
def test_on_a_card_in_triton(width, dim, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(codes, "refuse_device", lambda device: None)
    given = some(width, dim, 5)
    with card(89) as gpu:
        words = codes.pack(given, width)
        got = codes.unpack(words, width, dim)
    assert gpu.launches and torch.equal(words, layout.pack(given, width))
    assert torch.equal(got, given)
