"""Workflows are what ``tools/templates.py`` writes with today's nodes, and near today's figures."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tools"))

import templates  # noqa: E402

#: What a note says of one card.
ROW = re.compile(r"\| (RTX \d+|H200) \| (\d\.\d\d) \| [^|]* \|")


@pytest.mark.parametrize("name", templates.ENTRIES)
def test_a_workflow_is_what_the_tool_writes(name):
    text = (ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")
    today = templates.template(name).to_json()
    assert ROW.sub("", today) == ROW.sub("", text), "run tools/templates.py"
    told, now = ({card: float(time) for card, time in ROW.findall(x)} for x in (text, today))
    assert told == pytest.approx(now, abs=0.1), "run tools/templates.py"
