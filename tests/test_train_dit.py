"""``tools/train_dit.py``: its data sets, and a few steps of training."""

import numpy as np
import pytest
import torch
from from_file import from_file

from sage_diffusion.integrations.diffusers.pipelines import load_pipeline

train_dit = from_file("tools/train_dit.py")


def test_crops_are_windows_of_their_pictures(monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(train_dit, "CROPS_EACH", 3)
    found = train_dit.crops(None)
    assert found.pixels.shape == (2 * 3 * len(found.names), 3, 24, 24)
    assert found.pixels.min() >= -1 and found.pixels.max() <= 1
    half = len(found.pixels) // 2
    assert torch.equal(found.pixels[half:], found.pixels[:half].flip(-1))
    assert torch.bincount(found.labels).tolist() == [6] * len(found.names)
    import skimage.data

    for name in ("brick", "rocket"):  # the crops of a dark picture are darker
        mean = getattr(skimage.data, name)().mean() / 127.5 - 1
        crops = found.pixels[found.labels == found.names.index(name)]
        assert crops.mean().item() == pytest.approx(mean, abs=0.3)


def test_training_lowers_the_loss_and_saves_a_pipeline(tmp_path, monkeypatch, capsys):
    labels = torch.arange(64) % 2
    pixels = (labels * 2.0 - 1)[:, None, None, None].expand(64, 1, 8, 8).contiguous()
    pictures = train_dit.Pictures(pixels, labels, ["black", "white"])
    recipe = train_dit.Recipe(lambda data: pictures, layers=1, heads=1, minutes=0.05)
    monkeypatch.setattr(train_dit, "RECIPES", {"two": recipe})
    train_dit.main(["two", "--out", str(tmp_path), "--batch", "16", "--lr", "0.003"])
    assert "64 pictures, 2 classes" in capsys.readouterr().out
    pipe = load_pipeline(str(tmp_path))
    assert pipe.classes == ["black", "white"] and pipe.transformer.dtype == torch.float32
    black, white = pipe(["black", "white"], 8, seed=0, output_type="np").images.mean((1, 2, 3))
    assert np.isfinite(black) and black < white


def test_learning_rate_rises_stays_and_falls():
    rates = [train_dit.learning_rate(step, step / 1000, 1.0) for step in range(1000)]
    assert rates[0] == 0.005 and rates[300] == 1 and rates[-1] < 0.02
