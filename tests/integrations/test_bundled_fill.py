"""The bundled fill model, on a photograph that it was not trained on."""

import pytest
import torch

pytest.importorskip("diffusers")

from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.fill import load_fill
from sage_diffusion.vq.tokenizer import TokenizerError, psnr

#: A quarter of the tokens.
MASK = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.25


@pytest.fixture(scope="module")
def pair():
    return load_tokenizer("bundled"), load_fill("bundled")


@pytest.fixture(scope="module")
def ids(pair):
    data = pytest.importorskip("skimage.data")
    pixels = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None, :, 72:328, 172:428] / 255
    return pair[0].encode(pixels)


def test_knows_the_ids_of_its_tokenizer_alone(pair):
    tokenizer, filler = pair
    filler.check(tokenizer)
    assert filler.notes.fingerprint == tokenizer.fingerprint


def test_neighbours_tell_about_a_masked_token(pair, ids):
    filler = pair[1]
    assert filler.bits(ids, MASK) < filler.bits(ids, torch.ones_like(MASK)) - 2
    with pytest.raises(TokenizerError, match="must be true somewhere"):
        filler.bits(ids, MASK & False)


def test_scattered_tokens_are_filled_better_than_with_their_mean_colour(pair, ids):
    tokenizer, filler = pair
    got = filler.fill(ids, MASK)
    assert torch.equal(got[:, ~MASK], ids[:, ~MASK])
    where = MASK.repeat_interleave(8, 0).repeat_interleave(8, 1)
    filled, want = (tokenizer.decode(x)[0, :, where] for x in (got, ids))
    assert psnr(filled, want) > psnr(want.mean(1, keepdim=True).expand_as(want), want) + 2
