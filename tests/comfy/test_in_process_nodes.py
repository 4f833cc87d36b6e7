"""Nodes that sample, inside ComfyUI without a server: progress, previews, cancelling, verdicts."""

from __future__ import annotations

import json
from pathlib import Path
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
    done = SageAccuracyCheck.execute(**(given | more))
    accuracy.shown = done.ui
    return done.args


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
    assert "with exact attention, guidance's halves apart" in page.texts[-1]
    assert out[5] is True


def test_the_check_gives_both_pictures_to_the_page(families, page, tmp_path, monkeypatch):
    vae = SimpleNamespace(decode=lambda latent: latent[:, :3].movedim(1, -1).sigmoid())
    accuracy(families, tmp_path, monkeypatch, vae=vae, steps=2)
    pairs = [accuracy.shown[name] for name in ("a_images", "b_images")]
    assert all((tmp_path / one["filename"]).exists() for (one,) in pairs)
    accuracy(families, tmp_path, monkeypatch, steps=2)
    assert len(accuracy.shown["images"]) == 1  # the heat map alone


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


def test_a_video_with_sound_is_compared_whole_and_its_video_shown(monkeypatch):
    """As LTX-2 and MiniMax H3 sample: two tensors in one latent."""
    import comfy.sample
    import torch
    from comfy.nested_tensor import NestedTensor

    from sage_diffusion.integrations.comfy.accuracy import KSampling, one_tensor

    video, sound = torch.ones(1, 4, 2, 3, 3), torch.zeros(1, 8, 2, 5)
    both = NestedTensor([video, sound])

    def sampled(*args, callback, **kwargs):
        callback(0, both, both, 1)
        return both

    monkeypatch.setattr(comfy.sample, "sample", sampled)
    seen, decoded = [], []
    vae = SimpleNamespace(decode=lambda latent: decoded.append(latent) or torch.zeros(1, 8, 8, 3))
    run = KSampling([], [], {"samples": both}, 1, 1, 1.0, "euler", "simple", vae=vae)
    run.on_step = lambda step, latent, steps: seen.append(latent)
    (latent,) = run(None).latents
    assert latent.shape == (1, video.numel() + sound.numel())
    assert torch.equal(latent, one_tensor(run.result()["samples"]))
    assert seen[0] is video and decoded[0] is video


def test_names_are_checked_before_anything_runs(families, page, tmp_path, monkeypatch):
    from sage_diffusion.nodes import vq_train

    outside = "must stay inside the folder"
    with pytest.raises(ValueError, match=outside):
        accuracy(families, tmp_path, monkeypatch, filename_prefix="../outside")
    assert not page.bars and not page.texts
    monkeypatch.setattr("folder_paths.get_folder_paths", lambda kind: [str(tmp_path)])
    monkeypatch.setattr(vq_train, "_pictures", None)
    with pytest.raises(ValueError, match=outside):
        vq_train.TrainVQTokenizer.execute("vq", 16, 4, 1, 1, name="../outside")


def test_an_edit_that_cannot_be_says_what_is_wrong():
    from sage_diffusion.nodes.plan import SageEditPlan

    rule = {"spec": "fp16", "start_percent": 0.0, "end_percent": 1.0, "branch": "both"}
    for change, said in (
        ({"change": "write JSON", "json": "{"}, "json: is not JSON"),
        ({"change": "add a rule", "layers": "a, b", **rule}, "one glob, got 'a, b'"),
    ):
        with pytest.raises(ValueError, match=said):
            SageEditPlan.execute(change)


def test_limits_are_checked_before_anything_runs():
    from sage_diffusion.nodes.accuracy import SageAccuracyCheck

    told = SageAccuracyCheck.validate_inputs("with and without the plan", "ssim", 2.0)
    assert told == "a limit of ssim must be -1 .. 1, got 2"
    assert SageAccuracyCheck.validate_inputs("with and without the plan", "psnr", 30.0) is True


def measuring(families):
    """Inputs that both nodes have which measure a model."""
    sd3 = families("sd3")
    return {
        "model": sd3.model,
        "positive": sd3.positive,
        "negative": sd3.negative,
        "latent_image": {"samples": sd3.latent},
        "seed": 1,
        "steps": 3,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        "share": 0.5,
        "goal": {"goal": "as fast as fast, better"},
    }


def calibrate(families, tmp_path, monkeypatch, **more):
    import folder_paths

    from sage_diffusion.nodes.calibrate import SageCalibrate

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    hidden = SimpleNamespace(unique_id="7")
    monkeypatch.setattr(SageCalibrate, "hidden", hidden, raising=False)
    given = measuring(families) | {"runs": 1, "card": "this card", "name": "tiny"}
    return SageCalibrate.execute(**(given | more)).args


