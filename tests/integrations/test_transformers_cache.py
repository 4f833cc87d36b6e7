"""A compressed cache inside models of transformers."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, Gemma2Config, LlamaConfig  # noqa: E402
from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: E402

from sage_diffusion.integrations.transformers import lazy  # noqa: E402
from sage_diffusion.integrations.transformers.cache import argument  # noqa: E402
from sage_diffusion.kv import KVCache, compress  # noqa: E402
from sage_diffusion.kv.methods.kivi import Kivi  # noqa: E402

NAME = argument(transformers.LlamaForCausalLM)
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
    pieces = [model(x, **{NAME: cache}, **kwargs).logits for x in tokens.split(chunks, 1)]
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


def test_left_padding_hides_what_it_hid(llama):
    tokens, short = ids(200, batch=2), ids(140, seed=1)[0]
    tokens[1, :60] = 0
    tokens[1, 60:] = short
    seen = torch.ones(2, 200, dtype=torch.long)
    seen[1, :60] = 0
    cache = KVCache.for_model(llama, "k8v8", sink=8, window=16)
    outs, start = [], 0
    for count in CHUNKS:
        stop = start + count
        with torch.no_grad():
            outs.append(
                llama(
                    tokens[:, start:stop],
                    attention_mask=seen[:, :stop],
                    position_ids=(seen[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:],
                    **{NAME: cache},
                ).logits
            )
        start = stop
    alone = logits(llama, DynamicCache(config=llama.config), short[None], [140])
    got = torch.cat(outs, 1)[1:, 60:]
    assert (got - alone).norm() / alone.norm() < 2e-3


@pytest.mark.parametrize("preset", ["lossless", "k2v2"])
def test_beams_are_reordered_as_in_an_exact_cache(llama, preset):
    given = dict(max_new_tokens=12, num_beams=3, do_sample=False)
    want = llama.generate(ids(60, batch=2), **given)
    cache = KVCache.for_model(llama, preset)
    assert torch.equal(llama.generate(ids(60, batch=2), **{NAME: cache}, **given), want)


def test_a_rollback_leaves_no_trace(llama):
    tokens = ids(200)
    plain, back = (KVCache.for_model(llama, "k2v2", sink=8, window=32) for _ in range(2))
    want = logits(llama, plain, tokens, [120, 10, 10, 60])
    first = logits(llama, back, tokens[:, :130], [120, 10])
    logits(llama, back, ids(5, seed=5), [1] * 5)
    back.crop(-5)
    got = torch.cat((first, logits(llama, back, tokens[:, 130:], [10, 60])), 1)
    assert torch.equal(got, want)


class Attended(Kivi):
    heavy = 0.1


def test_heavy_hitters_of_a_prompt_are_found_by_its_last_queries(llama, monkeypatch):
    cache = KVCache.for_model(llama, Attended(2, 2), sink=8, window=16)
    first, seen = cache.layers[0], []
    attend = first.attend
    monkeypatch.setattr(first, "attend", lambda q, *given: (seen.append(q), attend(q, *given))[1])
    logits(llama, cache, ids(150), [150])
    exact = DynamicCache(config=llama.config)
    logits(llama, exact, ids(150), [150])
    assert cache.report().heavy == 3 * 10  # of 96 compressed tokens
    k = exact.layers[0].keys.repeat_interleave(2, 1)
    scores = seen[0][:, :, -64:] @ k.transpose(2, 3) / 32**0.5
    scores = scores.masked_fill(torch.ones(64, 150).triu(87).bool(), -torch.inf)
    weights = scores.softmax(-1).square().sum((1, 2))[0, 8:104]
    assert first.past._heavy.index[0].tolist() == weights.topk(10).indices.sort().values.tolist()


def test_bytes_bits_and_peak_are_measured(llama):
    cache = KVCache.for_model(llama, "k4v4", sink=8, window=16)
    with pytest.raises(ValueError, match="must hold tokens to be reported on"):
        cache.report()
    logits(llama, cache, ids(400), [392, 1, 1, 1, 1, 1, 1, 1, 1])
    found = cache.report()
    assert found.tokens == 400 and found.layers == 3 and found.compressed == 3 * 352
    assert found.body_bits == 4 + 32 / 32  # FP16 steps and zeros
    exact = 3 * 2 * 2 * 400 * 32 * 4
    assert found.exact_bytes == exact
    stored = 3 * 2 * 2 * 32 * (352 * 5 / 8 + 48 * 4)
    assert sum(found.parts.values()) == stored and cache.bits() == 32 * stored / exact
    assert stored <= found.nbytes == cache.nbytes < 1.2 * stored
    # One layer held the prompt exactly while the others were compressed.
    assert found.nbytes < cache.peak_bytes < found.nbytes + exact / 3
    assert cache.bits(32768) < cache.bits(4096) < cache.bits()
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        cache.bits(0)
    assert "3 layers compressed" in str(found) and "5.00 in the body" in str(found)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.peak_bytes == 0


def test_a_basis_that_takes_more_than_it_saves_is_refused_with_both_numbers(llama):
    class Based(Kivi):
        def body(self, place):
            made = super().body(place)
            made.constants["k.basis"] = torch.zeros(4000)
            return made

    def run(context):
        cache = KVCache.for_model(llama, Based(4, 4), sink=8, window=16, context=context)
        logits(llama, cache, ids(100), [100])
        return cache

    assert run(None).bits(100) > run(None).bits(4096) and run(4096)
    with pytest.raises(
        ValueError, match=r"at 60 tokens: .* of 3 layers take 48000 bytes, .* saves 41472"
    ):
        KVCache.for_model(llama, Based(4, 4), sink=8, window=16, context=60)


def test_many_rows_share_one_scratch(llama):
    cache = KVCache.for_model(llama, "k4v4", sink=8, window=16)
    logits(llama, cache, ids(200), [150, 50])
    scratch = cache.layers[0]._scratch
    assert all(layer._scratch is scratch for layer in cache.layers)
    assert scratch.nbytes == 2 * 2 * 200 * 32 * 4  # K and V of one layer
    logits(llama, cache, ids(1), [1])
    assert scratch.nbytes == 0


@pytest.mark.parametrize("level", [0, 1])
def test_a_parked_cache_goes_on_where_it_was(llama, level):
    tokens = ids(160)
    kept, parked = (KVCache.for_model(llama, "k3v2", sink=8, window=16) for _ in range(2))
    for cache in (kept, parked):
        logits(llama, cache, tokens[:, :150], [150])
    parked.park(level=level)
    with pytest.raises(RuntimeError, match="parked"):
        logits(llama, parked, tokens[:, 150:], [10])
    parked.unpark()
    after = [logits(llama, x, tokens[:, 150:], [1] * 10) for x in (kept, parked)]
    assert torch.equal(*after)


def test_k_before_rope_where_the_model_says_how(llama):
    method = Kivi(8, 8, pre_rope=True)
    want = logits(llama, DynamicCache(config=llama.config), ids(200), CHUNKS)
    got = logits(llama, KVCache.for_model(llama, method, sink=8, window=16), ids(200), CHUNKS)
    assert 0 < (got - want).norm() / want.norm() < 1e-3


def test_what_cannot_be_compressed_is_refused_before_anything_runs(llama):
    model = model_of(LlamaConfig(**SIZES))
    model.config.layer_types = ["sliding_attention"] * 3
    model.config.sliding_window = 16
    with pytest.raises(ValueError, match=r"all 3 .* are of sliding_attention, which keeps no"):
        KVCache.for_model(model)
    with pytest.raises(ValueError, match="preset must be one of"):
        compress(llama, "k9").__enter__()
    assert not llama._forward_pre_hooks
    with pytest.raises(ValueError, match="layer 0 can't be compressed: groups of 24 channels"):
        KVCache.for_model(llama, Kivi(2, 2, group=24))
    with pytest.raises(ValueError, match=r"layer 0 can't be compressed: .* need a calibration"):
        KVCache.for_model(llama, "calibrated-1.8")
    with pytest.raises(ValueError, match=r"calibration must be .*, got 'kv.safetensors'"):
        KVCache.for_model(llama, "prefixkv", "kv.safetensors")
    with pytest.raises(ValueError, match="context must be at least 1 token, got 0"):
        KVCache.for_model(llama, "k4v4", context=0)
    with pytest.raises(ValueError, match="must be one of transformers, got Linear"):
        KVCache.for_model(torch.nn.Linear(2, 2))


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
        assert handle.cache.compressed == (0, 1, 2) and not handle.cache.left
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
    stand_in = lazy.LazyPast(cache.layers[0], 0, tuple(k.shape), k)
    assert stand_in.shape == k.shape and stand_in.dtype == k.dtype
    assert torch.equal(stand_in * 2, k * 2)
    assert torch.equal(torch.cat([k, stand_in], 2), torch.cat([k, k], 2))
    repeated = stand_in[:, :, None, :, :].expand(1, 2, 2, 100, 32).reshape(1, 4, 100, 32)
    assert type(repeated) is lazy.LazyPast and repeated.shape == (1, 4, 100, 32)
    assert torch.equal(repeated + 0, k.repeat_interleave(2, 1))
    assert torch.equal(stand_in[:, :, 3:5], k[:, :, 3:5])
