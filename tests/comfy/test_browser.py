"""The real page in headless Chromium: a template, a drag, a run, the report, help, search.

Screenshots stay in `out/comfy`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import host
import prompts
import pytest
import tiny_models
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
SHOTS = ROOT / "out" / "comfy"
PLAYWRIGHT = ROOT / ".cache" / "browser" / "node_modules"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

#: The model file that this server has.
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"

#: What ComfyUI's own page logs in a fresh installation without its gallery and its first model.
HOSTS_OWN = re.compile(
    r"^Failed to load resource: .*404|^Error loading (fuse options|core workflow templates)"
    r"|^ComfyApp graph accessed before initialization"
    r"|^(Connecting to '|Fetch API cannot load )https://huggingface.co/"
)


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    """One server for every page."""
    if CHROMIUM is None or not (PLAYWRIGHT / "playwright-core").is_dir():
        pytest.skip("needs Chromium and playwright-core: tests/comfy/setup_browser.sh")
    models = request.config.getoption("--models")
    tiny_models.write_checkpoint(models)
    for family in ("sd3", "taesd"):
        tiny_models.write(models, family)
    SHOTS.mkdir(parents=True, exist_ok=True)
    comfy = request.config.getoption("--comfy").resolve()
    folder = tmp_path_factory.mktemp("page")
    (folder / "input").mkdir()
    own_input = "--input-directory", str(folder / "input")
    with host.serve(comfy, models, folder, *own_input) as running:
        yield running


def drive(server, script, told, *given):
    """What a page did, as its script tells it in a file."""
    done = subprocess.run(
        ["node", str(Path(__file__).with_name(script)), server.url, str(SHOTS), *given],
        env={**os.environ, "NODE_PATH": str(PLAYWRIGHT), "CHROMIUM": CHROMIUM},
        timeout=900,
        capture_output=True,
        text=True,
    )
    result = json.loads((SHOTS / told).read_text())
    assert done.returncode == 0, result.get("failure", "") + done.stderr
    return result


@pytest.fixture(scope="module")
def visit(server):
    """A new user's first visit."""
    return drive(server, "browser.js", "result.json")


@pytest.fixture(scope="module")
def states(server, request):
    """What Sage Attention said in each of its states."""
    kept = request.config.getoption("--models") / "sage_plans" / "auto"
    shutil.rmtree(kept, ignore_errors=True)  # Auto-tune measures
    sampling = prompts.sampling("sd3", **prompts.custom("int8/fp16"))
    check = prompts.check("sd3", **prompts.custom("int8/fp16"))
    planned = prompts.sampling("sd3", **{"preset": "plan file", "preset.file": "int8 everywhere"})
    tuned = prompts.autotune("sd3")
    told = {"sampling": sampling, "check": check, "planned": planned, "tuned": tuned}
    told["calibrated"] = prompts.calibrated("sd3")
    (SHOTS / "prompts.json").write_text(json.dumps(told))
    return drive(server, "states.js", "states.json")


def test_templates_are_offered(visit):
    assert "First try - SD 1.5" in visit["templates"]
    assert len(visit["templates"]) == len(list((ROOT / "workflows").glob("*.json")))


def test_the_node_follows_the_mouse(visit):
    (x, y), (new_x, new_y) = visit["dragged"]
    assert new_y < y - 20
    assert new_x != x


def test_the_template_runs_and_shows_picture_and_report(visit):
    assert visit["shown"]["SaveImage image"] == 128
    for node in ("SageDiffusionAttention", "SageDiffusionReport"):
        shown = visit["shown"][node]
        assert shown.startswith("int8/fp16: 6 of 42 attention calls\n")
        assert "\n0 declined;" in shown
    assert visit["visible"]


