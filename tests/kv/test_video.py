"""Centroids of a span and residuals of few bits."""

import pytest
import torch

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.method import Place
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.video import Video, k_means

PLACE = Place(0, 2, 64, 64, torch.float32, torch.device("cpu"))


def frames(count=8, tokens=64, noise=0.05, seed=0):
    """A picture that hardly changes: tokens of a frame differ, those of frames do not."""
    random = torch.Generator().manual_seed(seed)
    picture = torch.randn(1, 2, 1, tokens, 64, generator=random)
    moved = picture + noise * torch.randn(1, 2, count, tokens, 64, generator=random)
    return moved.flatten(2, 3)


def error(body, k):
    return ((body.read()[0] - k).norm() / k.norm()).item()


def test_centroids_pay_where_frames_resemble_each_other():
    k = frames(count=32, tokens=16)
    method = Video(centroids=64, span=512)
    body, plain = method.body(PLACE), Kivi(2, 2, 64).body(PLACE)
    body.append(k, k)
    plain.append(k, k)
    assert error(body, k) < 0.04 < 0.3 < error(plain, k)
    random = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
    noise = method.body(PLACE)
    noise.append(random, random)
    assert error(noise, random) > 0.2  # nothing to find


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_error_is_half_a_step(bits):
    k = frames(noise=1.0)
    body = Video(bits, centroids=16, span=256).body(PLACE)
    body.append(k, k)
    steps = body.k.stores["steps"].read().float().unflatten(2, (-1, 256))
    steps = (steps * body.k.stores["units"].read()[:, :, :, None]).flatten(2, 3)
    # FP8 rounds a step by at most 1 / 16, which clips the outermost residual
    bound = steps * (0.5 + (2**bits - 1) / 2 / 16) + 1e-3
    assert ((body.read()[0] - k).abs() <= bound).all()


def test_bytes_are_the_codes_steps_indices_and_centroids():
    k = frames()
    body = Video(2, centroids=64, block=32, span=256).body(PLACE)
    body.append(k, k)
    found = body.parts()
    count = k.numel()
    assert found["k.codes"] == count * 2 // 8
    assert found["v.steps"] == count // 32
    assert found["k.indices"] == count // 64
    assert found["k.centroids"] == 2 * 2 * 64 * 64 * 2  # spans, heads, centroids, channels, bytes


def test_spans_are_read_in_part_cropped_and_go_on():
    k = frames()
    body = Video(4, centroids=16, span=128).body(PLACE)
    body.append(k, 2 * k)
    whole_k, whole_v = body.read()
    part_k, part_v = body.read(100, 300)
    assert torch.equal(part_k, whole_k[:, :, 100:300])
    assert torch.equal(part_v, whole_v[:, :, 100:300])
    body.crop(256)
    body.append(k[:, :, :128], k[:, :, :128])
    assert body.tokens == 384
    assert torch.equal(body.read(0, 256)[0], whole_k[:, :, :256])
    assert torch.equal(body.read(256)[0], whole_k[:, :, :128])


def test_sequences_do_not_share_centroids():
    k = torch.cat([frames(seed=0), frames(seed=1)])
    both, second = (Video(2, centroids=32, span=128).body(PLACE) for _ in "ab")
    both.append(k, k)
    second.append(k[1:], k[1:])
    torch.testing.assert_close(both.read()[0][1:], second.read()[0])
    both.select(torch.tensor([1]))
    torch.testing.assert_close(both.read()[0], second.read()[0])


def test_sink_and_newest_stay_exact_in_a_layer():
    k = frames()
    layer = Layer(Video(2, centroids=16, span=128), sink=64, window=64)
    for start in range(0, 512, 64):
        layer.append(k[:, :, start : start + 64], k[:, :, start : start + 64])
    layer.settle()
    read = layer.read()[0]
    assert layer.compressed == 384
    assert torch.equal(read[:, :, :64], k[:, :, :64])
    assert torch.equal(read[:, :, 448:], k[:, :, 448:])
    assert not torch.equal(read[:, :, 64:448], k[:, :, 64:448])


def test_k_means_keeps_what_nobody_is_near():
    x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [9.0, 0.0], [0.0, 0.1]])
    found = k_means(x[None], 2, 3)[0]
    assert found[1].tolist() == [9.0, 0.0]
    assert torch.allclose(found[0], x[[0, 1, 3]].mean(0))
    same = torch.ones(1, 4, 2)
    assert torch.equal(k_means(same, 2, 2), torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits must be"),
        ({"centroids": 257}, "centroids must be 1 .. 256"),
        ({"centroids": 64, "span": 32}, "at least as many tokens as centroids"),
        ({"iterations": -1}, "iterations must not be negative"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Video(**settings)
    with pytest.raises(ValueError, match="blocks of 48 channels must divide"):
        Video(block=48).body(PLACE)
