"""Evaluation on held-out runs, the commands and the plots."""

import json

import pytest
from adapt_host import LOOPS, TinySampler
from tiny_emoji import tiny_emoji

from sage_diffusion.accuracy.compare import Generation
from sage_diffusion.adapt.calibrate import calibrate
from sage_diffusion.adapt.costs import CostTableError
from sage_diffusion.adapt.evaluate import evaluate, first_last_rules
from sage_diffusion.adapt.planner import make_plan
from sage_diffusion.adapt.plots import calibration_plots, latent_cosines, pareto
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.cli import main
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler, class_batches
from sage_diffusion.plan import PlanError, PrecisionPlan

#: Balance would heal the poisoned layer.
SPECS = ("int8/fp8-fast-balance", "int4/fp8-fast-balance")


class Host(TinySampler):
    def generate(self, session, prompt, seed):
        self.session = session
        out = self.sample(prompt, seed)
        return Generation(latents=(out,))


@pytest.fixture(scope="module")
def calibrated():
    host = Host(layers=5, poison=2)
    table = calibrate(host, ["a", "bb"], specs=SPECS, rows=16, share=0.5, sensitivity=1)
    return host, table


def test_an_adaptive_plan_beats_first_and_last_steps(calibrated, tmp_path):
    host, table = calibrated
    made = make_plan(table, budget=0.2149, costs=LOOPS)
    pairs = [("held-out", 7), ("another one", 8)]
    found = evaluate(host.generate, pairs, {"mine": made.plan}, uniform=SPECS, costs=LOOPS)
    data = json.loads(json.dumps(found.to_dict()))
    assert set(data["uniform"]) == set(SPECS)
    assert len(data["first_last"]) == 3 or len(data["first_last"]) == 2
    low = data["uniform"][SPECS[1]]
    assert low["predicted_time"] == round(200 / 1024, 4)  # head_dim 32
    assert low["below_8_bit"] == 1
    adaptive = data["adaptive"]
    assert adaptive["predicted_time"] == pytest.approx(made.time, abs=1e-4)
    assert adaptive["psnr"] > low["psnr"] + 5
    for rule in data["first_last"].values():
        assert rule["predicted_time"] <= adaptive["predicted_time"]
    # Some rules are as good: they have other signs at every step.
    assert adaptive["psnr"] > min(rule["psnr"] for rule in data["first_last"].values())
    assert abs(adaptive["psnr"] - made.quality) < 6
    pareto(found, tmp_path / "pareto.png")
    latent_cosines(found, tmp_path / "latents.png")
    calibration_plots(table, made.plan, tmp_path)
    heats = [f"heat-{name.replace('/', '-')}" for name in SPECS]
    assert {path.stem for path in tmp_path.iterdir()} == {
        "pareto",
        "latents",
        "layers",
        "why",
        *heats,
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_fp16_is_exact_and_takes_the_whole_time(calibrated):
    host, _ = calibrated
    found = evaluate(host.generate, [("x", 1)], {"exact": "fp16"}, uniform=())
    assert found.scored[0].psnr == float("inf")
    assert found.to_dict()["adaptive"]["psnr"] is None
    assert found.scored[0].predicted_time == pytest.approx(1)
    assert not found.of_kind("first_last")


def test_runs_that_exist_are_not_repeated(calibrated):
    host, _ = calibrated
    pairs, plans = [("x", 1), ("y", 2)], {"mine": "int4/fp8-fast"}
    straight = evaluate(host.generate, pairs, plans, uniform=SPECS)
    made = {
        name: [host.generate(AttentionSession(name), *pair) for pair in pairs] for name in SPECS
    }
    before = host.runs
    found = evaluate(host.generate, pairs, plans, uniform=SPECS, made=made)
    assert found == straight
    again = len(found.scored) - len(SPECS) + 1  # and FP16
    assert host.runs - before == again * len(pairs)


def test_first_last_rules_stay_within_the_time(calibrated):
    _, table = calibrated
    rules = first_last_rules(table, SPECS, {"fp16": 8, SPECS[0]: 4, SPECS[1]: 3}, 0.44)
    assert list(rules) == [
        "int8/fp8-fast-balance first 0 last 4, int4/fp8-fast-balance",
        "int8/fp8-fast-balance first 2 last 2, int4/fp8-fast-balance",
        "int8/fp8-fast-balance first 4 last 0, int4/fp8-fast-balance",
    ]


def test_nothing_to_evaluate(calibrated):
    host, _ = calibrated
    with pytest.raises(ValueError, match="need held-out runs and plans"):
        evaluate(host.generate, [], {"a": "fp16"})
    with pytest.raises(ValueError, match="no attention call reached"):
        evaluate(Host(layers=0).generate, [("a", 0)], {"a": "fp16"})
    with pytest.raises(ValueError, match="'int9/fp8' is not an attention spec"):
        evaluate(host.generate, [("a", 0)], {"a": "fp16"}, uniform=("int9/fp8",))


def test_plans_of_other_models_and_without_costs_are_refused_at_once(calibrated):
    _, table = calibrated
    plan = make_plan(table, budget=0.3, costs=LOOPS).plan
    other = Host(layers=3)
    with pytest.raises(PlanError, match="does not belong to this model: 2 of its layers are not"):
        evaluate(other.generate, [("a", 0), ("b", 0)], {"mine": plan})
    assert other.runs == 1
    host = Host(layers=5)
    with pytest.raises(CostTableError, match="no cost of int8/fp8 is known for this card"):
        evaluate(host.generate, [("a", 0), ("b", 0)], {"x": "int8/fp8"}, costs="a100")
    assert host.runs == 1


def test_a_pipeline_is_sampled_and_left_alone():
    pipe = tiny_emoji()
    sampler = PipelineSampler(pipe, {"num_inference_steps": 4})
    table = calibrate(sampler, [[0, 1], [2, 0]], specs=SPECS, share=1, rows=8, sensitivity=0)
    assert table.layers == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert table.fingerprint["layers"] == table.layers
    assert table.fingerprint["head_dims"] == dict.fromkeys(table.layers, 16)
    assert table.schedule == [1, 0.75, 0.5, 0.25]
    plan = make_plan(table, budget=0.45, costs=LOOPS).plan
    assert plan.fingerprint["model"] == "DiTTransformer2DModel"
    assert PrecisionPlan.from_json(plan.to_json()) == plan


def test_class_batches_are_disjoint():
    class Pipe:
        classes = tuple(range(31))

    seen = [c for batch in class_batches(Pipe, 4, 4) for c in batch]
    held = [c for batch in class_batches(Pipe, 3, 4, 4) for c in batch]
    assert len(seen) == 16
    assert len(held) == 12
    assert not set(seen) & set(held)


def test_the_commands_from_calibration_to_proof(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from sage_diffusion.integrations.diffusers import pipelines

    monkeypatch.setattr(pipelines, "load_pipeline", lambda name: tiny_emoji())
    arguments = ["calibrate", "bundled", "--steps", "4", "--share", "1", "--rows", "8"]
    arguments += ["--spec", "int8/fp8-fast", "--spec", "int4/fp8-fast", "--sensitivity", "1"]
    assert main([*arguments, "--plots", "plots", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["predicted_time"] <= 0.2149
    assert sum(data["share"].values()) == pytest.approx(1, abs=1e-3)
    assert ScoreTable.load("scores.json").sensitivity is not None
    plan = PrecisionPlan.load("plan.json")
    assert plan.calibration["asked"] == {"budget": 0.2148}
    assert sorted(p.name for p in (tmp_path / "plots").iterdir())[0] == "heat-int4-fp8-fast.png"

    prove = ["evaluate", "plan.json", "--steps", "4", "--spec", "int4/fp8-fast", "--json"]
    assert main([*prove, "--out", "proof", "--table", "scores.json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["adaptive"]["predicted_time"] <= 0.2149
    assert data["runs"] == 3
    drawn = {"pareto.png", "latents.png", "layers.png", "why.png", "heat-int4-fp8-fast.png"}
    assert drawn <= {p.name for p in (tmp_path / "proof").iterdir()}
    assert len(data["adaptive"]["latent_cosine"]) == 4
    assert data["adaptive"]["frechet"] >= 0

    assert main(["calibrate", "bundled", "--floor", "30", "--budget", "1", "--json"]) == 1
    assert "not both" in json.loads(capsys.readouterr().out)["error"]
    assert main(["evaluate", "--model", "elsewhere"]) == 1
    assert "name at least one plan" in capsys.readouterr().err
