"""One ComfyUI server: every node executed through /prompt, as the page does it."""

from __future__ import annotations

import json
from pathlib import Path

import host
import prompts
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NODES = (
    "SageDiffusionAttention",
    "SageDiffusionReport",
    "SageDiffusionAutoTune",
    "SageDiffusionLoadPlan",
    "SageDiffusionSavePlan",
    "SageDiffusionMergePlans",
    "SageDiffusionEditPlan",
    "SageDiffusionPlanPreview",
    "SageDiffusionCalibrate",
    "SageDiffusionAccuracyCheck",
    "SageDiffusionDoctor",
    "SageDiffusionVerify",
    "SageDiffusionLoadVQTokenizer",
    "SageDiffusionVQEncode",
    "SageDiffusionVQDecode",
    "SageDiffusionVQTokenEdit",
    "SageDiffusionVQFill",
    "SageDiffusionCodebookInspector",
    "SageDiffusionSaveVQTokens",
    "SageDiffusionLoadVQTokens",
    "SageDiffusionConvertTokenizer",
    "SageDiffusionTrainVQTokenizer",
    "SageDiffusionCodebookRepair",
    "SageDiffusionVQSearch",
    "SageDiffusionKVCache",
    "SageDiffusionKVCacheReport",
    "SageDiffusionKVCalibrate",
    "SageDiffusionSaveKVCalibration",
    "SageDiffusionLoadKVCalibration",
)
PRIMITIVES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    import tiny_models

    models = request.config.getoption("--models")
    for family in (*prompts.PARTS, "taesd"):
        tiny_models.write(models, family)
    tiny_models.write_tokenizer(models)
    out = tmp_path_factory.mktemp("comfy")
    comfy = request.config.getoption("--comfy").resolve()
    with host.serve(comfy, models, out) as running:
        yield running


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


def failure(history):
    """Message of the node that failed."""
    assert history["status"]["status_str"] == "error"
    kinds = dict(history["status"]["messages"])
    return kinds["execution_error"]["exception_message"]


def inputs_of(definition):
    """(name, type, options) of every input, those of dynamic combos included."""
    for group in ("required", "optional"):
        for name, (kind, *rest) in definition.get(group, {}).items():
            options = rest[0] if rest else {}
            yield name, kind, options
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for option in options["options"]:
                    yield from inputs_of(option["inputs"])


@pytest.mark.parametrize("name", NODES)
def test_nodes_are_there_with_words_on_everything(info, name):
    node = info[name]
    assert node["description"]
    assert node["search_aliases"]
    for input_name, _, options in inputs_of(node["input"]):
        assert options.get("tooltip"), input_name
    assert all(node["output_tooltips"])


def test_the_pack_is_quick_to_import_and_nothing_failed(server):
    log = (server.out / "server.log").read_text(errors="replace")
    assert "IMPORT FAILED" not in log.replace("IMPORT FAILED: nodes_glsl", "")
    assert "Error while calling comfy_entrypoint" not in log


@pytest.mark.parametrize(("family", "calls"), [("sd3", 6), ("sd15", 42), ("wan", 12)])
def test_a_family_samples_and_says_what_it_did(server, family, calls):
    done = server.run(prompts.sampling(family, **prompts.custom("int8/fp16")))
    assert done["status"]["status_str"] == "success", done["status"]
    expected = f"int8/fp16: {calls} of {calls} attention calls\n"
    shown, report = server.last_text("2"), done["outputs"]["7"]["text"][0]
    assert shown.startswith(expected)  # on the node that patches
    assert report.startswith(expected)  # and in the report's own output
    assert "0 declined; share: int8/fp16 100%" in shown
    if "10" in done["outputs"]:
        picture = done["outputs"]["10"]["images"][0]["filename"]
        assert (server.out / "output" / picture).read_bytes()[:4] == b"\x89PNG"


