"""The maps of TransMLA, by what they must do to scores and outputs."""

import pytest
import torch

from sage_diffusion.kv.transmla import ConversionError, LayerGram, Sizes, maps

HEADS, DIM = 3, 8
WIDTH = HEADS * DIM
ANGLES = torch.tensor([1.0, 0.3, 0.05, 1e-4])


def data(seed=0, tokens=400):
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 12, generator=g) @ torch.randn(12, 2 * WIDTH, generator=g)
    return shared + 0.1 * torch.randn(tokens, 2 * WIDTH, generator=g)


def gram(kv):
    kv = kv.double()
    return LayerGram(kv.T @ kv, torch.ones(HEADS, DIM).double())


def turned(x, position, frequencies):
    """Pairs ``x [.., 2 n]`` at a position."""
    angle = position * ANGLES[frequencies]
    a, b = x.chunk(2, -1)
    return torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
    )  # fmt: skip


@pytest.mark.parametrize("by_weight", [True, False])
def test_mixing_heads_of_one_frequency_commutes_with_rope(by_weight):
    kv, every = data(), torch.arange(DIM // 2)
    made = maps(gram(kv), Sizes(WIDTH, WIDTH), ANGLES, 100, by_weight=by_weight)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(HEADS, DIM, generator=g)
    k, v = kv[7].split(WIDTH)
    kept = made.down @ kv[7]
    for head in range(HEADS):
        own = k.view(HEADS, DIM)[head]
        want = turned(q[head], 9, every) @ turned(own, 4, every)
        up = made.q_up[head] @ q[head]
        assert up[:WIDTH].abs().max() < 1e-4  # nothing of K is in the latent
        got = turned(up[WIDTH:], 9, made.frequencies) @ turned(kept[WIDTH:], 4, made.frequencies)
        assert got == pytest.approx(float(want), rel=1e-3, abs=1e-3)
        out = made.v_up[head] @ kept[:WIDTH]
        torch.testing.assert_close(out, v.view(HEADS, DIM)[head], atol=1e-3, rtol=1e-3)


def test_the_latent_holds_what_heads_share():
    kv = data()
    made = maps(gram(kv), Sizes(14, 8), ANGLES, 100)
    k, v = kv.split(WIDTH, 1)
    q = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(2))
    kept = kv @ made.down.T
    for head in range(HEADS):  # at position 0, where RoPE does nothing
        got = kept @ made.q_up[head] @ q[head]
        want = k.view(-1, HEADS, DIM)[:, head] @ q[head]
        assert (got - want).norm() < 0.2 * want.norm()
        out = kept[:, :14] @ made.v_up[head].T
        own = v.view(-1, HEADS, DIM)[:, head]
        assert (out - own).norm() < 0.2 * own.norm()


def test_rope_stays_where_scores_need_it():
    found = maps(gram(data()), Sizes(14, 12), ANGLES, 100).frequencies
    assert 3 not in found and 0 in found  # the last hardly turns in 100 tokens
    far = maps(gram(data()), Sizes(14, WIDTH), ANGLES, 100).frequencies
    assert far.bincount().tolist() == [HEADS] * 4
    by_number = maps(gram(data()), Sizes(14, 8), ANGLES, 100, by_weight=False).frequencies
    assert by_number.tolist() == [0, 1, 2, 3]


def test_sizes_must_fit():
    for sizes, said in ((Sizes(3, 26), "0 to 24"), (Sizes(41, 8), "1 to 40"), (Sizes(3, -2), "0")):
        with pytest.raises(ConversionError, match=said):
            maps(gram(data()), sizes, ANGLES, 100)
