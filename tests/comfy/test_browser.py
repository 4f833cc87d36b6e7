"""The real page in headless Chromium: a template, a drag, a run, the report, help, search.

Screenshots stay in `out/comfy`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import host
import pytest
import tiny_models

ROOT = Path(__file__).resolve().parent.parent.parent
PLAYWRIGHT = ROOT / ".cache" / "browser" / "node_modules"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

#: What ComfyUI's own page logs in a fresh installation without its gallery.
HOSTS_OWN = re.compile(
    r"^Failed to load resource: .*404|^Error loading (fuse options|core workflow templates)"
    r"|^ComfyApp graph accessed before initialization"
)


@pytest.fixture(scope="module")
def visit(request, tmp_path_factory):
    """What the page did, as `browser.js` tells it."""
    if CHROMIUM is None or not (PLAYWRIGHT / "playwright-core").is_dir():
        pytest.skip("needs Chromium and playwright-core: tests/comfy/setup_browser.sh")
    models = request.config.getoption("--models")
    tiny_models.write_checkpoint(models)
    shots = ROOT / "out" / "comfy"
    shots.mkdir(parents=True, exist_ok=True)
    comfy = request.config.getoption("--comfy").resolve()
    with host.serve(comfy, models, tmp_path_factory.mktemp("page")) as server:
        done = subprocess.run(
            ["node", str(Path(__file__).with_name("browser.js")), server.url, str(shots)],
            env={**os.environ, "NODE_PATH": str(PLAYWRIGHT), "CHROMIUM": CHROMIUM},
            timeout=400,
            capture_output=True,
            text=True,
        )
    result = json.loads((shots / "result.json").read_text())
    assert done.returncode == 0, result.get("failure", "") + done.stderr
    return result


def test_templates_are_offered(visit):
    assert "sd15_first_try" in visit["templates"]
    assert len(visit["templates"]) == len(list((ROOT / "workflows").glob("*.json")))


def test_the_node_follows_the_mouse(visit):
    (x, y), (new_x, new_y) = visit["dragged"]
    assert new_y < y - 20
    assert new_x != x


def test_the_template_runs_and_shows_picture_and_report(visit):
    assert visit["shown"]["SaveImage image"] == 128
    for node in ("SageDiffusionAttention", "SageDiffusionReport"):
        shown = visit["shown"][node]
        assert shown.startswith("42 attention calls intercepted, 6 quantized (14%)\n0 declined;")
    assert visit["visible"]


def test_help_opens(visit):
    assert visit["help"]


def test_search_by_alias_adds_the_node(visit):
    assert visit["added"] == 1


def test_nothing_went_wrong_on_the_page(visit):
    assert visit["errors"] == []
    assert visit["blocked"] == []
    assert [line for line in visit["console"] if not HOSTS_OWN.match(line)] == []
    missing = [line for line in visit["console"] if "sage_diffusion" in line]
    assert all(line.endswith("/en.md") for line in missing)  # asked first, then the page itself


@pytest.mark.parametrize("name", ["templates", "run", "help", "search"])
def test_screenshots_are_kept(visit, name):
    picture = ROOT / "out" / "comfy" / f"{name}.png"
    assert picture.stat().st_size > 20_000
