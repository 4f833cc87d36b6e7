"""Plans and calibrations from the command line: files in, files out, one clear error each."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from tiny_emoji import tiny_emoji

from sage_diffusion import PrecisionPlan, Rule
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.cli import main
from sage_diffusion.integrations.diffusers import pipelines
from sage_diffusion.plan.library import shipped_plan

SPECS = ("--spec", "int8/fp8-fast", "--spec", "int4/fp8-fast")
LOOPS = ("--tokens", "inf")  # the model is tiny
QUICK = ("--steps", "3", "--share", "1", "--rows", "4", "--sensitivity", "0", *LOOPS, *SPECS)
PROMPTS = ("--prompt", "cat", "--prompt", "dog")


class NoAttention(diffusers.ModelMixin, diffusers.ConfigMixin):
    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)


class PlainPipeline(diffusers.DiffusionPipeline):
    """A text-to-image pipeline of which nothing attends."""

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)

    def __call__(self, prompt, num_inference_steps=20, generator=None):
        raise AssertionError("must not be reached")


@pytest.fixture(autouse=True)
def models(monkeypatch, tmp_path):
    made = {
        "tiny": tiny_emoji,
        "deeper": lambda: tiny_emoji(layers=3),
        "plain": lambda: PlainPipeline(NoAttention()),
    }
    monkeypatch.setattr(pipelines, "load_pipeline", lambda name, device=None: made[name]())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """A command line's exit code and its document, and that the text form fails alike."""

    def call(*arguments):
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        document = json.loads(capsys.readouterr().out)
        if code:
            assert main([*map(str, arguments)]) == code
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.splitlines()[-1] == f"sage-diffusion: {document['error']}"
        return code, document

    return call


@pytest.fixture
def calibrated(run, models):
    assert run("calibrate", "tiny", *QUICK, *PROMPTS)[0] == 0
    return models


# ---------------------------------------------------------------------- merge and remap
def test_merge(run):
    top = PrecisionPlan("fp16", (Rule("fp16", "a.*"), Rule("int8/fp16", "b.*")), name="top")
    rest = PrecisionPlan("int4/int8", (Rule("int8/int8", "b.*"), Rule("int8/int8", "*", 0.5)))
    top.save("top.json")
    rest.save("rest.json")
    code, document = run("plan", "merge", "top.json", "rest.json", "--out", "both.json")
    assert (code, document) == (0, {"rules": 3, "dropped": 1, "files": ["both.json"]})
    both = PrecisionPlan.load("both.json")
    assert [str(rule.spec) for rule in both.rules] == ["fp16", "int8/fp16", "int8/int8"]
    assert str(both.default) == "int4/int8"
    assert run("plan", "merge", "top.json", "wan", "--out", "wan.json")[0] == 0
    assert run("plan", "validate", "wan")[1]["rules"] == len(shipped_plan("wan").rules)
    merged = PrecisionPlan.load("wan.json").rules
    assert merged[2:] == shipped_plan("wan").rules
    PrecisionPlan("fp16", fingerprint={"model": "A"}).save("a.json")
    PrecisionPlan("fp16", fingerprint={"model": "B"}).save("b.json")
    code, document = run("plan", "merge", "a.json", "b.json")
    assert code == 1 and "plans of different models can't be merged" in document["error"]


