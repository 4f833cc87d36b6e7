"""Calibrating a small Llama, and its past in the bases that come of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sage_diffusion.integrations.transformers.cache import KVCache
from sage_diffusion.integrations.transformers.kv_calibration import Recipe, calibrate
from sage_diffusion.integrations.transformers.rope import model_rope
from sage_diffusion.kv.calibration import Calibration, CalibrationError, fingerprint
from sage_diffusion.kv.methods.calibrated import Calibrated

RECIPE = Recipe(chunk=320, scored=48, gap=32, sink=8)


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def ids(tokens, seed=0):
    return torch.randint(64, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate(model, [ids(320), ids(200, 1), ids(20, 2)], recipe=RECIPE)


def test_rope_is_the_model_s_and_undoes_itself(model):
    rope = model_rope(model)
    assert rope is not None
    k = torch.randn(2, 2, 5, 16)
    positions = torch.arange(5)[None] + torch.tensor([[3], [90]])
    rotated = rope.rotate(k, positions)
    assert not torch.allclose(rotated, k, atol=0.1)
    torch.testing.assert_close(rope.rotate(rotated, positions, inverse=True), k)


def test_a_calibration_says_what_it_was_made_of(model, calibration):
    assert calibration.fingerprint == fingerprint(model) != fingerprint(llama(1))
    assert calibration.about["tokens"] == 520  # the third text is too short
    assert calibration.about["gradients"] == 2 * (320 + 200 - 2 * (8 + 48 + 32))
    assert calibration.tensors["heavy"].mean() == pytest.approx(1, abs=1e-5)
    assert calibrate(model, [ids(320)], recipe=RECIPE).about == calibrate(
        model, [ids(320)], recipe=RECIPE
    ).about  # fmt: skip


def test_without_a_backward_pass_it_is_pca(model, calibration):
    plain = calibrate(model, [ids(320), ids(200, 1)], recipe=Recipe(**vars(RECIPE) | {"draws": 0}))
    assert plain.about["gradients"] == 0
    name = "joint.weights"
    assert not torch.allclose(plain.tensors[name], calibration.tensors[name])


def logits(model, tokens, cache=None):
    with torch.no_grad():
        if cache is None:
            return model(tokens[None]).logits[0, -16:]
        model(tokens[None, :-16], past_key_values=cache)
        return model(tokens[None, -16:], past_key_values=cache).logits[0]


def test_more_bits_are_nearer(model, calibration):
    tokens, errors = ids(336, 3), []
    exact = logits(model, tokens)
    for bits, width in ((1.0, 2), (3.0, 4), (8.0, 8)):
        method = Calibrated(bits, width, v_group=16, unit=32)
        cache = KVCache.for_model(model, method, calibration, sink=8, window=32)
        errors.append((logits(model, tokens, cache) - exact).abs().max().item())
        assert cache.pasts[0].compressed >= 256
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02 * exact.abs().max()


def test_another_model_s_calibration_is_refused(calibration):
    with pytest.raises(CalibrationError, match="must be of this model"):
        KVCache.for_model(llama(1), Calibrated(), calibration)


def test_files_and_texts(model, calibration, tmp_path):
    path = tmp_path / "llama.safetensors"
    calibration.save(path)
    assert Calibration.load(path, fingerprint(model)).about == calibration.about
    with pytest.raises(CalibrationError, match="more than 120 tokens"):
        calibrate(model, [ids(100)], recipe=RECIPE)
    with pytest.raises(CalibrationError, match="tokenizer"):
        calibrate(model, ["text"], recipe=RECIPE)


def test_a_recipe_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk must have more than 800 tokens, got 100"):
        Recipe(chunk=100)
    with pytest.raises(ValueError, match="draws must be at least 0, got -1"):
        Recipe(draws=-1)


def test_attention_that_is_not_seen_is_refused():
    other = llama()
    other.set_attn_implementation("eager")
    with pytest.raises(CalibrationError, match="attn_implementation='sdpa'"):
        calibrate(other, [ids(320)], recipe=RECIPE)
