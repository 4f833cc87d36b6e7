"""Help pages: every node has one in every language of its texts, and all say as much."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
LANGUAGES = sorted({path.name for path in (ROOT / "locales").iterdir()} - {"en"})


def shape(text):
    """Headings, rows of tables, pictures, and figures with a unit of bits."""
    lines = text.splitlines()
    return {
        "headings": [re.match("#+", line)[0] for line in lines if line.startswith("#")],
        "rows": [line.count("|") for line in lines if line.startswith("|")],
        "pictures": re.findall(r"!\[[^]]*\]\(([^)]+)\)", text),
        "specs": sorted(set(re.findall(r"`((?:int|fp)\d+/[\w/-]+)`", text))),
    }


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_in_another_language(page, language):
    other = page.with_suffix("") / f"{language}.md"
    assert other.is_file(), "translate it"
    assert shape(other.read_text("utf-8")) == shape(page.read_text("utf-8"))


def test_no_page_is_left_over():
    names = {path.stem for path in PAGES}
    folders = {path.name for path in (ROOT / "web" / "docs").iterdir() if path.is_dir()}
    assert folders == names
