import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_emoji import tiny_emoji

from sage_diffusion import AccuracyReport, PrecisionPlan, Rule
from sage_diffusion.cli import COMMANDS, main
from sage_diffusion.commands.common import CommandError
from sage_diffusion.commands.options import call_arguments, parse_option
from sage_diffusion.kernels.spec import LADDER


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_emoji(layers=3).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys):
    """Run a command line in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "mine.json"
    rules = (Rule("int8/fp8", "transformer_blocks.0.*"), Rule("fp16", "*", 0.5, 1.0))
    PrecisionPlan("int4/fp8-fast", rules, "DiT", name="by hand").save(path)
    return path


# ---------------------------------------------------------------------- demo and compare
QUICK = ("--steps", 2, "--pictures", 1)


def test_demo_writes_every_file_and_prints_a_table(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("demo", "--model", model, "--out", out, "--images", 2, *QUICK)
    assert code == 0
    for name in ("int8/fp8", "int4/fp8-fast", "adaptive", "PSNR dB", "report.html", "why.png"):
        assert name in text
    names = {path.name for path in out.iterdir()}
    assert names >= {"grid.png", "heatmap.png", "plan.json", "report.json", "report.md"}
    assert names >= {"scores.json", "pareto.png", "why.png", "layers.png", "latents.png"}
    assert {"report.html", "report-int8-fp8.html", "report-int4-fp8-fast.json"} <= names
    report = AccuracyReport.from_json((out / "report.json").read_text())
    assert report.name == "adaptive" and report.plan == PrecisionPlan.load(out / "plan.json")
    assert [variant.name for variant in report.variants] == [
        "int8/fp8",
        "int4/fp8-fast",
        "adaptive",
    ]
    assert report.plan.calibration["runs"] == 3  # the fourth batch repeats the first's classes
    with Image.open(out / "grid.png") as grid:  # fp16, three plans and their differences
        assert grid.size[1] == 30 + 7 * (96 + 6) + 6


def test_demo_draws_before_it_calibrates(run, model, tmp_path, monkeypatch) -> None:
    seen = []

    def interrupted(*_: object) -> None:
        with Image.open(tmp_path / "grid.png") as grid:
            seen.append(grid.size[1])
        raise KeyboardInterrupt

    monkeypatch.setattr("sage_diffusion.commands.demo._calibrate", interrupted)
    run("demo", "--model", model, "--out", tmp_path, "--images", 2, *QUICK)
    assert seen == [30 + 5 * (96 + 6) + 6]  # fp16, two specs and their differences


def test_demo_json_is_one_deterministic_document(run, model, tmp_path) -> None:
    documents = []
    for name in ("a", "b"):
        arguments = ("--out", tmp_path / name, "--images", 1, *QUICK, "--json")
        code, text, _ = run("demo", "--model", model, *arguments)
        assert code == 0
        documents.append(json.loads(text))
    first, second = documents
    assert first["variants"] == second["variants"] and len(first["variants"]) == 3
    assert first["variants"][0]["specs"] == {"int8/fp8": 2 * 6}  # each branch of guidance
    assert first["evaluation"] == second["evaluation"]
    assert set(first["evaluation"]["uniform"]) >= {"int8/fp8", "int4/fp8-fast"}
    grids = [(tmp_path / name / "grid.png").read_bytes() for name in ("a", "b")]
    assert grids[0] == grids[1]
    assert all((tmp_path / "a") in Path(f).parents for f in first["files"])


def test_compare_takes_specs_and_plans(run, model, plan_file, tmp_path) -> None:
    out = tmp_path / "out"
    code, text, _ = run(
        "compare", model, "--spec", "int8/fp8", "--plan", plan_file, "--prompt", "dog",
        "--steps", 2, "--seed", 3, "--seed", 4, "--set", "guidance_scale=1.0", "--rows", 8,
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0
    data = json.loads(text)
    assert [variant["name"] for variant in data["variants"]] == ["int8/fp8", "mine"]
    assert data["variants"][1]["specs"] == {"int8/fp8": 4, "int4/fp8-fast": 4, "fp16": 4}
    report = AccuracyReport.from_json((out / "report.json").read_text())
    assert report.end_to_end.labels == ("dog, seed 3", "dog, seed 4")
    assert (out / "report-int8-fp8.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give at least one --spec or --plan"),
        (("--spec", "int5"), "'int5' is not an attention spec"),
        (("--plan", "missing.json"), "missing.json: cannot be read"),
        (("--spec", "int8/fp8", "--prompt", "cow"), "must be one of cat, dog, bird"),
        (("--spec", "int8/fp8", "--set", "x"), "--set needs NAME=VALUE, got 'x'"),
        (("--spec", "int8/fp8", "--set", "x=1"), "EmojiPipeline has no argument 'x' to --set"),
        (("--spec", "int8/fp8", "--backend", "magic"), "backend must be one of"),
        (("--spec", "int8/fp8", "--backend", "triton", "--strict"), "needs a CUDA or ROCm device"),
    ],
)
def test_compare_errors_are_one_line(run, model, tmp_path, arguments, message) -> None:
    steps = ("--steps", 1, "--out", tmp_path / "out")
    code, text, err = run("compare", model, *steps, *arguments)
    assert (code, text) == (1, "")
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("sage-diffusion: ")
    code, text, _ = run("compare", model, *steps, *arguments, "--json")
    assert code == 1 and message in json.loads(text)["error"]
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_an_error(run) -> None:
    code, _, err = run("compare", "/no/such/model", "--spec", "int8/fp8")
    assert code == 1 and "/no/such/model is neither a folder" in err


class Text:
    def __call__(self, prompt, num_inference_steps=20):
        """A text-to-image pipeline."""


class Plain:
    def __call__(self, batch_size=1):
        """An unconditional one."""


def test_arguments_follow_the_pipelines_signature() -> None:
    assert call_arguments(Text(), ["a cat"], 7) == (
        {"num_inference_steps": 7, "prompt": "a cat"},
        ["a cat"],
    )
    assert call_arguments(Text(), ["a", "b"], 7)[0]["prompt"] == ["a", "b"]
    assert call_arguments(Plain(), [], 7) == ({}, [])
    assert call_arguments(tiny_emoji(), ["cat", "2"], 1)[0]["class_labels"] == ["cat", 2]
    with pytest.raises(CommandError, match="needs at least one --prompt"):
        call_arguments(Text(), [], 7)
    with pytest.raises(CommandError, match="Plain takes no prompt"):
        call_arguments(Plain(), ["a"], 7)


def test_options_are_json_or_text() -> None:
    assert parse_option("height=512") == ("height", 512)
    assert parse_option("output_type=pt") == ("output_type", "pt")
    assert parse_option("negative_prompt=a=b") == ("negative_prompt", "a=b")
    assert parse_option("prompt=[a cat] sits") == ("prompt", "[a cat] sits")
    for text, message in (
        ("guidance_scale=NaN", "--set guidance_scale: the document must be a finite number"),
        ("sigmas=[1, 1e999]", r"--set sigmas: \[1\] must be a finite number"),
        (f"seed={'9' * 5000}", "--set seed: the document must be a finite number"),
        (f"prompt={'[' * 20_000}", r"--set prompt: \[0\].* must have at most 64"),
    ):
        with pytest.raises(CommandError, match=message):
            parse_option(text)


# ---------------------------------------------------------------------- plan
def test_plan_show(run, plan_file) -> None:
    code, text, _ = run("plan", "show", plan_file)
    assert code == 0
    for part in ("by hand", "transformer_blocks.0.*", "50% to 100%", "default", "not calibrated"):
        assert part in text
    code, text, _ = run("plan", "show", plan_file, "--json")
    assert code == 0 and json.loads(text) == json.loads(plan_file.read_text())


def test_plan_validate(run, plan_file, model) -> None:
    code, text, _ = run("plan", "validate", plan_file)
    assert code == 0 and "valid, 2 rules" in text
    code, text, _ = run("plan", "validate", plan_file, "--model", model, "--json")
    assert code == 0
    assert json.loads(text) == {"valid": True, "rules": 2, "warnings": [], "layers": 3}


def test_plan_validate_names_the_path_of_what_is_wrong(run, tmp_path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"version": 1, "default": "int8/fp8", "rules": [{"spec": "int9/fp8"}]}')
    code, text, err = run("plan", "validate", path)
    assert (code, text) == (1, "") and "rules[0].spec: 'int9/fp8' is not" in err
    code, text, _ = run("plan", "validate", path, "--json")
    assert code == 1 and "bad.json: rules[0].spec" in json.loads(text)["error"]


def test_plan_of_another_model(run, tmp_path, model) -> None:
    path = tmp_path / "flux.json"
    PrecisionPlan("int8/fp8", (Rule("fp16", "single.*"),), "flux").save(path)
    code, _, err = run("plan", "validate", path, "--model", model)
    assert code == 1 and "made for another model (flux)" in err
    some = PrecisionPlan("int8/fp8", (Rule("fp16", "single.*"), Rule("fp16", "*.0.*")))
    some.save(path)
    code, text, _ = run("plan", "validate", path, "--model", model, "--json")
    assert code == 0 and "'single.*' matches no layer" in json.loads(text)["warnings"][0]
    assert run("plan", "validate", path, "--model", model, "--strict")[0] == 1


# ---------------------------------------------------------------------- doctor and the frame
def test_doctor_answers_for_every_backend_and_spec(run) -> None:
    code, text, _ = run("doctor", "--device", "cpu", "--json")
    assert code == 0
    data = json.loads(text)
    assert tuple(data["specs"]) == LADDER
    for name, answer in data["specs"].items():
        assert set(answer["refusals"]) == {backend["name"] for backend in data["backends"]}
        assert answer["auto"] == ("sdpa" if name == "fp16" else "reference")
        assert answer["refusals"][answer["auto"]] is None
        assert "cpu" in answer["refusals"]["triton"] or name == "fp16"
    code, text, _ = run("doctor", "--card", "rtx4090", "--json")
    assert code == 0 and [line.split(":")[0] for line in json.loads(text)["presets"]] == [
        "quality",
        "balanced",
        "fast",
    ]
    assert run("doctor", "--card", "rtx4090", "--device", "cpu")[0] == 1
    code, text, _ = run("doctor", "--device", "cpu")
    assert code == 0 and "sageattention is not installed" in text and "reference" in text


def test_wrong_usage_has_exit_code_2(run) -> None:
    code, text, err = run("demo", "--images", "many")
    assert (code, text) == (2, "") and "--images" in err
    code, text, err = run("demo", "--images", "many", "--json")
    assert code == 2 and "--images" in json.loads(text)["error"]
    assert run("nope")[0] == 2
    code, text, _ = run("--help")
    assert code == 0 and all(command in text for command in COMMANDS)


def test_interruption_is_no_traceback(run, monkeypatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sage_diffusion.commands.doctor.diagnose", interrupted)
    code, text, _ = run("doctor", "--json")
    assert code == 130 and json.loads(text) == {"error": "interrupted"}


@pytest.mark.parametrize("before", [None, "kept"])
def test_ctrl_c_in_the_middle_of_a_file_leaves_it_whole(
    run, plan_file, tmp_path, monkeypatch, before
) -> None:
    out = tmp_path / "out" / "plan.json"
    if before is not None:
        out.parent.mkdir()
        out.write_text(before)
    monkeypatch.setattr("os.fsync", lambda file: signal.raise_signal(signal.SIGINT))
    # A shell starts background jobs with interrupts ignored, and Python keeps that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, text, err = run("plan", "merge", plan_file, plan_file, "--out", out)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (code, text, err) == (130, "", "sage-diffusion: interrupted\n")
    assert [path.read_text() for path in out.parent.iterdir()] == ([before] if before else [])


def test_as_a_program(plan_file) -> None:
    """A fresh process: no torch for the commands that need none, JSON alone on stdout."""
    command = [sys.executable, "-m", "sage_diffusion", "plan", "show", str(plan_file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "by hand"
    code = (
        "import sys; from sage_diffusion.cli import COMMANDS, main; "
        "code = sum(main([name, '--help']) for name in COMMANDS); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, "help needs no torch" + done.stderr
