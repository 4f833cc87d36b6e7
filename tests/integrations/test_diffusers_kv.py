"""A rolling KV cache in diffusers' Wan transformer."""

import pytest
import torch

pytest.importorskip("diffusers")

import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from sage_diffusion.integrations.diffusers.kv import WanKVCache, _rotated, cached
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.video import Video

BLOCKS, TOKENS, CHUNKS = 2, 64, 6


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=BLOCKS,
        rope_max_seq_len=32,
    )
    return model.eval()


@pytest.fixture
def video():
    """Chunks of two frames of 4 x 8 tokens, and a prompt."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 2 * CHUNKS, 8, 16, generator=random)
    return latents.split(2, 2), torch.randn(2, 3, 16, generator=random)


@torch.no_grad()
def rollout(transformer, video, cache, times=(500.0, 0.0)):
    """Every chunk's predictions at the last time, each chunk denoised at all of them."""
    chunks, prompt = video
    found = []
    with cached(transformer, cache) as run:
        for number, chunk in enumerate(chunks):
            cache.enable_append_mode()
            for time in times:
                out = run(chunk, torch.full((2,), time), prompt, frame_offset=2 * number)
                cache.enable_overwrite_mode()
            found.append(out)
    return torch.cat(found, 2)


class BlockCausal:
    """Wan's attention over whole clips, under a mask: what a cache must come to."""

    def __init__(self, window=None):
        chunk = torch.arange(CHUNKS).repeat_interleave(TOKENS)
        self.mask = chunk[:, None] >= chunk
        if window is not None:
            self.mask &= chunk[:, None] - chunk < window

    def __call__(self, attn, states, encoder_states=None, mask=None, rotary_emb=None):
        query, key, value = attn.to_q(states), attn.to_k(states), attn.to_v(states)
        query = _rotated(attn.norm_q(query).unflatten(2, (attn.heads, -1)), rotary_emb)
        key = _rotated(attn.norm_k(key).unflatten(2, (attn.heads, -1)), rotary_emb)
        value = value.unflatten(2, (attn.heads, -1))
        sides = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*sides, self.mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
def whole(transformer, video, window=None):
    chunks, prompt = video
    kept = [block.attn1.processor for block in transformer.blocks]
    try:
        for block in transformer.blocks:
            block.attn1.processor = BlockCausal(window)
        return transformer(torch.cat(chunks, 2), torch.zeros(2), prompt, return_dict=False)[0]
    finally:
        for block, processor in zip(transformer.blocks, kept, strict=True):
            block.attn1.processor = processor


def test_chunks_with_a_cache_are_the_clip_under_a_block_causal_mask(transformer, video):
    found = rollout(transformer, video, WanKVCache(BLOCKS))
    torch.testing.assert_close(found, whole(transformer, video), atol=2e-5, rtol=1e-4)


def test_a_window_drops_the_oldest_chunks(transformer, video):
    cache = WanKVCache(BLOCKS, window_size=3 * TOKENS)
    found = rollout(transformer, video, cache)
    assert cache.tokens == 3 * TOKENS
    want = whole(transformer, video, window=3)
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, whole(transformer, video), atol=1e-3)


def test_a_window_of_one_chunk_keeps_that(transformer, video):
    cache = WanKVCache(BLOCKS, window_size=TOKENS)
    found = rollout(transformer, video, cache)
    assert cache.tokens == TOKENS
    want = whole(transformer, video, window=1)
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)


def test_the_sink_stays_in_the_window(transformer, video):
    chunks, _ = video
    cache = WanKVCache(BLOCKS, window_size=3 * TOKENS, sink=TOKENS)
    rollout(transformer, (chunks[:1], video[1]), cache)
    first = cache.layers[0].read()[0].clone()
    cache = WanKVCache(BLOCKS, window_size=3 * TOKENS, sink=TOKENS)
    rollout(transformer, video, cache)
    assert cache.tokens == 3 * TOKENS
    assert torch.equal(cache.layers[0].read()[0][:, :, :TOKENS], first)


