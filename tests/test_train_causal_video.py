"""``tools/train_causal_video.py``: teacher forcing is what a cache computes, and it trains."""

import pytest
import torch
from from_file import from_file

pytest.importorskip("diffusers")

from sage_diffusion.integrations.diffusers.causal_video import CausalVideo
from sage_diffusion.integrations.diffusers.kv import cached
from sage_diffusion.kv.bouncing import render, sample_clips

tool = from_file("tools/train_causal_video.py")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = tool.build_model(layers=2, heads=1)
    for parameter in model.parameters():  # what begins as zero says nothing
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def test_teacher_forcing_is_what_the_cache_computes(model):
    latents = tool.to_latents(render(sample_clips(2, 0), 5))
    noisy = torch.randn(2, 2, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([[0.7, 0.2], [0.4, 0.9]])
    kept = [(block.attn1.processor, block.attn2.processor) for block in model.blocks]
    found = tool.forward(model, latents[:, :4], [0, 1, 2, 3], noisy, [2, 4], times)
    for block, (own, cross) in zip(model.blocks, kept, strict=True):
        block.attn1.processor, block.attn2.processor = own, cross
    text = torch.zeros(2, 1, 16)
    for index, frame in enumerate((2, 4)):
        cache = CausalVideo(model).cache()
        with cached(model, cache) as run:
            for past in range(frame):
                run(latents[:, past, :, None], torch.zeros(2), text, frame_offset=past)
            want = run(noisy[:, index, :, None], times[:, index] * 1000, text, frame_offset=frame)
        torch.testing.assert_close(found[:, index], want[:, :, 0], atol=1e-4, rtol=1e-4)


def test_it_trains_writes_checkpoints_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "build_model", lambda build=tool.build_model: build(1, 1))
    monkeypatch.setattr(tool, "CHECKPOINT_STEPS", 2)
    options = ["--out", str(tmp_path), "--batch", "2", "--clean", "12", "--noisy", "8"]
    tool.main([*options, "--minutes", "0.05", "--width", "8", "--no-compile"])
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert first["step"] >= 2
    tool.main([*options, "--minutes", "0.1", "--width", "8", "--no-compile", "--resume"])
    again = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert again["step"] > first["step"] and again["seconds"] > first["seconds"]
    losses = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "done" in line]
    assert len(losses) == 2 and float(losses[1]) < float(losses[0])
    saved = CausalVideo.bundled(tmp_path, torch.float32).transformer
    average = again["average"]["blocks.0.ffn.net.2.weight"]
    assert torch.isfinite(saved.blocks[0].ffn.net[2].weight).all() and average.abs().max() > 0


def test_frames_of_a_step_read_the_past_and_draw_what_shows_the_digit():
    past, noisy = tool.frames_of_a_step(16, 16, torch.Generator().manual_seed(0))
    assert past == sorted(set(past)) and past[:10] == list(range(10)) and len(past) == 16
    assert len(noisy) == 16 and max(past) < 31 and sum(frame >= 25 for frame in noisy) >= 10


def test_schedule_rises_stays_and_falls():
    rates = [tool.schedule(step, step / 1000) for step in range(1000)]
    assert rates[0] == 0.02 and rates[300] == 1 and rates[-1] < 0.02
