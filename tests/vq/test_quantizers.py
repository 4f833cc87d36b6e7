"""What every quantizer promises, one matrix; and what each of them is."""

import math

import pytest
import torch
from torch import nn

from sage_diffusion.vq.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    QUANTIZERS,
    Groups,
    Residual,
    SimVQ,
    VectorQuantizer,
    build,
)
from sage_diffusion.vq.quantizers.base import rotated, straight_through
from sage_diffusion.vq.quantizers.scales import Scales

MATRIX = {
    "ema": (lambda: VectorQuantizer(8, 64), 6),
    "ema-cosine": (lambda: VectorQuantizer(8, 64, metric="cosine"), 6),
    "vanilla": (lambda: VectorQuantizer(8, 64, decay=None, kmeans=False, init="uniform"), 6),
    "simvq": (lambda: SimVQ(8, 64), 6),
    "simvq-rotation": (lambda: SimVQ(8, 64, rotation_trick=True), 6),
    "ibq": (lambda: IBQ(8, 64), 6),
    "fsq": (lambda: FSQ((8, 5, 4), 8), math.log2(160)),
    "fsq-bare": (lambda: FSQ((4,) * 8), 16),
    "bsq": (lambda: BSQ(8, 12), 12),
    "lfq": (lambda: LFQ(8, 8), 8),
    "groups": (lambda: Groups([SimVQ(4, 16), FSQ((4, 4), 4)]), 8),
    "residual": (lambda: Residual([SimVQ(8, 16), VectorQuantizer(8, 16)]), 8),
    "levels-of-groups": (lambda: Residual([Groups([LFQ(4, 2), BSQ(4, 2)]), SimVQ(8, 16)]), 8),
}


@pytest.fixture(params=MATRIX)
def quantizer(request):
    torch.manual_seed(0)
    return MATRIX[request.param][0]()


def latents(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MATRIX)
def test_bits(name):
    make, bits = MATRIX[name]
    assert make().bits == pytest.approx(bits)


def test_ids_give_back_what_forward_gave(quantizer):
    x = latents(2, 50, 8)
    quantizer(x)  # a start by k-means
    quantizer.eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with torch.no_grad():
        out = quantizer(x)
    shape = (2, 50) if quantizer.levels == 1 else (2, 50, quantizer.levels)
    assert out.indices.shape == shape and out.indices.dtype == torch.int64
    assert out.indices.min() >= 0 and out.indices.max() < quantizer.codebook_size
    assert torch.equal(out.indices, quantizer.encode(x))
    assert torch.equal(out.quantized, quantizer.decode(out.indices))
    assert out.loss.shape == () and out.loss.isfinite()
    assert all(torch.equal(before[n], t) for n, t in quantizer.state_dict().items())


def test_forward_while_training_has_the_codes_too(quantizer):
    x = latents(2, 50, 8).requires_grad_()
    out = quantizer(x)
    out.quantized.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert len(out.indices.unique()) > 1


def test_settings_and_weights_make_it_again(quantizer):
    quantizer(latents(2, 50, 8))
    again = build(quantizer.settings)
    assert type(again) is type(quantizer) and again.settings == quantizer.settings
    again.load_state_dict(quantizer.state_dict())
    x = latents(1, 30, 8, seed=2)
    assert torch.equal(again.eval().encode(x), quantizer.eval().encode(x))