def test_off_passes_the_model_through(server):
    prompt = prompts.sampling("sd3")
    prompt["2"]["inputs"]["enabled"] = False
    done = server.run(prompt)
    assert server.last_text("2").startswith("off")
    assert done["outputs"]["7"]["text"][0] == server.last_text("2")


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_presets_run_here(server, preset):
    done = server.run(prompts.sampling("sd3", steps=4, preset=preset))
    assert done["status"]["status_str"] == "success"
    text = done["outputs"]["7"]["text"][0]
    assert "0 declined" in text
    assert "NOT QUANTIZED" not in text


def test_a_plan_goes_round_through_the_folder(server):
    edit = {"layers": "double.01", "spec": "fp16", "start_percent": 0.5, "end_percent": 1.0}
    edit |= {"branch": "both", "min_tokens": 0, "place": "first"}
    prompt = {
        "1": prompts.node("SageDiffusionLoadPlan", file="int8 everywhere"),
        "2": prompts.node(
            "SageDiffusionEditPlan",
            plan=["1", 0],
            change="add a rule",
            **{f"change.{k}": v for k, v in edit.items()},
        ),
        "3": prompts.node("SageDiffusionLoadPlan", file="cautious int8"),
        "4": prompts.node("SageDiffusionMergePlans", first=["2", 0], second=["3", 0]),
        "5": prompts.node("SageDiffusionSavePlan", plan=["4", 0], name="mine/a", overwrite=True),
        "6": prompts.node(
            "SageDiffusionPlanPreview",
            plan=["4", 0],
            steps=10,
            branch="cond",
            tokens=4096,
            layers="*",
        ),
    }
    done = server.run(prompt)
    assert done["status"]["status_str"] == "success", done["status"]
    path = Path(done["outputs"]["5"]["text"][0].removeprefix("saved "))
    saved = json.loads(path.read_text())
    assert saved["rules"][0] == {"layers": "double.01", "start": 0.5, "spec": "fp16"}
    assert len(saved["rules"]) == 4
    assert done["outputs"]["6"]["images"]
    assert "double.01, steps 50%-100% -> fp16" in server.last_text("4")
    listed = server.get("/object_info/SageDiffusionLoadPlan")
    options = listed["SageDiffusionLoadPlan"]["input"]["required"]["file"][1]["options"]
    assert "mine/a" in options  # without a restart
    used = server.run(
        prompts.sampling("sd3", steps=4, **{"preset": "plan file", "preset.file": "mine/a"})
    )
    assert used["status"]["status_str"] == "success"


def test_a_plan_by_its_input_reaches_the_model(server):
    prompt = prompts.sampling("sd3", **{"preset": "plan input", "preset.plan": ["20", 0]})
    prompt["20"] = prompts.node("SageDiffusionLoadPlan", file="int8 everywhere")
    done = server.run(prompt)
    assert "int8/fp16 100%" in done["outputs"]["7"]["text"][0]


def test_a_plan_that_only_the_workflow_has_runs_and_is_in_the_picture(server):
    from sage_diffusion.plan import PrecisionPlan, Rule
    from sage_diffusion.plan.embed import content_hash, embed_plan

    plan = PrecisionPlan("fp16", (Rule("int8/fp16", "double.01", 0.4),), name="theirs")
    prompt = prompts.sampling("sd3", **{"preset": "plan file", "preset.file": "never/here"})
    assert "the workflow carries none" in failure(server.run(prompt))
    prompt["2"]["inputs"]["embedded_plan"] = embed_plan(plan, "never/here")
    done = server.run(prompt)
    report = done["outputs"]["7"]["text"][0]
    assert report.startswith("int8/fp16: 2 of 6 attention calls")
    assert f"theirs (plan of this workflow, hash {content_hash(plan)})" in report
    picture = server.out / "output" / done["outputs"]["10"]["images"][0]["filename"]
    assert content_hash(plan).encode() in picture.read_bytes()
    prompt["2"]["inputs"]["embedded_plan"] = " " * (5 << 20)
    assert "embedded plan: must have at most 256 kB" in failure(server.run(prompt))


