"""Launches: chosen by time or by prediction, stored, validated, and used by the kernels."""

import json
import logging

import pytest
import torch

from sage_diffusion import AttentionSpec, cli
from sage_diffusion.attend import backends, launches
from sage_diffusion.attend.launches import Entry, TableError
from sage_diffusion.kernels.attention import gluon_support, tuning
from sage_diffusion.kernels.attention.tuning import Launch
from sage_diffusion.machine import version
from sage_diffusion.speed import timing, tune
from sage_diffusion.speed.timing import Card, Timing
from sage_diffusion.speed.tune import Trial, best_bound

INT8 = AttentionSpec.parse("int8/fp8")
CPU = torch.device("cpu")
TRITON = tuning.KERNELS


def entry(**changes):
    fields = {
        "gpu": "cpu",
        "triton": version("triton") or "unknown",
        "arch": "cpu",
        "backend": "triton",
        "formats": "int8/fp8",
        "head_dim": 64,
        "launch": {"block_m": 64, "num_warps": 8, "num_stages": 2},
        "source": "measured",
        "value": 1.5,
    }
    return Entry(**{**fields, **changes})


def test_a_table_is_written_merged_and_read(tmp_path):
    path = tmp_path / "new" / "tuning.json"
    assert launches.read(path) == []
    launches.write(path, [entry(), entry(head_dim=128)])
    launches.write(path, [entry(value=1.0), entry(gpu="other")])
    values = [(e.gpu, e.head_dim, e.value) for e in launches.read(path)]
    assert values == [("cpu", 64, 1.0), ("cpu", 128, 1.5), ("other", 64, 1.5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "{", "is not JSON: Expecting property name"),
        (lambda d: json.dumps({**d, "version": 2}), "version: input should be 1, got 2"),
        (lambda d: json.dumps({**d, "more": 1}), "more: unknown key"),
        (
            lambda d: json.dumps(d).replace('"block_m": 64', '"block_m": 0'),
            r"entries\[0\].launch.block_m: input should be greater",
        ),
        (lambda d: json.dumps({**d, "version": True}), "version: must be 1, got True"),
        (lambda d: json.dumps(d).replace("1.5", "NaN"), r"entries\[0\].value must be a finite"),
        (lambda d: json.dumps(d).replace("1.5", '"1.5"'), r"entries\[0\].value: .* got '1.5'"),
        (lambda d: json.dumps(d).replace("1.5", "9" * 5000), r"entries\[0\].value must be a fin"),
        (
            lambda d: json.dumps(d).replace("1.5", "[" * 20_000),
            r"entries\[0\].value\[0\].* at most",
        ),
        (lambda d: json.dumps({**d, "k" * 10**6: 1}), "kkk.*: unknown key"),
    ],
)
def test_a_broken_table_is_ignored_with_one_warning_and_kept(tmp_path, change, message, caplog):
    path = tmp_path / "tuning.json"
    launches.write(path, [entry()])
    text = change(json.loads(path.read_text()))
    path.write_text(text)
    with pytest.raises(TableError, match=message):
        launches.write(path, [entry()])
    assert path.read_text() == text
    launches.user_entries.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert launches.user_entries(path) == launches.user_entries(path) == ()
    launches.user_entries.cache_clear()
    (record,) = caplog.records
    assert "the built-in launches are used" in record.message and str(path) in record.message


def test_lookup_prefers_what_was_measured_on_this_card(monkeypatch):
    monkeypatch.setattr(
        launches, "device_name", lambda device: "NVIDIA GeForce RTX 4090 Laptop GPU"
    )
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_89")
    predicted = entry(
        gpu="rtx4090",
        arch="sm_89",
        source="predicted bound",
        launch={"block_m": 128, "num_warps": 4, "num_stages": 4},
    )
    measured = entry(gpu="NVIDIA GeForce RTX 4090 Laptop GPU", arch="sm_89")
    desktop = entry(gpu="NVIDIA GeForce RTX 4090", arch="sm_89")
    find = lambda *entries: launches.lookup(list(entries), TRITON)(CPU, INT8, 64)  # noqa: E731
    assert find(measured, predicted) == find(predicted, measured) == Launch(64, 8, 2)
    assert find(desktop, predicted) == Launch(128, 4, 4)
    assert find(desktop) is None
    assert find(entry(gpu="h100", arch="sm_89", source="predicted bound")) is None
    tuned = launches.lookup([measured], TRITON)
    assert tuned(CPU, INT8, 128) is None
    assert tuned(CPU, AttentionSpec.parse("int8/fp8-fast"), 64) is None
    assert tuned(CPU, AttentionSpec.parse("int8/fp8+rotate"), 64) == Launch(64, 8, 2)
    assert launches.lookup([measured], gluon_support.KERNELS) is None
    assert launches.lookup([entry(triton="1.0")], TRITON) is None


