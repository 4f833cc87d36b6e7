"""A compressed cache inside models of transformers."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, Gemma2Config, LlamaConfig  # noqa: E402
from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: E402

from sage_diffusion.integrations.transformers import lazy  # noqa: E402
from sage_diffusion.kv import KVCache, compress  # noqa: E402
from sage_diffusion.kv.methods.kivi import Kivi  # noqa: E402

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)


def model_of(config, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def llama():
    return model_of(LlamaConfig(**SIZES))


def ids(tokens, batch=1, seed=0):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, cache, tokens, chunks, **kwargs):
    """Of every token, the prompt given in pieces of these lengths."""
    name = "cache" if transformers.__version__ >= "5.24" else "past_key_values"
    pieces = [model(x, **{name: cache}, **kwargs).logits for x in tokens.split(chunks, 1)]
    return torch.cat(pieces, 1)


CHUNKS = [90, 1, 1, 60, 48]


def test_lossless_is_bit_equal_to_a_dynamic_cache(llama):
    tokens = ids(200, batch=2)
    got = logits(llama, KVCache.for_model(llama, "lossless", sink=8, window=16), tokens, CHUNKS)
    want = logits(llama, DynamicCache(config=llama.config), tokens, CHUNKS)
    assert torch.equal(got, want)


def test_it_generates_what_an_exact_cache_does_while_all_fits_the_window(llama):
    want = llama.generate(ids(50), max_new_tokens=20, do_sample=False)
    cache = KVCache.for_model(llama, "k2v2")
    got = llama.generate(ids(50), max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert torch.equal(got, want) and cache.get_seq_length() == 69


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_8_bits_are_near_and_2_are_not(attention):
    model, tokens = model_of(LlamaConfig(**SIZES), attention), ids(200, batch=2)
    want = logits(model, DynamicCache(config=model.config), tokens, CHUNKS)

    def error(bits):
        cache = KVCache.for_model(model, Kivi(bits, bits), sink=8, window=16)
        return (logits(model, cache, tokens, CHUNKS) - want).norm() / want.norm()

    assert 0 < error(8) < 1e-3 < error(2)


def test_decoding_never_reads_the_whole_past(llama, monkeypatch):
    tokens = ids(200)
    cache = KVCache.for_model(llama, "k4v4", sink=8, window=16)
    logits(llama, cache, tokens[:, :150], [150])
    past = cache.layers[0].past
    monkeypatch.setattr(type(past), "read", lambda self: pytest.fail("all of K and V was read"))
    logits(llama, cache, tokens[:, 150:], [1] * 10 + [40])


def test_layers_that_slide_are_left_alone():
    model = model_of(Gemma2Config(**SIZES, sliding_window=16), "eager")
    cache = KVCache.for_model(model, "k4v4", sink=4, window=8)
    assert cache.compressed == (1,) and cache.left == dict.fromkeys((0, 2), "sliding_attention")
    want = logits(model, DynamicCache(config=model.config), ids(200), CHUNKS)
    got = logits(model, cache, ids(200), CHUNKS)
    assert 0 < (got - want).norm() / want.norm() < 0.1


def test_compress_gives_a_cache_to_whoever_brings_none(llama):
    plain, forward = llama.generate, llama.forward
    with compress(llama, "k2v2", sink=4, window=8) as handle:
        llama.generate(ids(100), max_new_tokens=3, do_sample=False)
        made = handle.cache
        assert made.get_seq_length() == 102 and made.layers[0].past.compressed == 64
        out = llama(ids(100))
        assert handle.cache is not made and handle.cache.get_seq_length() == 100
        llama(ids(3), use_cache=False)
        assert handle.cache.get_seq_length() == 100
    assert llama.generate == plain and llama.forward == forward
    assert not llama._forward_pre_hooks
    assert out.logits.shape == (1, 100, 97)


def test_what_is_not_attention_reads_the_values(llama):
    cache = KVCache.for_model(llama, "k4v4", sink=4, window=8)
    logits(llama, cache, ids(100), [100])
    past = cache.layers[0].past
    k, _ = past.read()
    stand_in = lazy.LazyPast(past, 0, tuple(k.shape), k)
    assert stand_in.shape == k.shape and stand_in.dtype == k.dtype
    assert torch.equal(stand_in * 2, k * 2)
    assert torch.equal(torch.cat([k, stand_in], 2), torch.cat([k, k], 2))
    repeated = stand_in[:, :, None, :, :].expand(1, 2, 2, 100, 32).reshape(1, 4, 100, 32)
    assert type(repeated) is lazy.LazyPast and repeated.shape == (1, 4, 100, 32)
    assert torch.equal(repeated + 0, k.repeat_interleave(2, 1))
    assert torch.equal(stand_in[:, :, 3:5], k[:, :, 3:5])