def test_the_cache_reads_back_what_the_open_pull_request_gives():
    """Append, overwrite and window as its tests have them, on the cache alone."""
    cache = WanKVCache(1, window_size=12)
    k = [torch.randn(1, 4, 2, 32, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    cache.update(0, k[0], k[0])
    found, values = cache.update(0, k[1], -k[1])
    assert torch.equal(found, torch.cat(k[:2], 1)) and torch.equal(values[:, 4:], -k[1])
    cache.enable_overwrite_mode()
    found, _ = cache.update(0, k[2], k[2])
    assert torch.equal(found, torch.cat([k[0], k[2]], 1))
    cache.enable_append_mode()
    for index in (3, 4, 5):
        found, _ = cache.update(0, k[index], k[index])
    assert torch.equal(found, torch.cat(k[3:], 1))
    cache.reset()
    assert cache.tokens == 0 and cache.peak_bytes == 0
    assert torch.equal(cache.update(0, k[1], k[1])[0], k[1])


@pytest.mark.parametrize("method", ["k8v8", Kivi(4, 4), Video(8, 16, 32, span=64)])
def test_compressed_history_is_near_and_smaller(transformer, video, method):
    exact = WanKVCache(BLOCKS)
    want = rollout(transformer, video, exact)
    cache = WanKVCache(BLOCKS, method=method, sink=TOKENS, recent=TOKENS, span=4 * TOKENS)
    found = rollout(transformer, video, cache)
    assert not torch.equal(found, want)
    error = ((found - want).norm() / want.norm()).item()
    assert error < (0.03 if method != Kivi(4, 4) else 0.1)
    assert cache.tokens == exact.tokens
    assert cache.nbytes < 0.8 * exact.nbytes
    assert cache.scratch.nbytes == exact.nbytes // BLOCKS
    assert cache.peak_bytes == cache.nbytes + cache.scratch.nbytes


def test_a_chunk_is_compressed_once(transformer, video):
    """Denoising steps that overwrite a chunk change nothing before it."""
    cache = WanKVCache(BLOCKS, method="k4v4", sink=0, recent=TOKENS)
    chunks, prompt = video
    with torch.no_grad(), cached(transformer, cache) as run:
        for number, chunk in enumerate(chunks[:4]):
            cache.enable_append_mode()
            run(chunk, torch.zeros(2), prompt, frame_offset=2 * number)
        before = cache.layers[1].read()[0][:, :, : 3 * TOKENS].clone()
        cache.enable_overwrite_mode()
        for time in (900.0, 300.0, 0.0):
            run(chunks[4], torch.full((2,), time), prompt, frame_offset=6)
        assert torch.equal(cache.layers[1].read()[0][:, :, : 3 * TOKENS], before)
        assert cache.tokens == 4 * TOKENS


def test_a_budget_holds_more_history_in_fewer_bits(transformer, video):
    whole_size = WanKVCache(BLOCKS)
    rollout(transformer, video, whole_size)
    budget = whole_size.nbytes // 2
    lengths = []
    for method in ("lossless", Video(4, 8, 32, span=TOKENS)):
        cache = WanKVCache(BLOCKS, method=method, budget=budget, recent=TOKENS, span=TOKENS)
        rollout(transformer, video, cache)
        assert cache.nbytes <= budget
        lengths.append(cache.tokens)
    assert lengths[0] == 3 * TOKENS < lengths[1]
    small = WanKVCache(BLOCKS, budget=1000)
    with pytest.raises(ValueError, match="a budget of 1000 bytes gives each block 500"):
        rollout(transformer, video, small)


def test_two_caches_for_guidance_do_not_mix(transformer, video):
    chunks, prompt = video
    first, second = WanKVCache(BLOCKS), WanKVCache(BLOCKS)
    with torch.no_grad(), cached(transformer, first) as run:
        for number, chunk in enumerate(chunks[:2]):
            a = run(chunk, torch.zeros(2), prompt, frame_offset=2 * number)
            run(chunk, torch.zeros(2), 0 * prompt, frame_offset=2 * number, kv_cache=second)
    alone = rollout(transformer, (chunks[:2], prompt), WanKVCache(BLOCKS), times=(0.0,))
    assert torch.equal(a, alone[:, :, 2:])
    assert not torch.equal(first.layers[1].read()[0], second.layers[1].read()[0])


def test_removing_leaves_the_transformer_as_it_was(transformer, video):
    chunks, prompt = video
    before = [block.attn1.processor for block in transformer.blocks]
    want = transformer(chunks[0], torch.zeros(2), prompt).sample
    run = cached(transformer, WanKVCache(BLOCKS))
    with pytest.raises(ValueError, match="has a KV cache already"):
        cached(transformer, WanKVCache(BLOCKS))
    assert torch.equal(transformer(chunks[0], torch.zeros(2), prompt).sample, want)
    run.remove()
    run.remove()
    assert [block.attn1.processor for block in transformer.blocks] == before
    assert torch.equal(transformer(chunks[0], torch.zeros(2), prompt).sample, want)


def test_fused_projections_give_the_same(video, transformer):
    import copy

    fused = copy.deepcopy(transformer)
    fused.fuse_qkv_projections()
    want = rollout(transformer, video, WanKVCache(BLOCKS))
    found = rollout(fused, video, WanKVCache(BLOCKS))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_said(transformer, video):
    chunks, prompt = video
    with pytest.raises(ValueError, match="for 3 blocks, the transformer has 2"):
        rollout(transformer, video, WanKVCache(3))
    with pytest.raises(ValueError, match="needs a Wan transformer"):
        cached(torch.nn.Linear(2, 2), WanKVCache(1))
    run = cached(transformer, WanKVCache(BLOCKS))
    with run, pytest.raises(ValueError, match="has 32 frames, the chunk ends at frame 33"):
        run(chunks[0], torch.zeros(2), prompt, frame_offset=31)
    for settings, said in (
        ({"num_blocks": 0}, "num_blocks"),
        ({"window_size": 0}, "window_size"),
        ({"budget": 0}, "budget"),
        ({"method": "k9"}, "preset"),
        ({"method": "calibrated-2.25"}, "K before RoPE"),
        ({"method": "prefixkv"}, "sees no queries"),
        ({"sink": -1}, "sink and window must not be negative"),
        ({"span": 0}, "span"),
    ):
        with pytest.raises(ValueError, match=said):
            WanKVCache(**{"num_blocks": 1, **settings})
