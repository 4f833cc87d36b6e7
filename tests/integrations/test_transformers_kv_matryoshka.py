"""Training MatryoshkaKV's rotations on a small Llama."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sage_diffusion.integrations.transformers.cache import KVCache
from sage_diffusion.integrations.transformers.kv_calibration import Recipe, calibrate
from sage_diffusion.integrations.transformers.kv_matryoshka import Training, cayley, train
from sage_diffusion.kv.calibration import CalibrationError
from sage_diffusion.kv.methods.matryoshka import Matryoshka

RECIPE = Recipe(chunk=320, scored=48, gap=32, sink=4, draws=0)
TRAINING = Training(steps=20, chunk=64, rate=0.01, sink=4, window=8)


def ids(tokens, seed=0):
    return torch.randint(64, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(10)
        deaf = torch.arange(64) % 16 < 8  # channels of V that are hardly heard
        for layer in made.model.layers:
            for name in "qkvo":
                getattr(layer.self_attn, f"{name}_proj").weight.mul_(3)
            layer.self_attn.o_proj.weight[:, deaf] *= 0.1
    return made


@pytest.fixture(scope="module")
def plain(model):
    return calibrate(model, [ids(640)], recipe=RECIPE)


@pytest.fixture(scope="module")
def trained(model, plain):
    return train(model, plain, [ids(640), ids(640, 1)], training=TRAINING)


def divergence(model, calibration, method):
    """Mean KL of a text's last tokens, with the past in a cache of this method."""
    tokens = ids(200, 7)[None]
    cache = KVCache.for_model(model, method, calibration, sink=4, window=8)
    with torch.no_grad():
        want = model(tokens).logits[0, 160:].log_softmax(-1)
        model(tokens[:, :160], past_key_values=cache)
        got = torch.cat(
            [model(tokens[:, i : i + 1], past_key_values=cache).logits[0] for i in range(160, 200)]
        ).log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1).mean())


def test_training_helps_on_text_that_it_has_not_seen(model, plain, trained):
    found = trained.about["matryoshka"]
    assert found["trained"] and found["after"] < 0.9 * found["before"]
    equal = Matryoshka(0.5, adaptive=False)
    assert divergence(model, trained, equal) < 0.6 * divergence(model, plain, equal)
    assert all(x.requires_grad for x in model.parameters())


def test_rotations_stay_orthogonal_and_training_can_be_repeated(model, plain, trained):
    basis = trained.tensors["post.basis"].float()
    one = torch.eye(16).expand_as(basis)
    torch.testing.assert_close(basis @ basis.mT, one, atol=4e-3, rtol=0)
    assert (basis - plain.tensors["post.basis"].float()).norm() > 0.1
    again = train(model, plain, [ids(640), ids(640, 1)], training=TRAINING)
    assert torch.equal(again.tensors["post.basis"], trained.tensors["post.basis"])
    assert torch.equal(cayley(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, 3, 3))


def test_ranks_go_where_they_cost_most(plain, trained, tmp_path):
    losses = trained.tensors["post.losses"]
    assert losses.shape == (2, 2, 2, 17) and (losses.diff(dim=-1) <= 0).all()
    assert (losses[..., -1] == 0).all() and (losses[..., 0] > 0).all()
    ranks = Matryoshka(0.5).ranks(trained)
    assert ranks.sum() <= 8 * ranks.numel() < ranks.sum() + 2
    assert not torch.equal(ranks, Matryoshka(0.5).ranks(plain))
    dear = trained.tensors["post.losses"].clone()
    dear[1, 0, 1] *= 100
    other = dataclasses.replace(trained, tensors=trained.tensors | {"post.losses": dear})
    assert Matryoshka(0.5).ranks(other)[1, 0, 1] > ranks[1, 0, 1]


def test_what_does_not_help_is_not_kept(model, plain):
    idle = dataclasses.replace(TRAINING, steps=1, rate=0.0)
    found = train(model, plain, [ids(128)], training=idle)
    assert not found.about["matryoshka"]["trained"]
    assert torch.equal(found.tensors["post.basis"], plain.tensors["post.basis"])


def test_what_cannot_be_trained_is_said(model, plain):
    with pytest.raises(CalibrationError, match="two chunks of 64 tokens to train on, got 1"):
        train(model, plain, [ids(100)], training=TRAINING)
    with pytest.raises(CalibrationError, match="tokenizer"):
        train(model, plain, ["text"], training=TRAINING)
    with pytest.raises(CalibrationError, match="must be of this model"):
        train(model, dataclasses.replace(plain, fingerprint="other"), [ids(200)])
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(CalibrationError, match="attn_implementation='sdpa'"):
            train(model, plain, [ids(200)], training=TRAINING)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"held": 1}, "held must be at least 2, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"rate": -1e-3}, "rate must be at least 0, got -0.001"),
        ({"chunk": 160}, r"more tokens than sink and window together \(160\), got 160"),
    ],
)
def test_what_nothing_can_be_trained_with_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Training(**wrong)