def test_cancelling_a_calibration_keeps_its_table(families, page, tmp_path, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    page.cancel_at = 5  # within the second run
    with pytest.raises(InterruptProcessingException):
        calibrate(families, tmp_path, monkeypatch)
    assert any(preview is not None for _, _, preview in page.bars)
    assert (tmp_path / "sage_calibrations" / "tiny.json").exists()
    page.cancel_at = None
    page.bars.clear()
    plan, text = calibrate(families, tmp_path, monkeypatch)
    assert page.bars[0][0] > 3  # it goes on after the first run
    assert plan.calibration["predicted"]["time"] <= 0.214  # of fast, at this head dim
    assert "predicted bound on rtx4090" in text and "nothing is known of cpu" in text
    assert "measured on one prompt" in text and "fp16 everywhere" not in text  # with two seeds
    goal = {"goal": "least quality", "decibel": 100.0}
    plan, text = calibrate(families, tmp_path, monkeypatch, goal=goal)
    assert not plan.default.quantized and "fp16 everywhere: nothing faster" in text


def test_a_name_that_exists_is_never_silently_another_calibration(
    families, page, tmp_path, monkeypatch
):
    from comfy.model_management import InterruptProcessingException

    folder = tmp_path / "sage_calibrations"
    calibrate(families, tmp_path, monkeypatch)
    first = (folder / "tiny.json").read_bytes()
    with pytest.raises(ValueError, match="choose 'replace it' or 'take a new name'"):
        calibrate(families, tmp_path, monkeypatch, steps=2)
    assert (folder / "tiny.json").read_bytes() == first
    calibrate(families, tmp_path, monkeypatch, steps=2, if_name_exists="take a new name")
    assert json.loads((folder / "tiny 2.json").read_text())["steps"] == 2
    assert (folder / "tiny.json").read_bytes() == first
    page.cancel_at = 3
    new = {"steps": 2, "if_name_exists": "take a new name"}
    with pytest.raises(InterruptProcessingException):
        calibrate(families, tmp_path, monkeypatch, **new)
    assert "take the name 'tiny 3' and 'continue it' to go on" in page.texts[-1]
    page.cancel_at = None
    calibrate(families, tmp_path, monkeypatch, steps=2, if_name_exists="replace it")
    assert json.loads((folder / "tiny.json").read_text())["steps"] == 2


def test_an_ending_that_was_typed_is_not_appended_again(tmp_path, monkeypatch):
    import folder_paths

    from sage_diffusion.nodes import calibrate, host, vq_train

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    kept = vq_train._checkpoint({"name": "own.safetensors", "resume": True})
    paths = (
        host.report_path("checks/a.json", "json"),
        host.report_path("a.v2", "json"),
        host.new_tokenizer_path("own.safetensors"),
        calibrate._table_path("plan.json", "continue it"),
        kept,
    )
    assert [path.name for path in paths] == [
        "a_00001.json",
        "a.v2_00001.json",
        "own_00001.safetensors",
        "plan.json",
        "own.checkpoint.safetensors",
    ]


def test_where_memory_is_short_the_node_says_what_is_needed(families, page, tmp_path, monkeypatch):
    from sage_diffusion.adapt.sampling import NoGradient
    from sage_diffusion.integrations.comfy import gradients

    monkeypatch.setattr(gradients, "_PART", 1e-9)
    needs = r"the graph of one step needs about 0\.\d GiB, \d+\.\d GiB of cpu are free"
    with pytest.raises(NoGradient, match=needs):
        calibrate(families, tmp_path / "a", monkeypatch, end_to_end=1, method="gradients")
    plan, text = calibrate(families, tmp_path / "b", monkeypatch, end_to_end=1)
    assert "groups, 1 picture; no gradients: the graph of one step needs about" in text
    assert "0.0 GiB" in plan.calibration["stage"]


def test_the_way_back_is_shown_and_can_be_cancelled(families, page, tmp_path, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    page.cancel_at = 6 + 5  # of the second picture the second step on the way back
    with pytest.raises(InterruptProcessingException):
        calibrate(families, tmp_path, monkeypatch, end_to_end=2, method="gradients")
    assert "sensitivity had 1 of 2 runs\nthey are kept" in page.texts[-1]
    assert all(preview is not None for _, _, preview in page.bars)
    assert page.bars[-1][:2] == (11, 12)
    page.cancel_at = None
    page.bars.clear()
    _, text = calibrate(families, tmp_path, monkeypatch, end_to_end=2, method="gradients")
    assert page.bars[0][:2] == (7, 12)  # it goes on after the first picture
    assert "the end-to-end stage (gradients, 2 pictures)" in text


def autotune(families, tmp_path, monkeypatch, **more):
    """An instance whose folders are ``tmp_path``; returns the node's output, and the workflow."""
    import folder_paths

    from sage_diffusion.nodes import autotune

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(autotune, "user_plan_folder", lambda: tmp_path / "plans")
    prompt = {"7": {"inputs": {"embedded_plan": ""}}}
    info = {"workflow": {"nodes": [{"id": 7, "widgets_values": [3, ""]}]}}
    hidden = SimpleNamespace(unique_id="7", prompt=prompt, extra_pnginfo=info)
    monkeypatch.setattr(autotune.SageAutoTune, "hidden", hidden, raising=False)
    given = measuring(families) | {"card": "rtx4090", "measure_anew": False}
    return autotune.SageAutoTune.execute(**(given | more)), info["workflow"]["nodes"][0]


def test_auto_tune_measures_once_and_a_second_instance_runs_the_same(
    families, page, tmp_path, monkeypatch
):
    from comfy.model_management import InterruptProcessingException

    from sage_diffusion.integrations.comfy import attached
    from sage_diffusion.plan.embed import content_hash

    def again(folder, **more):
        page.bars.clear()
        page.texts.clear()
        return autotune(families, tmp_path / folder, monkeypatch, **more)

    page.cancel_at = 5
    with pytest.raises(InterruptProcessingException):
        again("here")
    assert page.states[-1] == "cancelled"
    assert "measure had 1 of 2 runs\nthey are kept" in page.texts[-1]
    page.cancel_at = None
    first, node = again("here")
    assert page.bars[0][0] > 3  # it goes on after the first run
    assert all(preview is not None for _, _, preview in page.bars)
    model, plan, text = first.args
    assert "measured now" in text and "predicted bound on rtx4090: 0.2" in text
    (carried,) = first.ui["embedded_plan"]
    assert node["widgets_values"] == [3, carried]
    mine = families("sd3").sample(model)
    ran = attached(model).last.summary.shares
    assert page.states[-1] == "done"

    cached, _ = again("here", seed=5, positive=families("sd3").negative)
    assert not page.bars and "measured before" in cached.args[2]
    assert content_hash(cached.args[1]) == content_hash(plan)
    again("here", steps=2)
    assert page.bars  # other settings: measured

    away, node = again("away", card="rtx3090", embedded_plan=carried)
    assert not page.bars and "plan of this workflow" in away.args[2]
    assert not (tmp_path / "away").exists()  # nothing is measured, nothing written
    assert node["widgets_values"][-1] == carried
    import torch

    assert torch.equal(families("sd3").sample(away.args[0]), mine)
    assert attached(away.args[0]).last.summary.shares == ran
    page.cancel_at = 5
    with pytest.raises(InterruptProcessingException):
        again("here", measure_anew=True)
    assert page.bars[0][0] == 1  # from the beginning
    page.cancel_at = None
    again("here", measure_anew=True)
    assert page.bars[0][0] > 3  # it goes on after the first run
    for path in (tmp_path / "here" / "plans").rglob("*.json"):
        path.write_text("mine")
    with pytest.raises(ValueError, match="is not JSON"):
        again("here", measure_anew=True)
    assert not page.bars  # said before anything is measured


def test_every_language_names_every_node_and_input():
    from sage_diffusion.nodes import host
    from sage_diffusion.nodes.extension import NODES
    from sage_diffusion.nodes.kv_calibration import register_calibration_folder

    host.register_plan_folder()
    host.register_tokenizer_folder()
    register_calibration_folder()

    def inputs_of(definition):
        for group in ("required", "optional"):
            for name, (kind, *rest) in definition.get(group, {}).items():
                options = rest[0] if rest else {}
                yield name, options
                if kind == "COMFY_DYNAMICCOMBO_V3":
                    for option in options["options"]:
                        yield from inputs_of(option["inputs"])

    root = Path(__file__).resolve().parent.parent.parent
    for language in ("en", "zh", "ja", "de", "fr", "es"):
        known = json.loads((root / "locales" / language / "nodeDefs.json").read_text())
        for node in NODES:
            info = node.GET_NODE_INFO_V1()
            entry = known[info["name"]]
            assert entry["display_name"] and entry["description"]
            for name, options in inputs_of(info["input"]):
                text = entry["inputs"][name]
                assert text["name"] and text["tooltip"], (language, info["name"], name)
                if language == "en" and name != "spec":  # two inputs may share a name
                    assert text["tooltip"] == options["tooltip"]
            if language == "en":
                assert entry["description"] == info["description"]
                assert entry["display_name"] == info["display_name"]
