"""``benchmarks.adaptive``: its models, and its figures on an untrained one."""

import json

import numpy as np
import pytest
from from_file import benchmark
from tiny_emoji import tiny_emoji

from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.integrations.diffusers.pipelines import load_pipeline
from sage_diffusion.integrations.diffusers.sampler import class_batches
from sage_diffusion.plan import PrecisionPlan

adaptive = benchmark("adaptive")
stages = benchmark("stages")
TINY = adaptive.Model("tiny", 1, 2, (0,), 1, (7,))


@pytest.mark.parametrize("name", adaptive.MODELS)
def test_held_out_classes_and_seeds_are_others(name):
    model = adaptive.MODELS[name]
    pipe = load_pipeline(model.source)
    seen = {c for b in class_batches(pipe, model.batches, model.batch) for c in b}
    held_out = class_batches(pipe, model.held_out, model.batch, model.batches)
    assert seen and not seen & {c for b in held_out for c in b}
    assert not set(model.seeds) & set(model.held_out_seeds)
    assert sum(len(b) for b in held_out) * len(model.held_out_seeds) >= 16
    assert pipe.transformer.config.attention_head_dim == 64


def test_carried_models_are_small_and_no_part_of_the_package():
    for folder in adaptive.ASSETS.iterdir():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert size < 4 << 20


@pytest.fixture(scope="module")
def done():
    return adaptive.run(TINY, tiny_emoji(), steps=6, sensitivity=1, grouped=2)


def test_figures_are_those_of_the_evaluation(done):
    data = json.loads(json.dumps(adaptive.figures(done)))
    rows = {row["name"]: row for row in data["rows"]}
    kinds = {row["kind"] for row in data["rows"]}
    assert kinds == {"adaptive", "uniform", "first_last"}
    first = data["rows"][0]
    assert first["kind"] == "adaptive" and first["predicted_time"] <= 1.1 * 200 / 1024 + 1e-4
    assert data["above_uniform_db"] == pytest.approx(
        first["psnr"] - rows["int4/fp8-fast"]["psnr"], abs=0.02
    )
    rules = [row["psnr"] for row in data["rows"] if row["kind"] == "first_last"]
    assert data["above_first_last_db"] == pytest.approx(first["psnr"] - max(rules), abs=0.02)
    wanted = data["at_8_bit_quality"]["psnr_wanted"]
    assert wanted == pytest.approx(rows["int8/fp8"]["psnr"] - 1, abs=0.02)
    reached = [r for r in data["rows"] if r["kind"] == "adaptive" and r["psnr"] >= wanted]
    plan = data["at_8_bit_quality"]["plan"]
    assert (plan or {}).get("below_8_bit") == max((r["below_8_bit"] for r in reached), default=None)
    text = adaptive.text_of("tiny", data)
    assert "1 held-out pictures" in text and "adaptive, budget x 1.1" in text
    assert list(data["stages"]) == [
        "local error",
        "groups, multiplicative fit",
        "groups",
        "gradients",
    ]
    assert data["stages"]["gradients"]["psnr"] == pytest.approx(first["psnr"])
    assert "weights from groups: " in text


def test_completions_are_judged_by_the_cells_that_they_were_not_shown(monkeypatch):
    """What returns the truth is perfect, and nothing that was hidden reaches it."""
    table = ScoreTable(("int8/int8", "int4/int8"), 10)
    rng = np.random.default_rng(0)
    for layer, step in np.ndindex(6, 10):
        error = rng.lognormal(size=2)
        table.saw(f"{layer}", step, None, 1.0, 1)
        table.add(f"{layer}", step, None, np.stack([0 * error, error, error], -1))
    truth = np.log(table.metric("error"))

    def perfect(values, known):
        assert known.mean() == pytest.approx(0.25) and not values[~known].any()
        return truth, np.full(truth.shape, 1e-9)

    def level(values, known):
        return np.random.default_rng(1).normal(size=truth.shape), np.zeros(truth.shape)

    monkeypatch.setattr(stages, "COMPLETIONS", {"perfect": perfect, "level": level})
    best, blind = stages.completions(table)  # 12 % are too few cells
    assert (best["rms_db"], best["rank_correlation"], best["coverage"]) == (0, 1, 1)
    assert blind["rms_db"] > 4 and abs(blind["rank_correlation"]) < 0.5 and blind["coverage"] == 0


def test_rank_correlation_of_a_table_with_itself_and_with_another(done):
    assert set(adaptive.rank_correlations(done.whole, done.whole).values()) == {1}
    other = ScoreTable.from_dict(done.whole.to_dict())
    other.mean = other.mean[:, ::-1]
    assert min(adaptive.rank_correlations(other, done.whole).values()) < 1


def test_files_are_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(adaptive, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(adaptive, "load_pipeline", lambda name: tiny_emoji())
    monkeypatch.setattr(adaptive, "BUDGETS", (1.1,))
    adaptive.main(["--out", str(tmp_path), "--sensitivity", "0", "--grouped", "0", "--json"])
    data = json.loads(capsys.readouterr().out)
    folder = tmp_path / "tiny"
    assert json.loads((folder / "figures.json").read_text()) == data["tiny"]
    assert ScoreTable.load(folder / "scores.json").steps == 20
    assert PrecisionPlan.load(folder / "plan.json").calibration["runs"] == 2
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
