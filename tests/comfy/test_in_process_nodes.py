"""Nodes that sample, inside ComfyUI without a server: progress, previews, cancelling, verdicts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from server import PromptServer


class Page:
    """What a server would send to the page that queued the prompt."""

    client_id = "page"

    def __init__(self):
        self.texts, self.states, self.bars = [], [], []
        self.prompt_queue = SimpleNamespace(currently_running={})

    def send_sync(self, event, data, sid):
        assert (event, sid) == ("sage_diffusion.text", "page")
        self.texts.append(data["text"])
        self.states.append(data["state"])

    def hook(self, value, total, preview, node_id=None):
        self.bars.append((value, total, preview))
        if self.cancel_at == value:
            from comfy.model_management import InterruptProcessingException

            raise InterruptProcessingException()

    cancel_at = None


@pytest.fixture
def page(monkeypatch):
    """The page that queued the prompt; previews are on."""
    import comfy.utils
    import latent_preview
    from comfy.cli_args import args

    page = Page()
    monkeypatch.setattr(PromptServer, "instance", page, raising=False)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", page.hook)
    monkeypatch.setattr(args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    return page


def accuracy(families, tmp_path, monkeypatch, **more):
    import folder_paths

    from sage_diffusion.integrations.comfy import patch
    from sage_diffusion.nodes.accuracy import SageAccuracyCheck

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    hidden = SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)
    monkeypatch.setattr(SageAccuracyCheck, "hidden", hidden, raising=False)
    sd3 = families("sd3")
    given = {
        "model": patch(sd3.model, "int8/fp16"),
        "positive": sd3.positive,
        "negative": sd3.negative,
        "latent_image": {"samples": sd3.latent},
        "seed": 1,
        "steps": 5,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "mode": "with and without the plan",
        "rate": 1.0,
        "metric": "cosine",
        "limit": 0.9,
        "filename_prefix": "checks/a",
        "rows": 8,
    }
    return SageAccuracyCheck.execute(**(given | more)).args


def test_the_check_shows_a_bar_previews_and_the_time_left(families, page, tmp_path, monkeypatch):
    out = accuracy(families, tmp_path, monkeypatch)
    values = [value for value, total, _ in page.bars if total == 10]
    assert values == list(range(1, 11))  # both runs in one bar
    assert all(preview is not None for _, total, preview in page.bars if total == 10)
    assert "sampling" in page.states
    told = "\n".join(page.texts)
    assert "without the plan: step 1 of 5, run 1 of 2" in told
    assert " s left" in told
    assert page.states[-1] == "done"
    assert page.texts[-1].startswith("PASSED: cosine 0.9\n20 of 20 quantized calls compared")
    assert out[5] is True


def test_cancelling_keeps_what_was_compared(families, page, tmp_path, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    page.cancel_at = 8  # the third step of the run with the plan
    with pytest.raises(InterruptProcessingException):
        accuracy(families, tmp_path, monkeypatch)
    assert page.states[-1] == "cancelled"
    assert page.texts[-1].startswith("cancelled: 12 calls were compared\nkept in ")
    report = json.loads((tmp_path / "checks" / "a_00001.json").read_text())
    assert len(report["rows"]) == 12


def test_too_little_proves_nothing(families, page, tmp_path, monkeypatch):
    out = accuracy(families, tmp_path, monkeypatch, rate=0.01)
    assert page.texts[-1].startswith("NOT PROVEN: cosine 0.9\n")
    assert page.states[-1] == "warning"
    assert out[5] is False


def test_limits_are_checked_before_anything_runs():
    from sage_diffusion.nodes.accuracy import SageAccuracyCheck

    told = SageAccuracyCheck.validate_inputs("with and without the plan", "ssim", 2.0)
    assert told == "a limit of ssim must be -1 .. 1, got 2"
    assert SageAccuracyCheck.validate_inputs("with and without the plan", "psnr", 30.0) is True


def test_cancelling_a_calibration_keeps_its_table(families, page, tmp_path, monkeypatch):
    import folder_paths
    from comfy.model_management import InterruptProcessingException

    from sage_diffusion.nodes.calibrate import SageCalibrate

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    hidden = SimpleNamespace(unique_id="7")
    monkeypatch.setattr(SageCalibrate, "hidden", hidden, raising=False)
    sd3 = families("sd3")
    given = {
        "model": sd3.model,
        "positive": sd3.positive,
        "positive_2": sd3.negative,
        "negative": sd3.negative,
        "latent_image": {"samples": sd3.latent},
        "seed": 1,
        "steps": 3,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "runs": 1,
        "share": 0.5,
        "goal": {"goal": "most time", "time": 0.6},
        "card": "rtx4090",
        "name": "tiny",
    }
    page.cancel_at = 5  # within the second run
    with pytest.raises(InterruptProcessingException):
        SageCalibrate.execute(**given)
    assert any(preview is not None for _, _, preview in page.bars)
    kept = tmp_path / "sage_calibrations" / "tiny.json"
    assert kept.exists()
    page.cancel_at = None
    page.bars.clear()
    SageCalibrate.execute(**given)
    assert page.bars[0][0] > 3  # it goes on after the first run
