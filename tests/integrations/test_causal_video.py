"""The bundled causal video model: what it draws, and what its caches remember."""

import pytest
import torch

pytest.importorskip("diffusers")

from sage_diffusion.integrations.diffusers.causal_video import (
    ASSETS,
    TOKENS,
    CausalVideo,
    noise,
    to_latents,
    to_pictures,
)
from sage_diffusion.kv.bouncing import FRAMES, render, sample_clips, vote
from sage_diffusion.kv.methods.kivi import Kivi

SEEN = 27


@pytest.fixture(scope="module")
def model():
    return CausalVideo.bundled()


@pytest.fixture(scope="module")
def clips():
    """Two unseen clips whose digit has not come out yet."""
    found = sample_clips(32, seed=2, split="test")
    late = (found.hidden >= 3).nonzero()[:2, 0]
    return found[late]


def drawn(model, clips, cache, **more):
    seen = render(clips, SEEN)
    return model.continue_clips(seen, FRAMES - SEEN, cache, steps=2, **more)


def right(pictures, clips):
    """Whether the last frame shows the digit that went in, at its place."""
    found = vote(pictures[:, -1])
    x, y = clips.place(FRAMES - 1)
    return (found.identity == clips.identity) & (found.x == x) & (found.y == y)


def test_the_digit_that_comes_out_is_the_one_that_went_in(model, clips):
    cache = model.cache()
    pictures = drawn(model, clips, cache)
    assert pictures.shape == (2, FRAMES - SEEN, 3, 32, 32)
    assert right(pictures, clips).all()
    assert cache.tokens == FRAMES * TOKENS


def test_few_bits_remember_what_a_window_of_the_same_bytes_forgets(model, clips):
    short = model.cache(8)
    assert not right(drawn(model, clips, short), clips).any()
    history = model.cache(method=Kivi(3, 2, 64), sink=TOKENS, recent=TOKENS, span=4 * TOKENS)
    assert right(drawn(model, clips, history), clips).all()
    assert short.tokens == 8 * TOKENS and history.tokens == FRAMES * TOKENS
    assert history.nbytes <= 1.2 * short.nbytes


def test_noise_belongs_to_the_clip(model, clips):
    assert torch.equal(noise(3, 2, seed=5)[1:], noise(2, 2, seed=6))
    with pytest.raises(ValueError, match="frames and steps must be at least 1, got 1 and 0"):
        model.continue_clips(render(clips, 2), 1, model.cache(), steps=0)


def test_latents_are_pixels():
    pictures = render(sample_clips(2, 0), 3)
    assert to_latents(pictures).shape == (2, 3, 12, 16, 16)
    assert torch.equal(to_pictures(to_latents(pictures)), pictures)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold transformer/"):
        CausalVideo.bundled(tmp_path)
    size = sum(path.stat().st_size for path in ASSETS.rglob("*"))
    assert size <= 8 * 2**20
