"""The first run on a card: tiny, on the CPU, and what it does with what fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

from from_file import benchmark

from sage_diffusion.verify import places

first_gpu, first_gpu_model = benchmark("first_gpu"), benchmark("first_gpu_model")

ROOT = Path(__file__).parent.parent
TINY = ["--emulate", "sm_90", "--spec", "int8/fp8"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder, and memory without the tests' poison."""
    monkeypatch.undo()
    return tmp_path


def run(out, *more):
    code = first_gpu.main([*TINY, "--out", str(out), *more])
    (path,) = out.glob("emulated-sm-90-*.json")
    return code, json.loads(path.read_text(), parse_constant=pytest.fail)


def test_every_section_runs(out, capsys):
    code, found = run(out)
    printed = capsys.readouterr().out
    assert code == 0 and found["problems"] == []
    assert {v["kernel"] for v in found["verify"]["verdicts"]} == {
        *("rows int8", "value fp8", "triton int8/fp8", "hopper int8/fp8")
    }
    timed = {row["kernel"]: row for row in found["apart"]}
    assert timed["hopper int8/fp8"]["kernel_ms"] > 0 and timed["sdpa-flash"]["milliseconds"] > 0
    for name, causal in (("bench 64", False), ("bench 64 causal", True)):
        assert [(r["spec"], r["length"], r["is_causal"]) for r in found[name]] == [
            (spec, length, causal) for length in (64, 96) for spec in ("fp16", *["int8/fp8"] * 2)
        ]
        assert all(row["status"] == "measured" for row in found[name])
    quantized = found["model"]["int8/fp8"]
    assert quantized["ran"] == {"int8/fp8 on reference": 4} and quantized["declined"] == {}
    assert 0 < quantized["relative_l1"] < 0.05
    assert set(found["overhead"]) == {"sdpa", "int8/fp8", "int8/fp8, session"}
    assert all(row["same_bits"] for row in found["graphs"].values())
    assert {row["graphs"] for row in found["compile"].values()} == {1}
    assert "0 problems" in printed and "hopper int8/fp8" in printed
    assert found["machine"]["emulated"] and "commit" in found["machine"]


def test_a_section_that_fails_is_a_line_and_the_next_one_runs(out, capsys, monkeypatch):
    def broken(state):
        raise ZeroDivisionError("in /home/ann/x.py")

    monkeypatch.setattr(first_gpu_model, "forward", broken)
    code, found = run(out, "--section", "model", "--section", "overhead")
    assert found["problems"] == [{"section": "model", "reason": "ZeroDivisionError: in x.py"}]
    assert code == 0 and "overhead" in found and "1 problems" in capsys.readouterr().out


def test_an_interrupt_ends_the_run_with_what_there_is(out, capsys, monkeypatch):
    def slow(state):
        raise KeyboardInterrupt

    monkeypatch.setattr(first_gpu_model, "overhead", slow)
    _, found = run(out, *(f"--section={name}" for name in ("model", "overhead", "graphs")))
    assert "sdpa" in found["model"] and "graphs" not in found
    assert found["problems"] == [{"section": "overhead", "reason": "interrupted"}]
    assert "1 problems" in capsys.readouterr().out


def test_no_section_begins_when_time_is_up(out):
    _, found = run(out, "--seconds", "0")
    assert {entry["reason"] for entry in found["problems"]} == {"no time left"}
    assert "verify" not in found


def test_a_wrong_kernel_is_not_timed(out, monkeypatch):
    real = first_gpu.run.combine

    def combine(verdicts, kernels):
        found = real(verdicts, kernels)
        wrong = first_gpu.run.replace
        return [wrong(v, status="wrong") if v.kernel.startswith("triton") else v for v in found]

    monkeypatch.setattr(first_gpu.run, "combine", combine)
    code, found = run(out, "--section", "verify", "--section", "apart")
    assert code == 1
    assert not [row for row in found["apart"] if row["kernel"].startswith("triton")]


def test_without_a_card_it_says_what_to_do(monkeypatch, capsys):
    def card(device=None):
        raise places.PlaceError("no card can be used: Found no NVIDIA driver on your system.")

    monkeypatch.setattr(places, "card", card)
    assert first_gpu.main([]) == 1
    assert capsys.readouterr().err == (
        "first_gpu: no card can be used: Found no NVIDIA driver on your system.\n"
    )


def test_files_are_named_after_the_card():
    assert first_gpu.file_name("NVIDIA GeForce RTX 4090").startswith("rtx-4090-20")
    assert first_gpu.file_name("NVIDIA H100 80GB HBM3").startswith("h100-80gb-hbm3-20")


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
def test_the_script(tmp_path):
    """Without an installation of the package: only what the checkout and the Python hold."""
    command = ["tools/first_gpu.sh", *TINY, "--section", "overhead", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "int8/fp8, session" in done.stdout and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
def test_the_script_says_what_is_missing(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "PYTHONPATH": ""}
    done = subprocess.run(
        ["tools/first_gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "not installed: torch, triton, numpy, pydantic; put the wheels into .whl/" in done.stderr