def test_a_launch_with_other_knobs_is_not_used_and_said_so(caplog):
    """Of another version of this package, say."""
    with caplog.at_level(logging.WARNING):
        assert launches.lookup([entry(launch={"rows": 64, "num_warps": 8})], TRITON) is None
    (record,) = caplog.records
    assert "must have block_m, num_warps, num_stages, got rows, num_warps" in record.getMessage()


def test_what_belongs_to_the_architecture_stays():
    knobs = {"block_m": 64, "num_warps": 8, "num_stages": 2}
    assert launches.as_launch(TRITON, "sm_80", 64, knobs).shift
    assert not launches.as_launch(TRITON, "sm_89", 64, knobs).shift


def test_a_backend_hands_the_users_table_to_its_kernel(monkeypatch):
    monkeypatch.setattr(launches, "user_entries", lambda: (entry(),))
    seen = {}
    launches.bound(lambda *args, tuned=None: seen.update(tuned=tuned), TRITON)()
    assert seen["tuned"](CPU, INT8, 64) == Launch(64, 8, 2)
    monkeypatch.setattr(launches, "user_entries", lambda: ())
    assert launches.bound(print, TRITON) is print
    pytest.importorskip("triton")
    record = next(b for b in backends.BACKENDS if b.name == "triton")
    monkeypatch.setattr(launches, "user_entries", lambda: (entry(),))
    assert record.load().args[0].keywords["tuned"](CPU, INT8, 64) == Launch(64, 8, 2)


