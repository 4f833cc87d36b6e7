"""Workflows are what ``tools/templates.py`` writes with today's nodes and cost table."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tools"))

import templates  # noqa: E402


@pytest.mark.parametrize("name", templates.ENTRIES)
def test_a_workflow_is_what_the_tool_writes(name):
    text = (ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")
    assert templates.template(name).to_json() == text, "run tools/templates.py"
