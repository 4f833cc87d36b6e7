"""K in a calibrated basis, V in groups of three or more levels, heavy hitters."""

import dataclasses
import gc
import weakref

import pytest
import torch

from sage_diffusion.kv import tensor_files
from sage_diffusion.kv.calibration import FORMAT, Calibration, CalibrationError, kept_shares
from sage_diffusion.kv.coefficients import Coefficients, TokenCodes
from sage_diffusion.kv.method import Place
from sage_diffusion.kv.methods.calibrated import Calibrated
from sage_diffusion.kv.methods.matryoshka import Matryoshka
from sage_diffusion.kv.moments import LayerMoments, heavy_shares

HEADS, DIM = 2, 32


def keys(tokens, seed, batch=1):
    """K whose channels depend on each other, with a mean."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(HEADS * DIM, HEADS * DIM, generator=g) * torch.logspace(0, -2, HEADS * DIM)
    z = torch.randn(batch, tokens, HEADS * DIM, generator=torch.Generator().manual_seed(seed))
    k = z @ mix.T + 3
    return k.unflatten(2, (HEADS, DIM)).transpose(1, 2)


@pytest.fixture(scope="module")
def calibration():
    parts = []
    for layer in range(2):
        moments, g = LayerMoments(), torch.Generator().manual_seed(layer)
        k = keys(512, 10 + layer)
        moments.k.append(k[0].transpose(0, 1).flatten(1).half())
        moments.add_gradient(torch.randn(400, HEADS * DIM, generator=g))
        moments.add_sides(k[0], torch.randn(HEADS, 512, DIM, generator=g))
        moments.received.append(torch.rand(300, generator=g))
        parts.append(moments.tensors(HEADS))
    tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return Calibration("abc", (0, 1), tensors | {"heavy": torch.ones(2, HEADS)}, {"model": "toy"})


def test_nothing_keeps_a_calibration_that_its_caller_drops(calibration):
    own = dataclasses.replace(calibration)
    assert own.widths(2.0, "joint") is own.widths(2, "joint")
    ranks = Matryoshka(0.5).ranks(own)
    assert Matryoshka(0.5, width=4).ranks(own) is ranks
    assert dataclasses.replace(own).widths(2.0, "joint") is not own.widths(2.0, "joint")
    alive = weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None


def body(calibration, layer=0, **settings):
    cpu = torch.device("cpu")
    place = Place(layer, HEADS, DIM, DIM, torch.float32, cpu, None, calibration)
    settings = {"v_group": 32, "k_bits": 3.0} | settings
    return Calibrated(**settings).body(place)


def test_k_is_near_and_far_better_than_its_channels_at_equal_bits(calibration):
    k, v = keys(256, 1), torch.randn(1, HEADS, 256, DIM, generator=torch.Generator().manual_seed(2))
    made = body(calibration)
    made.append(k, v)
    got_k, got_v = made.read()
    plain = Coefficients(torch.full((HEADS * DIM,), 3), 128)
    flat = k.transpose(1, 2).flatten(2)
    plain.append(flat)
    error = (got_k - k).square().mean()
    assert error < 0.5 * (plain.read(0, 256) - flat[:, :, plain.kept]).square().mean()
    assert (got_v - v).abs().max() < 1.2  # half a step of 3, some 5.5 / 3 wide


def test_bits_are_those_that_were_asked_for(calibration):
    assert calibration.widths(2.0, "joint").shape == (2, HEADS * DIM)
    for basis in ("joint", "head"):
        bodies = [body(calibration, layer, k_bits=2.0, basis=basis) for layer in range(2)]
        for made in bodies:
            made.append(keys(256, 1), keys(256, 2))
        stored = sum(x for made in bodies for name, x in made.parts().items() if "k.codes" in name)
        side = sum(x for made in bodies for name, x in made.parts().items()
                   if name in ("k.steps", "k.zeros"))  # fmt: skip
        assert 1.9 < 8 * (stored + side) / (2 * 256 * HEADS * DIM) <= 2.0
    assert calibration.loss(2.0, "joint") < calibration.loss(2.0, "head")


def test_parts_of_what_was_appended_can_be_read(calibration):
    made, k, v = body(calibration, unit=32), keys(416, 3, batch=2), keys(416, 4, batch=2)
    made.append(k[:, :, :288], v[:, :, :288])  # groups of 128, 128 and 32 tokens
    made.append(k[:, :, 288:], v[:, :, 288:])
    whole = made.read()
    for start, stop in ((0, 416), (130, 300), (287, 289)):
        for got, want in zip(made.read(start, stop), whole, strict=True):
            torch.testing.assert_close(got, want[:, :, start:stop])
    made.crop(192)
    made.append(k[:, :, 192:320], v[:, :, 192:320])
    assert made.tokens == 320
    torch.testing.assert_close(made.read(0, 192)[0], whole[0][:, :, :192])
    assert (made.read(192, 320)[0] - k[:, :, 192:320]).abs().mean() < 0.5


def test_heavy_hitters_are_nearly_exact_and_survive_reordering(calibration):
    made, k, v = body(calibration, heavy=0.05, k_bits=1.0), keys(128, 5, 2), keys(128, 6, 2)
    attended = torch.zeros(2, HEADS, 128)
    attended[0, 0, [3, 70]] = 1.0
    attended[1, 1, [64, 127]] = 1.0
    made.attended = attended
    made.append(k, v)
    assert made.attended is None
    made.select(torch.tensor([1, 0]))
    got_k, got_v = made.read()
    for got, want in ((got_k, k), (got_v, v)):
        error = (got[[1, 0]] - want).abs().amax(-1)
        assert error[0, 0, [3, 70]].max() < 0.15 and error[1, 1, [64, 127]].max() < 0.15
        assert error[1, 0].median() > 0.15
    made.crop(64)
    assert (made.stores["heavy.tokens"].read() < 64).all()


@pytest.mark.parametrize("width", ["ternary", 2, 3, 4, 8])
def test_values_reach_from_the_smallest_to_the_largest(width):
    x = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(7)) + 0.3
    codes = TokenCodes(width, 32, 64)
    codes.append(x[:, :, :20])
    codes.append(x[:, :, 20:])
    got = codes.read(0, 50)
    levels = 3 if width == "ternary" else 2**width
    span = (x.unflatten(-1, (2, 32)).amax(-1) - x.unflatten(-1, (2, 32)).amin(-1)) / (levels - 1)
    limit = 0.5 + 0.08 * levels  # of a step: half of one, and what 8 bits for step and zero cut
    assert ((got - x).unflatten(-1, (2, 32)).abs().amax(-1) <= limit * span).all()
    assert torch.equal(codes.read(13, 31), got[:, :, 13:31])


def test_a_layer_without_bits_reads_as_its_mean(calibration):
    made = body(calibration, k_bits=0.0)
    made.append(keys(128, 8), keys(128, 9))
    k, _ = made.read(5, 9)
    assert k.shape == (1, HEADS, 4, DIM) and torch.equal(k[:, :, 0], k[:, :, 3])


def test_files_come_back_and_those_of_others_are_refused(calibration, tmp_path):
    path = tmp_path / "toy.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path, "abc")
    assert loaded.layers == (0, 1) and loaded.about == {"model": "toy"}
    assert all(torch.equal(x, loaded.tensors[name]) for name, x in calibration.tensors.items())
    with pytest.raises(CalibrationError, match=r"must be of this model \(xyz\), got one of toy"):
        Calibration.load(path, "xyz")
    tensor_files.save(path, FORMAT, calibration.tensors, {"about": "{}"})
    with pytest.raises(CalibrationError, match="its metadata lack fingerprint, layers"):
        Calibration.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="must be a safetensors file"):
        Calibration.load(path)


def test_what_does_not_fit_is_refused(calibration):
    with pytest.raises(CalibrationError, match="need a calibration"):
        body(None)
    with pytest.raises(CalibrationError, match="must cover layer 7"):
        body(calibration, layer=7)
    with pytest.raises(ValueError, match="groups of 24 channels"):
        body(calibration, v_group=24)
    other = dataclasses.replace(calibration, tensors={
        name: x[:, :32] if name == "joint.weights" else x[:, :32] if name == "joint.table" else x
        for name, x in calibration.tensors.items()
    })  # fmt: skip
    with pytest.raises(CalibrationError, match="64 channels of K, they have 32"):
        body(other)


def test_flat_layers_keep_more_tokens_than_peaked_ones():
    flat = torch.linspace(0, 1, 101)
    shares = kept_shares(torch.stack([flat, flat.sqrt(), flat**0.1]), 0.4)
    assert float(shares.mean()) == pytest.approx(0.4, abs=0.01)
    assert shares[0] > shares[1] > shares[2]


def test_heads_share_heavy_hitters_by_what_they_attend_to():
    attended = torch.zeros(2, 100)
    attended[1, :10] = 1.0
    shares = heavy_shares([[attended]], share=0.05)
    assert shares.tolist() == [[0.0, 2.0]]
