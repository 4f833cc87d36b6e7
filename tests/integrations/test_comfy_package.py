"""What ComfyUI's registry and Manager read of the pack."""

import ast
import io
import json
import re
import subprocess
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML itself")


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(lines):
    return {re.split(r"[ <>=~!;\[]", line, maxsplit=1)[0] for line in lines}


#: What ComfyUI's own requirements bring, since 0.24.
COMFYS_OWN = {"torch", "numpy", "pillow", "pydantic", "safetensors"}
#: What the command line and its reports want; the nodes do without.
EXTRAS = {"jinja2", "rich", "typer"}


def test_nothing_is_installed_with_the_nodes():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(line.startswith("#") for line in lines if line)
    assert names(pyproject()["project"]["dependencies"]) == COMFYS_OWN - {"safetensors"} | EXTRAS


def archive():
    """Files that go to the registry: git's, less those of .comfyignore."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached"]
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    found = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    ignored = subprocess.run(
        [*listing, "--ignored", "--exclude-from=.comfyignore"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    return sorted({*found.split("\0")} - {*ignored.split("\0"), ""})


def modules_of(path):
    """Modules of the pack that a file imports, in functions too, as paths without an ending."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in found:
            for package in ("kernels", "nodes"):
                name = name.replace(f"sage_diffusion.{package}", package, 1)
            yield name.replace(".", "/")


def test_the_archive_is_small_and_holds_what_the_nodes_import():
    files = archive()
    assert not any(f.startswith(("tests/", "benchmarks/", "docs/", "tools/")) for f in files)
    assert {"__init__.py", "web/text.js", "web/plans.js", "locales/en/nodeDefs.json"} <= {*files}
    stems = {f.removesuffix(".py").removesuffix("/__init__") for f in files if f.endswith(".py")}
    left_out = {
        path.relative_to(ROOT).as_posix().removesuffix(".py").removesuffix("/__init__")
        for folder in ("sage_diffusion", "kernels", "nodes")
        for path in (ROOT / folder).rglob("*.py")
    } - stems
    assert "sage_diffusion/speed/libraries" in left_out  # it fetches wheels through pip
    for file in files:
        if file.endswith(".py"):
            missing = {*modules_of(ROOT / file)} & left_out
            assert not missing, (file, missing)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archived:
        for file in files:
            archived.write(ROOT / file, file)
    assert packed.tell() <= 12e6


def test_only_pythons_own_children_are_started():
    """The registry scans for downloads and installers; a verification runs in a Python beside."""
    starts = set()
    for file in archive():
        if file.endswith(".py"):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not re.search(r"urllib\.request|import requests|hf_hub|pip download", text)
            assert '"pip"' not in text, file
            if re.search(r"\bsubprocess\.(run|Popen|check_output)", text):
                starts.add(file)
    assert starts == {
        "sage_diffusion/verify/packed_past.py",
        "sage_diffusion/verify/record.py",
        "sage_diffusion/verify/worker.py",
    }


def test_people_find_the_node():
    """By what they type; the page ranks a term that is an alias of its own highest."""
    text = (ROOT / "nodes" / "attention.py").read_text()
    for term in ("attention", "sage", "int8", "int4", "fp8", "faster", "speed", "quantize"):
        assert f'"{term}"' in text


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


def test_help_pages_show_pictures_that_are_there():
    shown = set()
    for page in (ROOT / "web" / "docs").rglob("*.md"):
        shown |= set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")))
    assert shown == {path.name for path in (ROOT / "web" / "docs").glob("*.png")}
    assert {"sage_attention.png", "auto_tune.png", "accuracy_check.png"} <= shown


@pytest.mark.parametrize("node", ["Attention", "AutoTune", "AccuracyCheck"])
def test_the_nodes_that_newcomers_meet_have_help_in_every_language(node):
    folder = ROOT / "web" / "docs" / f"SageDiffusion{node}"
    languages = {path.name for path in (ROOT / "locales").iterdir()} - {"en"}
    assert {path.stem for path in folder.glob("*.md")} == languages
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.md")]
    assert all(text.startswith("# ") and len(text) > 300 for text in texts)
    assert len(set(texts)) == len(languages)


WORKFLOWS = sorted((ROOT / "workflows").glob("* - *.json"))
FILE_WIDGETS = ("unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "ckpt_name")
FILE_WIDGETS += ("text_encoder",)


def test_the_families_of_today_have_a_template():
    names = " ".join(path.stem for path in WORKFLOWS)
    for family in (
        "Flux.1",
        "Flux.2",
        "Z-Image",
        "Qwen-Image",
        "Wan 2.2",
        "HunyuanVideo 1.5",
        "MiniMax H3",
    ):
        assert family in names


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_templates_name_their_models_and_explain_themselves(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    loaders = 0
    for node in graph["nodes"]:
        named = [slot["name"] for slot in node["inputs"] if slot["name"] in FILE_WIDGETS]
        if not named:
            continue
        loaders += 1
        given = {model["name"]: model for model in node["properties"]["models"]}
        files = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
        assert set(given) == set(files)  # what the page's panel of missing models offers
        for name, model in given.items():
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{name}")
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae", "checkpoints")
    assert loaders
    boxes = [group["bounding"] for group in graph["groups"]]
    assert len(boxes) >= 3 and all(group["title"][0].isdigit() for group in graph["groups"])
    (note,) = (n for n in graph["nodes"] if n["type"] == "MarkdownNote")
    assert "**Next:**" in note["widgets_values"][0]
    if "specs" not in path.stem:
        assert "predicted bound" in note["widgets_values"][0]
        assert "| H200 |" in note["widgets_values"][0] and "measured" in note["widgets_values"][0]
    for node in graph["nodes"]:
        if node is not note:
            (x, y), (width, height) = node["pos"], node["size"]
            assert any(
                a <= x and b <= y and x + width <= a + c and y + height <= b + d
                for a, b, c, d in boxes
            ), node["type"]


def test_templates_have_ids_of_their_own():
    """Texts go to the workflow whose id the prompt names."""
    ids = [json.loads(path.read_text())["id"] for path in (ROOT / "workflows").glob("*.json")]
    assert len(set(ids)) == len(ids)
    assert not any(set(one) <= set("0-") for one in ids)
