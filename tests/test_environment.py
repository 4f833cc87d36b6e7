"""`tools/environment.py`: whose PyTorch an environment gets."""

import re
import subprocess
import sys
import venv
from importlib.metadata import version

import pytest
from from_file import ROOT, from_file

from sage_diffusion.attend.installation import TRITON_OF_TORCH

environment = from_file("tools/environment.py")


@pytest.fixture
def pip(monkeypatch):
    """pip's arguments, call by call; the missing Triton is 3.7.  Nothing is installed."""
    calls = []

    def run(command, **options):
        if "-m" not in command:
            return subprocess.CompletedProcess(command, 0, "triton==3.7.*\n", "")
        assert tuple(command[1:5]) == environment.PIP
        calls.append(command[5:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environment.subprocess, "run", run)
    monkeypatch.setattr(environment.venv, "create", lambda *args, **options: None)
    return calls


PACKAGE = ["-e", f"{ROOT}[dev]"]
MODEL = ["--no-deps", *environment.NO_DEPS]


def test_a_torch_at_hand_comes_before_the_index(pip, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "parent_torch", lambda: None)
    environment.make(tmp_path, "", [])
    at_hand = ["--no-index", "--no-deps", "torch"]
    assert pip == [at_hand, ["torch"], PACKAGE, MODEL, ["triton==3.7.*"]]


def test_a_torch_that_is_named_is_taken_with_its_limits(pip, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "parent_torch", lambda: None)
    environment.make(tmp_path, "torch==2.10.0", ["oldest.txt"])
    limits = ["--constraint", "oldest.txt"]
    assert pip[0] == [*limits, "torch==2.10.0"]
    assert all(call[:2] == limits for call in pip)


def test_a_python_that_has_torch_is_built_upon(tmp_path):
    folder = tmp_path / "new"
    venv.create(folder)
    environment.share(folder)
    code = "import importlib.metadata as m, sys; print(m.version('torch'), sys.prefix)"
    done = subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [version("torch"), str(folder)]


@pytest.mark.parametrize(
    ("python", "torch", "said"),
    [
        ((3, 14, 0), None, r"needs Python 3.10 to 3.13, .* make PYTHON="),
        ((3, 9, 18), None, r"needs Python 3.10 to 3.13"),
        ((3, 12, 1), (2, 8), r"needs torch 2.\d+ or newer, .* has 2.8: upgrade it there"),
    ],
)
def test_one_line_where_a_python_will_not_do(monkeypatch, python, torch, said):
    monkeypatch.setattr(environment.sys, "version_info", python)
    monkeypatch.setattr(environment, "parent_torch", lambda: torch)
    with pytest.raises(SystemExit, match=said) as caught:
        environment.check_this_python()
    assert "\n" not in caught.value.code


def test_what_pip_says_is_enough(monkeypatch):
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(SystemExit) as caught:
        environment.run(failing)
    assert caught.value.code == 3


def test_the_oldest_set_holds_every_floor():
    """`tests/versions/oldest.txt` and the Makefile pin what pyproject.toml admits at least."""
    project = (ROOT / "pyproject.toml").read_text()
    users = project.split("dev = [")[0]
    floors = dict(re.findall(r'"([\w-]+)>=([\d.]+)["; ]', users.split("dependencies = [")[1]))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", _oldest(), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    pinned |= dict(re.findall(r"^TORCH_oldest := (torch)==([\d.]+)$", makefile, re.MULTILINE))
    torch = tuple(int(part) for part in pinned["torch"].split(".")[:2])
    for name in ("triton", "triton-windows"):
        pinned[name] = "{}.{}".format(*TRITON_OF_TORCH[torch])
    assert set(floors) <= set(pinned)
    for name, floor in floors.items():
        assert pinned[name].startswith(floor), name
    assert f'requires-python = ">={_python(makefile, "oldest")}' in project


def _oldest():
    return (ROOT / "tests" / "versions" / "oldest.txt").read_text()


def _python(makefile, versions):
    return re.search(rf"^PYTHON_{versions} := python([\d.]+)$", makefile, re.MULTILINE)[1]
