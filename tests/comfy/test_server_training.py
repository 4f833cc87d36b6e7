"""Tokenizers trained and repaired through a ComfyUI server, as the page does it."""

from __future__ import annotations

import threading
import time
import urllib.request

import host
import prompts
import pytest


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    import tiny_models

    out = tmp_path_factory.mktemp("comfy")
    models = tmp_path_factory.mktemp("models")
    tiny_models.write_tokenizer(models)
    comfy = request.config.getoption("--comfy").resolve()
    with host.serve(comfy, models, out) as running:
        running.models = models
        yield running


def training(**changed):
    """A picture, a tokenizer trained on it for a few steps, and the preview kept."""
    settings = {"steps": 3, "batch": 2, "crop": 16, "learning_rate": 1e-3, "seed": 0}
    settings |= {"name": "own", "resume": True, "images": ["1", 0], "folder": ""}
    kinds = {"quantizer": "vector", "codes": 16, "dim": 4, "groups": 2, "depth": 1}
    return {
        "1": prompts.node("EmptyImage", width=40, height=24, batch_size=2, color=0x4080C0),
        "2": prompts.node("SageDiffusionTrainVQTokenizer", **(kinds | settings | changed)),
        "3": prompts.node("SageDiffusionVQEncode", tokenizer=["2", 0], image=["1", 0]),
        "4": prompts.node("SaveImage", images=["2", 1], filename_prefix="preview"),
        "5": prompts.node("PreviewAny", source=["3", 1]),
    }


def failure(history):
    """Message of the node that failed."""
    return dict(history["status"]["messages"])["execution_error"]["exception_message"]


def test_a_tokenizer_is_trained_shown_and_kept(server):
    done = server.run(training())
    assert done["status"]["status_str"] == "success", done["status"]
    assert server.last_text("2").startswith("own_00001.safetensors: ")
    assert "8 bits a token" in server.last_text("2")
    assert server.last_text("3").startswith("2 x 5 x 3 tokens")
    assert (server.models / "vq_tokenizers" / "own_00001.safetensors").is_file()
    picture = done["outputs"]["4"]["images"][0]["filename"]
    assert (server.out / "output" / picture).read_bytes()[:4] == b"\x89PNG"
    again = server.run(training(seed=1))
    assert again["status"]["status_str"] == "success"
    assert server.last_text("2").startswith("own_00002.safetensors: ")


def test_cancel_keeps_a_checkpoint_that_the_next_run_goes_on_from(server):
    kept = server.out / "output" / "sage_tokenizers" / "long.checkpoint.safetensors"
    changed = {"name": "long", "steps": 400, "folder": ""}

    def cancel():
        while not any(at == "2" and "step" in text for at, text in server.texts):
            time.sleep(0.05)
        with urllib.request.urlopen(f"{server.url}/interrupt", b"{}", timeout=30):
            pass

    server.texts.clear()
    watcher = threading.Thread(target=cancel, daemon=True)
    watcher.start()
    stopped = server.run(training(**changed))
    watcher.join(10)
    kinds = [kind for kind, _ in stopped["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert kept.is_file()
    assert not list((server.models / "vq_tokenizers").glob("long*"))
    assert "is a checkpoint of other settings" in failure(
        server.run(training(**changed | {"seed": 5}))
    )
    done = server.run(training(**changed | {"steps": 3, "resume": False}))
    assert done["status"]["status_str"] == "success", done["status"]
    assert not kept.exists()
    assert server.last_text("2").startswith("long_00001.safetensors: ")


def repairing(**changed):
    """The tiny tokenizer with new codes."""
    prompt = training()
    prompt = {"1": prompt["1"]}
    settings = {"steps": 2, "batch": 1, "crop": 16, "learning_rate": 1e-3, "seed": 0}
    settings |= {"name": "repaired", "resume": True, "images": ["1", 0]}
    settings |= {"tokenizer": ["6", 0], "method": "simvq", "parts": "decoder"}
    prompt["6"] = prompts.node("SageDiffusionLoadVQTokenizer", tokenizer="tiny.safetensors")
    prompt["2"] = prompts.node("SageDiffusionCodebookRepair", **(settings | changed))
    return prompt


def test_a_codebook_is_repaired_into_a_new_file(server):
    source = server.models / "vq_tokenizers" / "tiny.safetensors"
    before = source.read_bytes()
    done = server.run(repairing())
    assert done["status"]["status_str"] == "success", done["status"]
    lines = server.last_text("2").splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["before", "new codes", "trained"]
    assert lines[-1] == "repaired_00001.safetensors"
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"images": None}, "give it images, or a folder of pictures"),
        ({"folder": "../elsewhere"}, "folder must be one below the input folder"),
        ({"crop": 20}, "crop must be a multiple of 8, got 20"),
        ({"crop": 32}, "sides of 32 or more"),
        ({"name": "../../own"}, "must stay inside the folder vq_tokenizers"),
        ({"quantizer": "fsq", "codes": 100}, "must be a power of two"),
    ],
)
def test_what_does_not_fit_is_said(server, changed, says):
    prompt = training(**changed)
    if changed.get("images", 0) is None:
        del prompt["2"]["inputs"]["images"]
    assert says in failure(server.run(prompt))


def test_a_model_without_quantizer_is_said(server):
    prompt = {
        "1": prompts.node("EmptyImage", width=16, height=16, batch_size=1, color=0),
        "2": prompts.node("SageDiffusionVQSearch", model=["1", 0], measure=True),
        "3": prompts.node("PreviewAny", source=["2", 1]),
    }
    assert "the model must hold a quantizer of VectorQuantizer" in failure(server.run(prompt))
    prompt["1"] = prompts.node("SageDiffusionLoadVQTokenizer", tokenizer="tiny.safetensors")
    assert server.run(prompt)["status"]["status_str"] == "success"
    assert server.last_text("2") == "searches already: every tokenizer of this pack does"
