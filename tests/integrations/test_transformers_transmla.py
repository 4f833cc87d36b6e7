"""TransMLA on a small Llama: exact where nothing is dropped, told where something is."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sage_diffusion.integrations.transformers.cache import argument
from sage_diffusion.integrations.transformers.transmla import (
    apply,
    convert,
    cost,
    full_rank,
    measure,
)
from sage_diffusion.kv.transmla import Conversion, ConversionError, Sizes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WIDTH = 32  # of K


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval()


def ids(tokens, seed=0):
    return torch.randint(64, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    made = llama()
    with torch.no_grad():  # predictions differ, and biases and positions matter
        made.lm_head.weight.mul_(10)
        for layer in made.model.layers:
            layer.self_attn.k_proj.bias.normal_()
            layer.self_attn.v_proj.bias.normal_()
            layer.self_attn.q_proj.weight.mul_(10)
            layer.self_attn.k_proj.weight.mul_(10)
            layer.self_attn.v_proj.weight.mul_(10)
            layer.self_attn.o_proj.weight.mul_(10)
    return made


@pytest.fixture(scope="module")
def moments(model):
    return measure(model, [ids(200), ids(60, 5)])


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def test_it_is_the_model_where_nothing_is_dropped(model, moments):
    tokens = ids(40, 1)
    want = logits(model, tokens)
    whole = convert(model, moments, Sizes(WIDTH, WIDTH))
    with apply(model, whole):
        got = logits(model, tokens)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert torch.equal(logits(model, tokens), want)  # undone
    plain = convert(model, moments, Sizes(2 * WIDTH, 0))  # exact but for the positions
    with apply(model, plain):
        assert (logits(model, tokens)[:1] - want[:1]).abs().max() < 2e-4
        assert (logits(model, tokens) - want).abs().max() > 0.05


def test_a_cache_keeps_the_latent_and_decodes_as_without_one(model, moments):
    tokens = ids(40, 1)
    made = convert(model, moments, Sizes(24, 8))
    name = argument(model)
    with apply(model, made), torch.no_grad():
        want = model(tokens[None]).logits[0]
        cache = DynamicCache(config=model.config)
        got = [model(part[None], **{name: cache}).logits[0] for part in tokens.split([25, 1, 14])]
        torch.testing.assert_close(torch.cat(got), want, atol=1e-4, rtol=1e-4)
        assert cache.layers[0].keys.shape == (1, 1, 40, 8)
        assert cache.layers[0].values.shape == (1, 1, 40, 24)
        padded = torch.cat([tokens.new_zeros(5), tokens])[None]
        mask = (torch.arange(45) >= 5).long()[None]
        positions = (torch.arange(45) - 5).clamp(min=0)[None]
        left = model(padded, attention_mask=mask, position_ids=positions).logits[0, 5:]
        torch.testing.assert_close(left, want, atol=1e-4, rtol=1e-4)


def test_more_kept_costs_less_and_what_needs_rope_most_keeps_it(model, moments):
    judged = ids(100, 3)

    def kl(rank, rope, **given):
        sizes = Sizes(rank, rope)
        one, partial = (
            convert(model, moments, x, **given) for x in (sizes, full_rank(sizes, WIDTH))
        )
        found = cost(model, judged, one, partial)
        assert found.numbers == 2 * (rank + rope) and found.before == 2 * 2 * WIDTH
        return found.partial.kl, found.whole.kl, found.warning

    small, large, whole = kl(16, 8), kl(32, 8), kl(2 * WIDTH - 24, 24)
    assert small[1] > large[1] > whole[1] and small[0] == pytest.approx(large[0], rel=1e-3)
    assert whole[0] < large[0] and whole[1] == pytest.approx(whole[0], rel=1e-3, abs=1e-6)
    assert small[2] is not None and "must be fine-tuned" in small[2]
    by_number = kl(32, 8, by_weight=False)
    assert large[0] < by_number[0]
    assert kl(16, 8, balance=False)[1] != pytest.approx(small[1], rel=1e-3)


def test_a_file_is_of_one_model(model, moments, tmp_path):
    made = convert(model, moments, Sizes(24, 8))
    path = tmp_path / "transmla.safetensors"
    made.save(path)
    read = Conversion.load(path)
    assert read.sizes == made.sizes and read.about == made.about and read.layers == 2
    with apply(model, read):
        got = logits(model, ids(20))
    with apply(model, made):
        assert torch.equal(logits(model, ids(20)), got)
    with pytest.raises(ConversionError, match="must be of this model"):
        apply(llama(1), read)
    path.write_bytes(b"no")
    with pytest.raises(ConversionError, match="must be a safetensors file"):
        Conversion.load(path)


def test_a_model_is_converted_whole_or_not_at_all(model, moments):
    made = convert(model, moments, Sizes(24, 8))
    made.tensors["1.down"] = made.tensors["1.down"][:, 1:]
    own = [layer.self_attn for layer in model.model.layers]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        apply(model, made)
    assert [layer.self_attn for layer in model.model.layers] == own


def test_training_what_is_converted_changes_no_map(model, moments):
    made = convert(model, moments, Sizes(24, 8))
    before = {name: x.clone() for name, x in made.tensors.items()}
    with apply(model, made), torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_up", "v_up", "kv_proj.weight"):
                layer.self_attn.get_parameter(name).zero_()
    assert all(torch.equal(x, before[name]) for name, x in made.tensors.items())


def test_a_handle_leaves_nothing_in_the_model(model, moments):
    hooked = [x for x in model.modules() if x._forward_hooks or x._forward_pre_hooks]
    handle = apply(model, convert(model, moments, Sizes(24, 8)))
    latent = weakref.ref(model.model.layers[0].self_attn)
    handle.remove()
    handle.remove()
    gc.collect()
    assert latent() is None and not hooked


def test_what_cannot_be_converted_is_said(model, moments):
    with pytest.raises(ConversionError, match="alone, it has k_norm"):
        measure(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)), [ids(20)])
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    yarn["original_max_position_embeddings"] = 128
    with pytest.raises(ConversionError, match="RoPE must turn"):  # and has a gain
        measure(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=yarn)), [ids(20)])
    for rank, rope, said in ((8, 7, "even number"), (0, 8, "rank must be"), (60, 8, "rank must")):
        with pytest.raises(ConversionError, match=said):
            convert(model, moments, Sizes(rank, rope))
    with pytest.raises(ConversionError, match="must be a text"):
        measure(model, [])
    already = pytest.raises(ConversionError, match="must not be converted already")
    with apply(model, convert(model, moments, Sizes(8, 8))), already:
        measure(model, [ids(20)])
