"""``benchmarks.adaptive``: its models, and its figures on an untrained one."""

import json
from types import SimpleNamespace

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
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adaptive")


@pytest.fixture(scope="module")
def done(folder):
    return adaptive.run(TINY, tiny_emoji(), folder, steps=6, rated=1, grouped=2)


def test_figures_are_those_of_the_evaluation(done):
    data = json.loads(json.dumps(adaptive.figures(done)))
    rows = {row["name"]: row for row in data["rows"]}
    kinds = {row["kind"] for row in data["rows"]}
    assert kinds == {"adaptive", "uniform", "first_last"}
    first = data["rows"][0]
    assert first["kind"] == "adaptive" and first["predicted_time"] <= 1.1 * 200 / 1024 + 1e-4
    against = data["against"]
    assert against["above_uniform_db"] == pytest.approx(
        first["psnr"] - rows["int4/fp8-fast"]["psnr"], abs=0.02
    )
    rules = [row["psnr"] for row in data["rows"] if row["kind"] == "first_last"]
    assert against["above_first_last_db"] == pytest.approx(first["psnr"] - max(rules), abs=0.02)
    wanted = against["at_8_bit_quality"]["psnr_wanted"]
    assert wanted == pytest.approx(rows["int8/fp8"]["psnr"] - 1, abs=0.02)
    reached = [r for r in data["rows"] if r["name"].startswith("budget") and r["psnr"] >= wanted]
    plan = against["at_8_bit_quality"]["plan"]
    assert (plan or {}).get("below_8_bit") == max((r["below_8_bit"] for r in reached), default=None)
    text = adaptive.text_of("tiny", data)
    assert "1 held-out pictures" in text and "adaptive, budget x 1.1" in text


def test_stages_are_compared_at_the_first_budget(done):
    data = adaptive.figures(done)
    first = data["rows"][0]
    assert list(data["stages"]) == [
        *(f"local error, {share:.0%} of the cells" for share in stages.MEASURED),
        "groups, multiplicative fit",
        "groups",
        "gradients, as measured",
        "gradients, fixed width",
        "gradients",
    ]
    assert data["stages"]["gradients"] == first
    for row in data["stages"].values():
        assert row["predicted_time"] <= 1.1 * 200 / 1024 + 1e-4
    text = adaptive.text_of("tiny", data | {"against": None})
    assert "weights from groups: " in text and "groups' fit, ridge " in text


def test_what_was_measured_is_not_measured_again(done, folder):
    class Idle:
        settings, batch = done.measured.usual.settings["sampling"], 1
        model = done.measured.usual.fingerprint["model"]
        session = SimpleNamespace(layers=dict.fromkeys(done.measured.usual.layers))

        def pictures(self, prompt, seed):
            return [(prompt[0], seed)]

    found = stages.measure(
        Idle(),
        class_batches(tiny_emoji(), TINY.batches, TINY.batch),
        TINY.seeds,
        specs=done.measured.usual.specs,
        rated=1,
        grouped=2,
        folder=folder,
    )
    assert found.raw_groups == done.measured.raw_groups
    assert found.raw_gradients == done.measured.raw_gradients


def test_completions_are_judged_by_the_cells_that_they_were_not_shown(monkeypatch):
    """What returns the truth is perfect, and nothing that was hidden reaches it."""
    table = ScoreTable(("int8/int8", "int4/int8"), 16)
    rng = np.random.default_rng(0)
    for layer, step in np.ndindex(5, 16):
        error = rng.lognormal(size=2)
        table.saw(f"{layer}", step, None, 1.0, 1)
        table.add(f"{layer}", step, None, np.stack([0 * error, error, error], -1))
    truth = np.log(table.metric("error"))

    def perfect(values, known):
        assert 10 <= known.sum() <= 20 and not values[~known].any()
        assert known.any(1).all()
        return truth, np.full(truth.shape, 1e-9)

    def level(values, known):
        return np.random.default_rng(1).normal(size=truth.shape), np.zeros(truth.shape)

    monkeypatch.setattr(stages, "COMPLETIONS", {"perfect": perfect, "level": level})
    best, *_, blind = stages.completions(table)
    assert (best["share"], blind["share"]) == (stages.SHARES[0], stages.SHARES[-1])
    assert (best["rms_db"], best["rank_correlation"], best["coverage"]) == (0, 1, 1)
    assert blind["rms_db"] > 4 and abs(blind["rank_correlation"]) < 0.5 and blind["coverage"] == 0


def test_rank_correlation_of_a_table_with_itself_and_with_another(done):
    whole = done.measured.tables[1.0]
    assert set(adaptive.rank_correlations(whole, whole).values()) == {1}
    other = ScoreTable.from_dict(whole.to_dict())
    other.mean = other.mean[:, ::-1]
    assert min(adaptive.rank_correlations(other, whole).values()) < 1


def test_files_are_written(done, monkeypatch, tmp_path, capsys):
    given = {}

    def run(model, pipe, folder, **options):
        given.update(options, folder=folder)
        return done

    monkeypatch.setattr(adaptive, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(adaptive, "load_pipeline", lambda name: None)
    monkeypatch.setattr(adaptive, "run", run)
    adaptive.main(["--out", str(tmp_path), "--rated", "3", "--only-stages", "--json"])
    folder = tmp_path / "tiny"
    assert given == {"rated": 3, "grouped": 8, "only_stages": True, "folder": folder}
    data = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "figures.json").read_text()) == data["tiny"]
    assert PrecisionPlan.load(folder / "plan.json").calibration["runs"] == 2
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
