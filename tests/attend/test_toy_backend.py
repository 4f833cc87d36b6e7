"""A new backend is its own file and one line of ``BACKENDS``: everything else finds it there."""

import json

import pytest
import torch
from toy_backend import TOY, ToyLaunch

from sage_diffusion import AttentionSession, AttentionSpec, cli, machine
from sage_diffusion.attend import backends, launches
from sage_diffusion.attend.calls import AttentionCall, Call
from sage_diffusion.speed import bench
from sage_diffusion.verify.kernels import Kernel, find

SPEC = AttentionSpec.parse("int8/int8+block")
ON_ADA = AttentionCall.typical(SPEC, "sm_89")


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    """The line; "auto" asks the newcomer first."""
    monkeypatch.setattr(backends, "BACKENDS", (TOY, *backends.BACKENDS))
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


def test_auto_and_its_name_choose_it():
    pytest.importorskip("triton")
    assert backends.select(ON_ADA).name == backends.select(ON_ADA, "toy").name == "toy"
    assert backends.select(AttentionCall.typical(AttentionSpec.parse("int8/int8"), "sm_89")) != TOY
    assert AttentionSession("int8/int8", backend="toy").backend == "toy"
    with pytest.raises(ValueError, match="must be one of auto, toy, gluon"):
        AttentionSession("int8/int8", backend="toys")


def test_without_triton_it_is_listed_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(machine, "triton_version", lambda: None)
    assert "toy" in backends.names()
    assert "triton is not installed: pip install" in backends.refusals(ON_ADA)["toy"]


def test_the_doctor_lists_it(capsys):
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["backends"][0] == {"name": "toy", "describes": "a toy"}
    reason = document["specs"]["int8/int8"]["refusals"]["toy"]
    assert reason == "needs a CUDA device, the tensors are on cpu"


def test_bench_times_it_and_predicts_its_bound(capsys):
    pytest.importorskip("triton")
    assert "toy" in [entrant.backend for entrant in bench.contestants([SPEC])]
    options = ["--gpu", "a100", "--spec", str(SPEC), "--head-dim", "64", "--length", "1024"]
    assert cli.main(["bench", *options, "--backend", "toy", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["backend"] == "toy" and row["tops"] > 50


def test_tune_tries_its_launches_and_its_kernels_use_them(capsys, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    table = tmp_path / "tuning.json"
    options = ["--predict", "--gpu", "a100", "--spec", str(SPEC), "--head-dim", "64"]
    assert cli.main(["tune", *options, "--backend", "toy", "--table", str(table), "--json"]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    tried = [trial["launch"] for trial in kernel["trials"]]
    assert tried == [{"warps": 4, "depth": 2}, {"warps": 8, "depth": 2}]
    (stored,) = launches.read(table)
    assert stored.backend == "toy" and stored.launch == kernel["best"]
    monkeypatch.setattr(launches, "user_entries", lambda: (stored,))
    monkeypatch.setattr(launches.tuning, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(launches, "device_name", lambda device: "NVIDIA A100")
    tuned = TOY.load().args[0].keywords["tuned"]
    assert tuned(torch.device("cpu"), SPEC, 64) == ToyLaunch(**stored.launch)


def test_verify_checks_it():
    pytest.importorskip("triton")

    class Place:
        def call(self, spec, case):
            return AttentionCall.typical(spec, "sm_89", case.head_dim)

    found, refused = find(Place(), (str(SPEC), "int8/fp8"), ("toy",))
    assert found == [Kernel("toy", SPEC)] and "toy int8/fp8" in refused
    assert (found[0].permuted, found[0].tile) == (False, 64)


def test_it_computes_what_the_twin_does():
    pytest.importorskip("triton")
    from helpers import biased, card

    q, k, v = biased(1, 2, 70, 64, seed=0)
    expected, _ = backends.load(backends.named("reference"))(Call(q, k, v), SPEC, False)
    with card(80):
        out, _ = backends.load(TOY)(Call(q, k, v), SPEC, False)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)
