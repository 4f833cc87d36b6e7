"""What ComfyUI's registry and Manager read of the pack."""

import ast
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML itself")


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(lines):
    return {re.split(r"[ <>=~!;\[]", line, maxsplit=1)[0] for line in lines}


def test_the_managers_list_covers_what_the_package_needs():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = names(line for line in lines if line and not line.startswith("#"))
    project = pyproject()["project"]
    needed = names(project["dependencies"]) | names(project["optional-dependencies"]["plot"])
    assert listed == needed - {"torch"}  # never touch a user's torch


def test_the_metadata_keep_the_registrys_rules():
    data = pyproject()
    project, comfy = data["project"], data["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,98}", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert comfy["Icon"].startswith("https://")
    assert comfy["Icon"].endswith((".svg", ".png", ".jpg", ".gif"))
    assert project["urls"]["Repository"].startswith("https://")
    assert "web" not in comfy  # with WEB_DIRECTORY as well, the page would load it twice


def test_the_icon_is_of_the_registrys_size():
    icon = ET.parse(ROOT / "web" / "icon.svg").getroot()
    assert int(icon.get("width")) <= 800
    assert int(icon.get("height")) <= 400


def test_no_code_is_made_at_run_time():
    """The registry refuses eval, exec and packages installed at run time."""
    for folder in ("kernels", "nodes", "sage_diffusion"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec"), path


def test_every_help_page_belongs_to_a_node():
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    sources = "".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))
    assert pages == set(re.findall(r'node_id="(\w+)"', sources))


def test_templates_have_ids_of_their_own():
    """Texts go to the workflow whose id the prompt names."""
    ids = [json.loads(path.read_text())["id"] for path in (ROOT / "workflows").glob("*.json")]
    assert len(set(ids)) == len(ids)
    assert not any(set(one) <= set("0-") for one in ids)