def test_training_lowers_the_error(quantizer):
    """The same latents again and again: linear layers round the quantizer learn to code them."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    parameters = [*layer.parameters(), *(p for p in quantizer.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(parameters, 0.01)
    x, errors = latents(4, 64, 8), []
    head = nn.Linear(8, 8)
    parameters += list(head.parameters())
    optimizer.add_param_group({"params": list(head.parameters())})
    for _ in range(60):
        out = quantizer(layer(x))
        error = nn.functional.mse_loss(head(out.quantized), x)
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])


def test_wrong_shapes_and_ids(quantizer):
    with pytest.raises(ValueError, match=r"latents must be \[B, N, 8\], got \(2, 5, 7\)"):
        quantizer.encode(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"latents must be \[B, N, 8\]"):
        quantizer(torch.zeros(5, 8))
    ids = quantizer.encode(latents(1, 4, 8))
    for wrong in (quantizer.codebook_size, -1):
        bad = ids.clone()
        bad[0, 0] = wrong
        with pytest.raises(ValueError, match=f"ids must be 0 to {quantizer.codebook_size - 1}"):
            quantizer.decode(bad)
    with pytest.raises(ValueError, match=r"ids must be integers \[B, N"):
        quantizer.decode(ids.float())
    with pytest.raises(ValueError, match=r"ids must be integers \[B, N"):
        quantizer.decode(ids[None])


def test_every_quantizer_is_in_the_matrix():
    assert {make().kind for make, _ in MATRIX.values()} == set(QUANTIZERS)


class TestSimVQ:
    def test_is_what_was_published(self):
        """Codes, loss and gradients of the authors' formulas, with the whole table in the graph."""
        torch.manual_seed(0)
        quantizer, x = SimVQ(6, 40), latents(1, 30, 6).requires_grad_()
        out = quantizer(x)
        grads = torch.autograd.grad(
            out.loss + out.quantized.sin().sum(), [x, *quantizer.projection.parameters()]
        )
        table = quantizer.projection(quantizer.basis)
        ids = torch.cdist(x[0], table).argmin(1)
        q = table[ids][None]
        loss = 0.25 * (q.detach() - x).square().mean() + (q - x.detach()).square().mean()
        through = x + (q - x).detach()
        wanted = torch.autograd.grad(
            loss + through.sin().sum(), [x, *quantizer.projection.parameters()]
        )
        assert torch.equal(out.indices[0], ids)
        torch.testing.assert_close(out.loss, loss)
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        assert not quantizer.basis.requires_grad
        assert quantizer.basis.std() == pytest.approx(6**-0.5, rel=0.15)

    def test_folds_into_a_plain_codebook_bit_for_bit(self):
        torch.manual_seed(0)
        quantizer, x = SimVQ(16, 300).eval(), latents(2, 200, 16)
        plain = quantizer.fold()
        with torch.no_grad():
            out = quantizer(x)
        assert torch.equal(plain.encode(x), out.indices)
        assert torch.equal(plain.decode(out.indices), out.quantized)
        raw = nn.functional.embedding(out.indices, quantizer.basis)
        assert (raw - out.quantized).abs().max() > 0.1  # what get_codebook_entry upstream returns

    def test_rotation_turns_the_gradient(self):
        x, q = latents(1, 20, 5).requires_grad_(), latents(1, 20, 5, seed=2)
        out = rotated(x, q)
        assert torch.equal(out, q)
        (gradient,) = torch.autograd.grad(out, x, x.detach())
        # The map is a rotation that takes u to v, times |q| / |x|: lengths scale by that alone.
        torch.testing.assert_close(gradient.norm(dim=-1), q.norm(dim=-1))
        (back,) = torch.autograd.grad(rotated(x, q), x, q)  # its transpose takes q to x's direction
        u = x / x.norm(dim=-1, keepdim=True)
        want = u * (q.norm(dim=-1, keepdim=True) ** 2 / x.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(back, want, rtol=1e-4, atol=1e-5)
        zero = torch.zeros(1, 1, 5, requires_grad=True)
        assert torch.equal(rotated(zero, q[:, :1]), q[:, :1])


class TestVectorQuantizer:
    def test_follows_its_latents(self):
        """One step by hand: counts and sums move by 1 - decay towards those of the batch."""
        quantizer = VectorQuantizer(2, 2, decay=0.9, kmeans=False, revive=0.0)
        start = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
        quantizer.codebook.data.copy_(start)
        quantizer.sums.copy_(start)
        x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
        assert quantizer(x).indices.tolist() == [[0, 0, 1]]
        counts = torch.tensor([0.9 + 0.2, 0.9 + 0.1])
        sums = torch.tensor([[0.1, 0.1], [9.9, 9.9]])
        torch.testing.assert_close(quantizer.codebook, sums / counts[:, None])

    def test_kmeans_finds_clusters_and_revival_the_dead(self):
        torch.manual_seed(0)
        centres = 10 * latents(8, 4)
        x = (centres[:, None] + 0.01 * latents(8, 100, 4)).reshape(1, -1, 4)
        quantizer = VectorQuantizer(4, 16, decay=0.9)
        for _ in range(40):
            out = quantizer(x)
        assert (out.quantized - x).abs().max() < 0.2
        dead = VectorQuantizer(4, 16, decay=0.9, kmeans=False, revive=0.0, init="uniform")
        for _ in range(40):
            dead(x)
        assert len(dead.encode(x).unique()) < len(quantizer.encode(x).unique())

    def test_codes_without_averages_are_trained_on_from_where_they_are(self):
        torch.manual_seed(0)
        codebook = latents(16, 4)
        quantizer = VectorQuantizer(4, 16, revive=0.0)
        quantizer.load_state_dict({"codebook": codebook})
        quantizer(codebook[None])  # every latent is a code: nothing may move
        torch.testing.assert_close(quantizer.codebook.data, codebook)

    def test_cosine_codes_lie_on_the_sphere(self):
        quantizer = VectorQuantizer(8, 32, metric="cosine").eval()
        decoded = quantizer.decode(torch.arange(32)[None])
        torch.testing.assert_close(decoded.norm(dim=-1), torch.ones(1, 32))

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"decay": 1.0}, "decay must be None or 0 <= decay < 1"),
            ({"metric": "l1"}, "metric must be l2, cosine or dot"),
            ({"init": "zero"}, "init must be normal or uniform"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            VectorQuantizer(4, 8, **options)


def test_fsq_enumerates_its_grid():
    """Levels 3 and 4 by hand: codes in -1 .. 1, the first digit of an id is the lowest."""
    quantizer = FSQ((3, 4))
    codes = quantizer.decode(torch.arange(12)[None])[0]
    assert codes[:, 0].tolist() == [-1, 0, 1] * 4
    assert codes[:, 1].tolist() == [-1] * 3 + [-0.5] * 3 + [0] * 3 + [0.5] * 3
    x = torch.tensor([[[0.0, 0.0], [9.0, 9.0], [-9.0, -9.0]]])
    assert quantizer.decode(quantizer.encode(x))[0].tolist() == [[0, 0], [1, 0.5], [-1, -1]]


def test_signs_are_bits():
    x = torch.tensor([[[0.1, -0.1, 2.0], [-1.0, -1.0, -1.0]]])
    assert LFQ(3, 3).encode(x).tolist() == [[0b101, 0]]
    assert LFQ(3, 3).decode(torch.tensor([[0b101]])).tolist() == [[[1, -1, 1]]]
    decoded = BSQ(3, 3).decode(torch.tensor([[0b101]]))
    torch.testing.assert_close(decoded, torch.tensor([[[1.0, -1.0, 1.0]]]) * 3**-0.5)
    assert LFQ(62, 62).encode(torch.ones(1, 1, 62)).item() == 2**62 - 1


def test_ibq_moves_every_code():
    torch.manual_seed(0)
    quantizer = IBQ(4, 20)
    out = quantizer(latents(1, 10, 4))
    out.quantized.sum().backward()
    assert (quantizer.codebook.grad.abs().sum(1) > 0).all()
    scores = latents(1, 10, 4)[0] @ quantizer.codebook.detach().t()
    assert torch.equal(out.indices[0], scores.argmax(1))


def test_groups_and_levels_by_hand():
    first, second = FSQ((3,)), FSQ((5,))
    groups = Groups([first, second])
    x = torch.tensor([[[9.0, -9.0], [0.0, 9.0]]])
    assert groups.encode(x).tolist() == [[2 + 3 * 0, 1 + 3 * 4]]
    levels = Residual([VectorQuantizer(1, 2), VectorQuantizer(1, 2)]).eval()
    for part, codes in zip(levels.parts, ([-1.0, 1.0], [-0.25, 0.25]), strict=True):
        part.codebook.data.copy_(torch.tensor(codes)[:, None])
    assert levels.encode(torch.tensor([[[0.8], [-1.3]]])).tolist() == [[[1, 0], [0, 0]]]
    assert levels.decode(torch.tensor([[[1, 0], [0, 0]]])).tolist() == [[[0.75], [-1.25]]]


class TestScales:
    """The pyramid of VAR, which takes a grid and gives a row."""

    def test_ids_give_back_what_forward_gave(self):
        torch.manual_seed(0)
        scales = Scales(8, 64, (1, 2, 4))
        x = latents(2, 16, 8).requires_grad_()
        out = scales(x)
        assert out.indices.shape == (2, 21) == (2, scales.tokens)
        assert torch.equal(out.indices, scales.encode(x))
        assert torch.equal(out.quantized, scales.decode(out.indices))
        (out.quantized.square().sum() + out.loss).backward()
        assert x.grad.abs().sum() > 0 and scales.codebook.grad.abs().sum() > 0
        with pytest.raises(ValueError, match="a grid of 4 x 4, got 15"):
            scales.encode(x[:, :15])
        with pytest.raises(ValueError, match="ids must be 21 a picture, got 20"):
            scales.decode(out.indices[:, :20])

    def test_finer_scales_leave_less(self):
        """Every scale adds: what is left of the latents shrinks."""
        torch.manual_seed(0)
        scales, x = Scales(2, 512, (1, 2, 4), strength=0.0), latents(4, 16, 2)
        whole = (x - scales(x).quantized).square().mean()
        assert whole < 0.25 * x.square().mean()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Scales(8, 64, (2, 2)), "two or more ascending sides, got"),
        (lambda: Scales(8, 64, (1, 2), convolutions=0), "convolutions must be at least 1"),
        (lambda: Groups([FSQ((4,))]), "two or more"),
        (lambda: Groups([LFQ(40, 40), LFQ(40, 40)]), "fit into 63 bits, got 80.0"),
        (lambda: Residual([FSQ((4,)), FSQ((5,))]), "the same dim and codebook_size"),
        (lambda: FSQ((1,)), "numbers from 2 on"),
        (lambda: LFQ(8, 63), "1 to 62 bits, got 63"),
        (lambda: SimVQ(0, 8), "dim must be at least 1"),
        (lambda: SimVQ(8, 1), "codebook_size at least 2"),
        (lambda: build({"kind": "vqvae"}), "one of vector, simvq, ibq, fsq, bsq, lfq"),
        (lambda: build({"kind": "simvq", "dim": 4, "codes": 9}), "does not take these settings"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_straight_through_is_exact():
    """Not ``x + (q - x)``: that loses the last bits, and with them the round trip through ids."""
    x, q = 1000 * latents(50, 8).requires_grad_(), latents(50, 8, seed=2)
    assert torch.equal(straight_through(x, q), q)
    assert not torch.equal(x + (q - x).detach(), q)