def test_every_template_is_a_prompt_that_lacks_its_models_at_most(server, visit):
    for name, prompt in visit["prompts"].items():
        given = [v for n in prompt.values() for v in n["inputs"].values()]
        files = [v for v in given if str(v).endswith(".safetensors") and v != CHECKPOINT]
        if not files:  # it would run
            continue
        answer = server.post("/prompt", {"prompt": prompt})
        kinds = {
            (error["type"], error["extra_info"]["received_value"] in files)
            for node in answer["node_errors"].values()
            for error in node["errors"]
        }
        assert kinds == {("value_not_in_list", True)}, (name, answer["node_errors"])
    assert sum(" - " in name for name in visit["prompts"]) >= 15


def test_help_opens(visit):
    assert visit["help"]


def test_search_by_alias_adds_the_node(visit):
    assert visit["added"] == 1


def test_nothing_went_wrong_on_the_page(visit):
    assert visit["errors"] == []
    assert visit["blocked"] == []
    assert [line for line in visit["console"] if not HOSTS_OWN.match(line)] == []
    missing = [line for line in visit["console"] if "sage_diffusion" in line]
    assert all(line.endswith("/en.md") for line in missing)  # asked first, then the page itself


@pytest.mark.parametrize("name", ["templates", "run", "help", "search"])
def test_screenshots_are_kept(visit, name):
    picture = SHOTS / f"{name}.png"
    assert picture.stat().st_size > 20_000


# ---------------------------------------------------------------------- every state, 1280 x 800
#: name -> (how the run ended, state, words of the first line, words of the second)
STATES = {
    "done": ("execution_success", "done", "int8/fp16: 6 of 6 attention calls", ""),
    "too_few_tokens": (
        "execution_success",
        "nothing",
        "NOT QUANTIZED: min_tokens is 4096, and the longest call has 170 keys",
        "Remedy: lower min_tokens, or sample a larger picture",
    ),
    "backend_refuses": (
        "execution_success",
        "nothing",
        "NOT QUANTIZED: needs a CUDA or ROCm device, the tensors are on cpu (int8/fp16 on triton)",
        "Remedy: ",
    ),
    "failed": ("execution_error", "failed", "sampling failed", "AttentionRefused: double.00"),
    "off": ("execution_success", "off", "off: the model is passed through", ""),
    "bypassed": ("execution_success", "off", "bypassed: it did nothing in this run", ""),
    "sampling": (None, "sampling", "sampling: int8/fp16", ""),
    "cancelled": ("execution_interrupted", "cancelled", "cancelled while sampling", ""),
    "elsewhere": ("execution_success", "elsewhere", "sampled by Attention Accuracy Check", ""),
}


@pytest.mark.parametrize("name", STATES)
def test_every_state_has_its_own_two_lines(states, name):
    end, state, first, second = STATES[name]
    found = states["states"][name]
    node = found["node"]
    assert found["end"] == end
    assert node["state"] == state
    lines = node["text"].split("\n")
    assert lines[0].startswith(first)
    assert second in "\n".join(lines[1:])
    assert node["red"] == (state == "nothing")
    assert (node["colour"] == "rgb(255, 85, 85)") == (state in ("nothing", "failed"))
    assert node["fits"]
    assert node["whole"], "the headline is cut off at the node's default size"
    assert not node["old"]


def test_the_report_has_a_state_of_its_own_too(states):
    found = {name: state["report"] for name, state in states["states"].items()}
    assert found["done"]["state"] == "done"
    assert found["off"]["state"] == "off"
    assert found["bypassed"]["state"] == "nothing"
    assert "did not go through Sage Attention" in found["bypassed"]["text"]
    assert found["cancelled"]["old"]  # it did not run: what stands there is of the run before
    assert found["cancelled"]["text"].startswith("of an earlier run")


def test_texts_keep_to_their_workflow(states):
    assert states["states"]["other_workflow"]["node"] is None
    assert states["states"]["back_again"]["node"]["state"] == "done"
    assert "600 of 600" in states["states"]["back_again"]["node"]["text"]