def test_remap(run, calibrated):
    plan = PrecisionPlan.load("plan.json")
    assert len(plan.schedule) == 3
    code, document = run(
        "plan", "remap", "plan.json", "--sigmas", "1,0.9,0.6,0.5,0.3", "--out", "m"
    )
    assert code == 0 and document["files"] == ["m"]
    moved = PrecisionPlan.load("m")
    for step, sigma in enumerate(moved.schedule):
        for layer in plan.fingerprint["layers"]:
            for branch in ("cond", "uncond"):
                expected = plan.resolve(layer, plan.remap(sigma), branch=branch)
                assert moved.resolve(layer, step / 4, branch=branch) == expected
    for like in ("plan.json", "scores.json"):
        assert run("plan", "remap", "m", "--like", like, "--out", "back.json")[0] == 0
        assert PrecisionPlan.load("back.json").schedule == plan.schedule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say which schedule: give --sigmas or --like"),
        (("--sigmas", "1,x"), "--sigmas must be numbers with commas between, got '1,x'"),
        (("--sigmas", "1,2"), "sigmas must be at least two strictly descending values"),
        (("--like", "free.json"), "free.json stores no schedule"),
        (("--like", "missing.json"), "missing.json: cannot be read"),
    ],
)
def test_remap_errors(run, arguments, message):
    PrecisionPlan("int8/fp8", schedule=(1.0, 0.5)).save("timed.json")
    PrecisionPlan("int8/fp8").save("free.json")
    code, document = run("plan", "remap", "timed.json", *arguments)
    assert code == 1 and message in document["error"]
    code, document = run("plan", "remap", "free.json", "--sigmas", "1,0.5")
    assert code == 1 and "the plan stores no schedule" in document["error"]


# ---------------------------------------------------------------------- calibrate and evaluate
def test_a_finished_table_is_read_and_not_measured_again(run, calibrated, monkeypatch):
    written = (calibrated / "scores.json").read_bytes()
    assert run("calibrate", "tiny", *QUICK, *PROMPTS)[0] == 0
    assert (calibrated / "scores.json").read_bytes() == written


def test_an_interrupted_calibration_goes_on(run, models, monkeypatch):
    calls = []

    def interrupted(name, device=None):
        pipe = tiny_emoji()

        def hook(*_):
            calls.append(1)
            if len(calls) == 5:  # the second step of the second run
                raise KeyboardInterrupt

        pipe.transformer.register_forward_pre_hook(hook)
        return pipe

    command = ("calibrate", "tiny", *QUICK, *PROMPTS)
    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "load_pipeline", interrupted)
        assert main([*map(str, command), "--json"]) == 130
    assert sorted(path.name for path in models.iterdir()) == ["scores.json"]
    assert len(ScoreTable.load("scores.json").runs) == 1
    assert run(*command)[0] == 0
    resumed = ScoreTable.load("scores.json")
    assert run(*command, "--table", "straight.json")[0] == 0
    straight = ScoreTable.load("straight.json")
    assert resumed.runs == straight.runs
    assert (resumed.count == straight.count).all()
    assert np.allclose(resumed.mean, straight.mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("tiny", ("--prompt", "cat"), "calibration needs at least 2 different prompts, got 1"),
        ("plain", PROMPTS, "PlainPipeline has no attention to quantize"),
        ("deeper", PROMPTS, "the score table belongs to another model: 1 layers here are unknown"),
        ("tiny", (*PROMPTS, "--steps", "4"), "other settings: num_inference_steps 3, now 4"),
        ("tiny", (*PROMPTS, "--floor", "500", "--card", "x.json"), "no cost of int8/fp8-fast"),
        ("tiny", (*PROMPTS, "--budget", "0.01"), "no plan takes 0.010 of FP16's time, the fastest"),
        ("tiny", (*PROMPTS, "--card", "y.json"), "'int9/fp8' is not an attention spec"),
        ("tiny", (*PROMPTS, "--card", "z.json"), "costs must name fp16"),
        ("tiny", (*PROMPTS, "--table", "broken.json"), "broken.json: is not JSON"),
        ("tiny", (*PROMPTS, "--table", "plan.json"), "plan.json: is not a score table"),
        ("tiny", (*PROMPTS, "--table", "later.json"), "score table of version 9, this program"),
    ],
)
def test_calibrate_errors(run, calibrated, model, arguments, message):
    (calibrated / "x.json").write_text('{"fp16": 8}')
    (calibrated / "y.json").write_text('{"fp16": 8, "int9/fp8": 4}')
    (calibrated / "z.json").write_text('{"int8/fp8": 4}')
    (calibrated / "broken.json").write_text('{"version": 1, "specs"')
    (calibrated / "later.json").write_text('{"version": 9}')
    kept = {path.name: path.read_bytes() for path in calibrated.iterdir()}
    code, document = run("calibrate", model, *QUICK, *arguments)
    assert code == 1 and message in document["error"]
    assert {path.name: path.read_bytes() for path in calibrated.iterdir()} == kept