@pytest.mark.parametrize(("block", "warps"), [(64, 4), (128, 4)])
def test_the_kernel_runs_with_the_launch_that_it_is_handed(block, warps):
    triton = pytest.importorskip("sage_diffusion.kernels.attention.triton")
    from helpers import biased, card

    q, k, v = biased(1, 1, 130, 64, seed=0)
    asked = []

    def tuned(*key):
        asked.append(key)
        return Launch(block, warps, 2)

    with card(89) as driver:
        out, _ = triton.attention(q, k, v, INT8, tuned=tuned)
        plain, _ = triton.attention(q, k, v, INT8)
    assert asked == [(CPU, INT8, 64)]
    grids = [grid[0] for name, grid in driver.launches if name == "_attention_fwd_kernel"]
    assert grids == [-(-130 // block), 2]
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)


class Clock:
    """Takes as long as the call that ran last says."""

    def __init__(self):
        self.now = 0.0

    def __call__(self, call):
        call()
        return Timing((self.now,), None)


def test_the_fastest_right_launch_wins():
    errors = pytest.importorskip("triton.runtime.errors")
    clock = Clock()

    def run(q, k, v, spec, launch):
        clock.now = 10.0 - launch.num_stages - launch.num_warps / 8
        if launch.num_stages == 4:
            raise errors.OutOfResources(2, 1, "shared memory")
        return q * (2.0 if launch.num_warps == 8 and launch.block_m == 64 else 1.0)

    choice = tune.measure(
        "triton", INT8, 72, Card("tiny", CPU, clock), arch="sm_89", run=run, tokens=8, heads=1
    )
    assert choice.head_dim == 128
    assert choice.best.launch == {"block_m": 128, "num_warps": 8, "num_stages": 3}
    assert choice.best.value == 6.0
    built_in = [trial for trial in choice.trials if trial.built_in]
    assert built_in == [choice.trials[0]]
    assert built_in[0].launch == launches.knobs_of(TRITON, tuning.launch("sm_89", 128))
    notes = {tuple(t.launch.values()): t.note for t in choice.trials if t.value is None}
    assert set(notes) == {(b, w, 4) for b in (64, 128) for w in (4, 8)} | {(64, 8, 2), (64, 8, 3)}
    assert "shared memory" in notes[64, 4, 4] and "something else" in notes[64, 8, 2]


def test_candidates():
    for arch, dim in [("sm_80", 64), ("sm_89", 256), ("gfx942", 128)]:
        found = tune.candidates("triton", arch, dim)
        assert found[0] == tuning.launch(arch, dim) and len(found) == len(set(found)) >= 6
        assert all(128 % c.block_m == 0 and c.shift == (arch == "sm_80") for c in found)
        assert arch != "gfx942" or {c.num_stages for c in found} == {1}
    spec = AttentionSpec.parse("int8/int8")
    first = tune.candidates("triton", "sm_80", 128, spec)[0]
    assert first == tuning.launch("sm_80", 128, pv="int8") != tuning.launch("sm_80", 128)
    assert all(c.stages in (2, 4) for c in tune.candidates("gluon", "sm_89", 128))
    found = tune.candidates("hopper", "sm_90", 128)
    assert len(found) == 5 and all(c.num_warps % 4 == 0 and c.stages in (2, 4) for c in found)
    assert {c.registers for c in found} == {128, 168, 255}


def test_the_best_bound():
    def trial(cycles, second, built_in=False):
        return Trial({}, cycles, second, built_in=built_in)

    slow, busy, free, shipped = (
        trial(300, 0.1),
        trial(256, 0.9),
        trial(257, 0.7),
        trial(258, 0.705, True),
    )
    assert best_bound([slow, busy, free]) is free
    assert best_bound([slow, busy, free, shipped]) is shipped
    assert best_bound([slow, trial(None, None)]) is slow
    assert best_bound([]) is None


def test_what_ships_is_what_the_cost_model_chooses(monkeypatch):
    pytest.importorskip("triton")
    shipped = tuning.launch("sm_89", 128)
    monkeypatch.setattr(
        tune, "candidates", lambda *_: [shipped, Launch(64, 8, 2), Launch(128, 4, 2)]
    )
    choice = tune.predict("triton", AttentionSpec.parse("int8/fp8-fast"), 128, "rtx4090")
    first, small, few = choice.trials
    assert choice.best is first and first.built_in and first.value == 256
    # K and V are read twice as often: 1.6 times the cycles, 1.45 as Triton 3.7 compiles it.
    assert small.value > 1.4 * first.value
    assert few.value is None and few.note.startswith("spills")


def test_a_prediction_is_stored_under_its_own_name(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "candidates", lambda *_: [tuning.launch("sm_80", 64)])
    path = tmp_path / "tuning.json"
    options = ["tune", "--predict", "--gpu", "a100", "--backend", "triton", "--head-dim", "64"]
    options += ["--spec", "int8/int8", "--spec", "int8/fp8", "--table", str(path), "--json"]
    assert cli.main([*options, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] is None and not path.exists()
    assert cli.main(options) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["label"] == "predicted bound" and document["table"] == str(path)
    assert document["refused"] == {"triton int8/fp8 64": "fp8 needs sm_89 or newer, found sm_80"}
    (stored,) = launches.read(path)
    assert (stored.gpu, stored.arch, stored.source) == ("a100", "sm_80", "predicted bound")
    assert stored.formats == "int8/int8" and stored.launch == document["kernels"][0]["best"]
    assert cli.main([*options[:-1], "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "a100 (predicted bound)" in printed and "cycles >=" in printed and "*=" in printed


def test_a_card_is_measured_and_its_table_protected(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    clock = Clock()

    def attend(backend, q, k, v, spec, launch):
        clock.now = float(launch.block_m)
        return q

    monkeypatch.setattr(tune, "TOKENS", 64)
    monkeypatch.setattr(tune, "_attend", attend)
    monkeypatch.setattr(timing, "find_card", lambda: Card("Tiny GPU", CPU, clock))
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_89")
    path = tmp_path / "tuning.json"
    options = ["tune", "--backend", "triton", "--spec", "int8/fp8", "--head-dim", "64"]
    options += ["--table", str(path)]
    assert cli.main(options) == 0
    assert "Tiny GPU (measured)" in capsys.readouterr().out
    (stored,) = launches.read(path)
    assert (stored.gpu, stored.source, stored.value) == ("Tiny GPU", "measured", 64.0)
    path.write_text("[]")
    assert cli.main(options) == 1
    assert "is no table of launches" in capsys.readouterr().err and path.read_text() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no CUDA or ROCm device is here to measure on; --predict --gpu"),
        (["--predict"], "--predict needs --gpu, one of rtx2080ti"),
        (["--gpu", "a100"], "--gpu needs --predict"),
        (["--predict", "--gpu", "rtx1"], "gpu must be one of"),
        (["--backend", "sdpa"], "backend must be one of gluon, hopper, triton, got 'sdpa'"),
        (["--predict", "--gpu", "rtx2080ti", "--dry-run"], "Triton needs sm_80 or newer"),
    ],
)
def test_wrong_usage(options, message, capsys, monkeypatch):
    monkeypatch.setattr(timing, "find_card", lambda: None)
    assert cli.main(["tune", *options, "--json"]) == 1
    assert message in json.loads(capsys.readouterr().out)["error"]