def test_the_plan_of_a_file_travels_in_workflow_and_prompt(states):
    from sage_diffusion.plan import PrecisionPlan
    from sage_diffusion.plan.embed import embed_plan
    from sage_diffusion.plan.library import OWN_PLANS

    name = "int8 everywhere"
    text = embed_plan(PrecisionPlan.load(OWN_PLANS / f"{name}.json"), name)
    (node,) = (n for n in json.loads(states["saved"])["nodes"] if "Attention" in n["type"])
    assert text in node["widgets_values"]
    assert states["prompt"][str(node["id"])]["inputs"]["embedded_plan"] == text
    assert states["hidden"]
    assert states["not_kept"] == ""


def test_the_check_lays_its_two_pictures_over_each_other(states):
    compare = states["compare"]
    assert compare["sizes"] == [64, 64] and compare["apart"]
    shares = [float(re.search(r"([\d.]+)(?:%|px)\)$", clip)[1]) for clip in compare["clips"]]
    assert shares == [pytest.approx(25, abs=1), 0, pytest.approx(75, abs=1)]


def test_auto_tune_has_a_bar_and_its_picture_carries_the_plan(states):
    from sage_diffusion.plan.embed import read_embedded

    tuned = states["tuned"]
    assert tuned["end"] == "execution_success"
    node = tuned["node"]
    assert node["state"] == "done" and "measured now" in node["text"]
    told = "\n".join(tuned["told"])
    assert re.search(r"^bar 2 [1-5]/6$", told, re.M)  # two runs of three steps in one bar
    assert re.search(r"^measure: step \d of 3, run 2 of 2\n\d+ s left$", told, re.M)
    assert read_embedded(tuned["plan"]).plan.calibration["predicted"]["time"] < 0.25
    assert tuned["received"] == tuned["plan"]


def test_a_calibration_ends_in_a_plan_whose_preview_says_its_stage(states):
    found = states["calibrated"]
    assert found["end"] == "execution_success"
    stage = "calibrated on the end-to-end stage (gradients, 1 picture)"
    assert stage in found["node"]["text"] and stage in found["preview"]["text"]
    assert found["ran"]["state"] == "done" and "plan tiny (hash" in found["ran"]["text"]
    told = "\n".join(found["told"])
    assert re.search(r"^sensitivity: step [4-6] of 6, run 1 of 1", told, re.M)  # the way back


def test_a_headline_is_said_in_the_pages_language(states):
    text = "annulé pendant l'échantillonnage\npas de chiffres pour cette exécution"
    assert states["french"] == text


def test_no_state_broke_the_page(states):
    assert states["errors"] == []


# ------------------------------------------------------------------------------- a hole is filled
SIDE = 128


@pytest.fixture(scope="module")
def fill(server, tmp_path_factory):
    """The workflow that fills a hole in a picture, with one that has colours and stripes."""
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("VQ Fill needs diffusers in ComfyUI's Python")
    y, x = torch.meshgrid(*[torch.linspace(0, 1, SIDE)] * 2, indexing="ij")
    picture = torch.stack([x, y, (20 * x).sin() / 2 + 0.5], -1)
    path = tmp_path_factory.mktemp("given") / "photograph.png"
    Image.fromarray((picture * 255).byte().numpy()).save(path)
    return drive(server, "fill.js", "fill.json", str(path))


def test_a_hole_painted_in_the_mask_editor_is_filled(fill):
    found = fill["filled"]
    assert fill["errors"] == [] and found["image"].startswith("clipspace-painted-masked")
    told = re.match(r"(\d+) of (\d+) tokens filled, 2 variants", found["text"])
    filled, tokens = map(int, told.groups())
    assert tokens == (SIDE // 8) ** 2 and 0 < filled < tokens // 2
    assert found["sizes"] == [[SIDE, SIDE]] * 3  # only decoded, and two variants
    for rows in found["changes"]:
        # The decoder spreads a token's change; the far edges hardly see it.
        assert max(rows[0], rows[-1]) <= 4 and rows[SIDE // 2] > 50