def test_a_floor_that_no_plan_meets_says_the_best_reachable():
    from sage_diffusion import make_plan
    from sage_diffusion.adapt.costs import card_costs
    from sage_diffusion.adapt.planner import Unreachable

    specs = ["int8/fp8-fast", "int4/fp8-fast"]
    assert main(["calibrate", "tiny", *QUICK, *PROMPTS]) == 0
    table, costs = ScoreTable.load("scores.json"), card_costs("rtx4090", math.inf)
    best = make_plan(table, budget=1, costs=costs, specs=specs).quality
    with pytest.raises(Unreachable, match=f"no plan keeps 90.0 dB, the best .* is {best:.1f} dB"):
        make_plan(table, floor=90, costs=costs, specs=specs)


def test_calls_too_short_to_gain_are_said_to_be(run):
    """The model's have 64 tokens."""
    short = [text for text in QUICK if text not in LOOPS]
    code, document = run("calibrate", "tiny", *short, *PROMPTS)
    assert code == 0 and document["share"]["fp16"] == 1
    assert document["note"].startswith("no spec is predicted to make these calls faster on rtx4090")
    code, document = run("calibrate", "tiny", *short, *PROMPTS, "--tokens", "16384")
    assert code == 0 and document["share"]["fp16"] < 1 and "note" not in document
    assert document["calibration"]["tokens"] == 16384
    code, document = run("calibrate", "tiny", *QUICK, *PROMPTS, "--floor", "120")
    assert document["note"] == "nothing but fp16 is predicted to keep 120 dB"
    code, document = run("calibrate", "tiny", *QUICK, *PROMPTS, "--floor", "nan")
    assert code == 1 and document["error"] == "floor must be a number, got nan"


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("deeper", (), "the plan does not belong to this model: 1 layers here are unknown"),
        ("tiny", ("--spec", "int9/fp8"), "'int9/fp8' is not an attention spec"),
        ("tiny", ("--spec", "int8/fp8", "--card", "a100"), "no cost of int8/fp8 is known"),
        ("tiny", ("--card", "a100"), "is known for this card"),
        ("tiny", ("--table", "scores.json"), "--table is for plots: give --out as well"),
        ("tiny", ("--prompt", "cow"), "a class label must be one of cat, dog, bird"),
    ],
)
def test_evaluate_errors(run, calibrated, model, arguments, message):
    code, document = run("evaluate", "plan.json", "--model", model, "--steps", 3, *arguments)
    assert code == 1 and message in document["error"]


def test_plans_of_one_name_are_all_evaluated(run):
    for folder, spec in (("a", "int8/fp8"), ("b", "int4/int8")):
        PrecisionPlan(spec).save(f"{folder}/plan.json")
    command = ("evaluate", "a/plan.json", "b/plan.json", "--model", "tiny", "--steps", 2)
    code, document = run(*command, "--spec", "int8/fp8", "--prompt", "cat")
    assert code == 0
    assert set(document["plans"]) == {"a/plan.json", "b/plan.json"}


def test_validate_refuses_a_plan_that_was_calibrated_elsewhere(run, calibrated):
    assert run("plan", "validate", "plan.json", "--model", "tiny")[0] == 0
    plan = PrecisionPlan.load("plan.json")
    PrecisionPlan("int8/fp8", fingerprint={**plan.fingerprint, "model": "Flux"}).save("flux.json")
    code, document = run("plan", "validate", "flux.json", "--model", "tiny")
    assert code == 1
    assert "made for Flux, this is DiTTransformer2DModel" in document["error"]
