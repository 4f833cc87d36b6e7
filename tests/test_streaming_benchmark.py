"""``benchmarks.streaming``: statistics of earlier steps in place of a call's own."""

import torch
from from_file import from_file
from tiny_emoji import tiny_emoji

from sage_diffusion.accuracy.compare import end_to_end
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

streaming = from_file("benchmarks/streaming.py")


def test_estimates_remember_what_they_say():
    seen = [torch.tensor(float(x)) for x in (4, 8, 2)]
    expected = {
        "now": [4, 8, 2],
        "before": [4, 4, 8],
        "running": [4, 4, 6],
        "first": [4, 4, 4],
        "none": [0, 0, 0],
    }
    for source, values in expected.items():
        estimate = streaming.Estimate(source)
        assert [float(estimate.see(x)) for x in seen] == values


def test_the_calls_own_statistics_are_the_spec():
    sampler = PipelineSampler(tiny_emoji(), {"num_inference_steps": 3})
    exact = sampler.generate(AttentionSession("fp16"), [0, 1], 5)
    plain = sampler.generate(AttentionSession("int4/fp8-fast"), [0, 1], 5)
    runs = [([0, 1], 5, exact)]
    found = streaming.quality(sampler, "int4/fp8-fast", ("now", "now"), runs)
    mean = sum(end_to_end(plain, exact).psnr) / 2
    assert abs(found["mean"] - mean) < 0.5
    clamped = streaming.quality(sampler, "int4/fp8-fast", ("now", "first"), runs)
    assert clamped["mean"] < found["mean"]


def test_every_spec_and_source_has_a_row():
    sampler = PipelineSampler(tiny_emoji(), {"num_inference_steps": 2})
    found = streaming.measure(2, 1, sampler)
    assert set(found) == set(streaming.SPECS)
    assert all(set(rows) == set(streaming.SOURCES) for rows in found.values())
    assert all(psnr["pooled"] > 20 for rows in found.values() for psnr in rows.values())
