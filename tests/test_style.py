"""Lint, format and types are part of the suite."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["tools/typecheck.py"],
    ],
    ids=" ".join,
)
def test_clean(command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_speaks_of_the_project_alone():
    """No machine's paths in tracked files."""
    listed = subprocess.run(
        ["git", "grep", "-lI", "-e", "/work/", "-e", "/root/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert set(listed.stdout.split()) <= {"tests/test_style.py"}