def test_a_changed_file_is_not_served_from_the_cache(server, request):
    from sage_diffusion.plan.rules import VERSION

    folder = request.config.getoption("--models") / "sage_plans"
    folder.mkdir(parents=True, exist_ok=True)
    prompt = prompts.sampling("sd3", **{"preset": "plan file", "preset.file": "changes"})
    for spec in ("int8/fp16", "int8/int8"):
        (folder / "changes.json").write_text(f'{{"version": {VERSION}, "default": "{spec}"}}')
        done = server.run(prompt)
        assert done["outputs"]["7"]["text"][0].startswith(f"{spec}: 6 of 6")
    query = "/sage_diffusion/plan?file=changes"
    assert '"default":"int8/int8"' in server.get(query)["text"]


def accuracy(**more):
    prompt = prompts.check("sd3", **prompts.custom("int4/int8"))
    prompt["6"]["inputs"] |= more
    return prompt


def test_the_accuracy_check_proves_a_plan(server):
    done = server.run(accuracy())
    assert done["status"]["status_str"] == "success", done["status"]
    shown = server.last_text("6")
    assert shown.startswith("PASSED: cosine 0.9")
    assert "12 of 12 quantized calls compared with exact attention" in shown
    assert "PSNR" in shown
    report = json.loads(Path(shown.splitlines()[-1]).read_text())
    assert len(report["rows"]) == 12  # 3 layers, 2 steps, each branch of guidance
    assert done["outputs"]["12"]["text"] == ["true"] or done["outputs"]["12"]["text"] == ["True"]
    for name in ("a_images", "b_images"):  # without and with the plan, for the page's slider
        (picture,) = done["outputs"]["6"][name]
        data = (server.out / "temp" / picture["filename"]).read_bytes()
        assert int.from_bytes(data[16:20], "big") == 64
    assert done["outputs"]["13"]["images"]
    assert "int4/int8" in done["outputs"]["11"]["text"][0]


def test_a_calibrated_plan_is_made_and_runs(server):
    done = server.run(prompts.calibrated("sd3"))
    assert done["status"]["status_str"] == "success", done["status"]["messages"][-1]
    assert "predicted bound on rtx4090" in server.last_text("20")
    told = "".join(text for _, text in server.texts)
    assert "measure: 2 of 2" in told and "sensitivity: 1 of 1" in told
    stage = "calibrated on the end-to-end stage (gradients, 1 picture)"
    assert stage in server.last_text("20") and stage in server.last_text("22")
    assert "0 declined" in server.last_text("2")
    assert "WARNING" not in server.last_text("2")
    assert (server.out / "output" / "sage_calibrations" / "tiny.json").exists()


def test_the_accuracy_check_fails_beyond_its_limit(server):
    done = server.run(accuracy(metric="psnr", limit=150.0))
    assert done["status"]["status_str"] == "success"
    assert server.last_text("6").startswith("FAILED: psnr 150")
    assert "must be at least 150" in server.last_text("6")


def test_live_calls_need_one_run_and_refuse_figures_of_two(server):
    done = server.run(accuracy(mode="live calls only"))
    assert done["status"]["status_str"] == "success"
    assert "two runs" not in server.last_text("6")
    with pytest.raises(RuntimeError, match="compares two runs"):
        server.run(accuracy(mode="live calls only", metric="psnr"))


def test_the_doctor_tells_who_runs_what(server):
    done = server.run({"1": prompts.node("SageDiffusionDoctor", head_dim=128, mask="none")})
    text = done["outputs"]["1"]["text"][0]
    assert "int4/fp8-fast   reference" in text
    assert "needs a CUDA or ROCm device" in text


def test_verify_says_that_there_is_no_card(server):
    done = server.run({"1": prompts.node("SageDiffusionVerify", action="last verdict")})
    assert done["outputs"]["1"]["text"] == ["No GPU here: there is no kernel to verify."]
    told = failure(server.run({"1": prompts.node("SageDiffusionVerify", action="verify now")}))
    assert "build for the CPU" in told or "no card can be used" in told


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (prompts.custom("int8/fp16", start_percent=0.8, end_percent=0.2), "start must be less"),
        (prompts.custom("int8/fp16", layers=" , "), "layers must be globs"),
        ({"preset": "plan file", "preset.file": "broken"}, "broken.json: is not JSON"),
        ({"preset": "plan file", "preset.file": "newer"}, "this plan has version 9"),
    ],
)
def test_bad_input_is_an_error_on_the_node(server, request, preset, message):
    folder = request.config.getoption("--models") / "sage_plans"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.json").write_text("{")
    (folder / "newer.json").write_text('{"version": 9}')
    assert message in failure(server.run(prompts.sampling("sd3", **preset)))


def test_a_broken_file_is_never_overwritten(server, request):
    folder = request.config.getoption("--models") / "sage_plans"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.json").write_text("{")
    prompt = {
        "1": prompts.node("SageDiffusionLoadPlan", file="int8 everywhere"),
        "2": prompts.node("SageDiffusionSavePlan", plan=["1", 0], name="broken", overwrite=True),
    }
    assert "not overwritten" in failure(server.run(prompt))
    assert (folder / "broken.json").read_text() == "{"
    prompt["2"]["inputs"]["name"] = "../outside"
    assert "name must be made of" in failure(server.run(prompt))


def test_a_glob_that_matches_nothing_is_reported(server):
    layers = "double.*,nothing.here"
    done = server.run(prompts.sampling("sd3", **prompts.custom("int8/fp16", layers=layers)))
    assert done["status"]["status_str"] == "success"
    assert "'nothing.here' matches no layer" in server.last_text("2")


def test_strict_stops_with_the_reason(server):
    prompt = prompts.sampling("sd3", **prompts.custom("int8/fp16"))
    prompt["2"]["inputs"] |= {"strict": True, "backend": "triton"}
    assert "needs a CUDA or ROCm device" in failure(server.run(prompt))
    prompt["2"]["inputs"]["strict"] = False
    done = server.run(prompt)
    assert done["status"]["status_str"] == "success"
    assert "declined 6 times" in server.last_text("2")


# ---------------------------------------------------------------------- tokens
def test_a_picture_becomes_tokens_that_are_edited_kept_and_decoded(server):
    done = server.run(prompts.tokens({"change": "one token", "change.code": 7}))
    assert done["status"]["status_str"] == "success", done["status"]
    outputs = done["outputs"]
    assert "compact: simvq, 50 codes of 6 dims" in server.last_text("1")
    assert server.last_text("3") == (
        "12 x 8 tokens, 1 of 50 codes, 0.00 bits each as used\ncropped from 100 x 70 to 96 x 64"
    )
    assert server.last_text("4").splitlines()[0] in (
        "96 of 96 tokens changed",
        "0 of 96 tokens changed",
    )
    assert outputs["6"]["text"][0].startswith("12 x 8 tokens, 1 of 50 codes")
    file = outputs["7"]["text"][0].partition(":")[0]
    assert (server.out / "output" / file).read_bytes()[:4] == b"SVQT"
    again = prompts.tokens({"change": "fewer tokens", "change.count": 3})
    again["3"] = prompts.node("SageDiffusionLoadVQTokens", file=file)
    back = server.run(again)
    assert back["status"]["status_str"] == "success", back["status"]
    pictures = [outputs["8"]["images"][0], back["outputs"]["8"]["images"][0]]
    first, second = ((server.out / "output" / p["filename"]).read_bytes() for p in pictures)
    assert first[:4] == second[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("node", "changed", "says"),
    [
        ("4", {"change": "one token", "change.code": 50}, "an id must be 0 .. 49, got 50"),
        ("3", "../secret.vqt", "must lie in the input or the output folder"),
        ("3", "missing.vqt", "missing.vqt can't be read"),
        ("9", "missing.ckpt", "no file 'missing.ckpt' in models/vq_tokenizers"),
    ],
)
def test_what_does_not_fit_tokens_is_said(server, node, changed, says):
    change = changed if node == "4" else {"change": "shuffle", "change.seed": 1}
    prompt = prompts.tokens(change)
    if node == "3":
        prompt["3"] = prompts.node("SageDiffusionLoadVQTokens", file=changed)
    if node == "9":
        prompt = {"9": prompts.node("SageDiffusionConvertTokenizer", file=changed)}
    assert says in failure(server.run(prompt))


# ---------------------------------------------------------------------- what people read
@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_help_page(server, name):
    page = server.text(f"/extensions/sage_diffusion/docs/{name}.md")
    assert page.startswith("# ")
    assert len(page) > 300


def test_help_is_served_in_the_pages_language(server):
    page = server.text("/extensions/sage_diffusion/docs/SageDiffusionAutoTune/de.md")
    assert page.startswith("# Attention selbst abstimmen")


def test_every_language_names_every_node_and_input(server, info):
    known = server.get("/i18n")
    for language in ("en", "zh", "ja", "de", "fr", "es"):
        nodes = known[language]["nodeDefs"]
        for name in NODES:
            entry = nodes[name]
            assert entry["display_name"]
            assert entry["description"]
            for input_name, _, _ in inputs_of(info[name]["input"]):
                text = entry["inputs"][input_name]
                assert text["name"], (language, name, input_name)
                assert text["tooltip"], (language, name, input_name)
    for name in NODES:
        english = known["en"]["nodeDefs"][name]
        assert english["display_name"] == info[name]["display_name"]
        assert english["description"] == info[name]["description"]
        for input_name, _, options in inputs_of(info[name]["input"]):
            if input_name != "spec":  # two inputs of one node may share a name
                assert english["inputs"][input_name]["tooltip"] == options["tooltip"]


def test_the_registry_reads_the_metadata():
    from comfy_config import config_parser

    found = config_parser.extract_node_configuration(str(ROOT))
    assert found.tool_comfy.publisher_id == "sage-diffusion"
    assert found.tool_comfy.display_name == "Sage Diffusion"
    assert found.tool_comfy.icon.endswith("web/icon.svg")
    assert found.project.supported_os == ["OS Independent"]
    assert found.project.supported_accelerators == ["GPU :: NVIDIA CUDA"]
    assert found.project.supported_comfyui_version == ">=0.24.0"
    assert found.project.urls.repository
    assert found.project.license.text == "Apache-2.0"


WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def test_workflows_are_offered_as_templates_with_pictures(server):
    offered = server.get("/workflow_templates")["sage_diffusion"]
    assert sorted(offered) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_nodes(info, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    kinds = [node["type"] for node in graph["nodes"]]
    assert any(kind.startswith("SageDiffusion") for kind in kinds)
    assert {"Note", "MarkdownNote"} & set(kinds), "a workflow explains itself"
    slots = {node["id"]: node for node in graph["nodes"]}
    for node in graph["nodes"]:
        if node["type"] in ("Note", "MarkdownNote", "Reroute"):
            continue
        assert node["type"] in info, node["type"]
        definition = info[node["type"]]
        names = {name for name, _, _ in inputs_of(definition["input"])}
        for slot in node.get("inputs", []):
            assert slot["name"].split(".")[-1] in names, (node["type"], slot["name"])
        assert [slot["type"] for slot in node.get("outputs", [])] == definition["output"]
        if any(
            options.get("control_after_generate")
            for _, _, options in inputs_of(definition["input"])
        ):
            assert "fixed" in node["widgets_values"], f"{node['type']} has a seed that changes"
    for _, source, source_slot, target, target_slot, kind in graph["links"]:
        assert slots[source]["outputs"][source_slot]["type"] in (kind, "*")
        assert slots[target]["inputs"][target_slot]["link"] is not None
