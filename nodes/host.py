"""What several nodes ask of ComfyUI: the plan folders, a folder for reports, text on a node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

from sage_diffusion.integrations.comfy.headline import State
from sage_diffusion.plan import PlanError, PrecisionPlan
from sage_diffusion.plan.embed import embed_plan
from sage_diffusion.plan.library import OWN_PLANS, plan_files
from sage_diffusion.vq.checkpoints import BUNDLED
from sage_diffusion.vq.fill import BUNDLED as BUNDLED_FILL

#: Name of the plans' folder below ``models`` and in ``extra_model_paths.yaml``.
PLANS = "sage_plans"
CATEGORY = "model/patch/Sage Diffusion"

#: What ``web/text.js`` listens to.
TEXT_EVENT = "sage_diffusion.text"

#: The same of VQ tokenizers; pickles are there to be converted.
TOKENIZERS = "vq_tokenizers"

#: The same of models that fill masked tokens: folders.
FILLS = "vq_fill"
_PICKLES = {".ckpt", ".pt", ".pth", ".bin"}

Plan = io.Custom("SAGE_PLAN")


def register_plan_folder() -> None:
    """Tell ComfyUI about ``models/sage_plans``; folders of ``extra_model_paths.yaml`` stay."""
    register_folder(PLANS, {".json"})


def register_tokenizer_folder() -> None:
    """Tell ComfyUI about ``models/vq_tokenizers`` and ``models/vq_fill``."""
    register_folder(TOKENIZERS, {".safetensors", *_PICKLES})
    folder_paths.add_model_folder_path(FILLS, str(Path(folder_paths.models_dir) / FILLS))


def register_folder(name: str, endings: set[str]) -> None:
    """Tell ComfyUI about a folder below ``models``, and which of its files are listed."""
    folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    paths, _ = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (paths, endings)


def tokenizer_names() -> list[str]:
    """The pack's own, files that can be loaded, and folders as diffusers writes them."""
    names: list[Path] = []
    for root in map(Path, folder_paths.get_folder_paths(TOKENIZERS)):
        names += [path.parent.relative_to(root) for path in root.rglob("config.json")]
        inside = {root / name for name in names}
        names += [
            path.relative_to(root)
            for path in root.rglob("*.safetensors")
            if path.parent not in inside
        ]
    return ["bundled", *sorted({name.as_posix() for name in names})]


def fill_names() -> list[str]:
    """The pack's own, folders of fill models and of aMUSEd's pipelines."""
    names = set()
    for root in map(Path, folder_paths.get_folder_paths(FILLS)):
        whole = {path.parent for path in root.rglob("model_index.json")}
        own = {path.parent for path in root.rglob("config.json")}
        names |= {p.relative_to(root).as_posix() for p in whole}
        names |= {p.relative_to(root).as_posix() for p in own if p.parent not in whole}
    return ["bundled", *sorted(names)]


def tokenizer_path(name: str) -> Path:
    """The file or folder of a tokenizer.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "bundled":
        return BUNDLED
    return _in_models(TOKENIZERS, name, "tokenizer", Path.exists)


def fill_path(name: str) -> Path:
    """The folder of a fill model.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "bundled":
        return BUNDLED_FILL
    return _in_models(FILLS, name, "fill model", Path.is_dir)


def _in_models(kind: str, name: str, what: str, fits: Callable[[Path], bool]) -> Path:
    """What lies below a folder of ComfyUI's models, never outside of it."""
    for root in map(Path, folder_paths.get_folder_paths(kind)):
        path = (root / name).resolve()
        if fits(path) and path != root.resolve() and path.is_relative_to(root.resolve()):
            return path
    raise ValueError(f"no {what} named {name!r} in models/{kind}")


def signature(path: Path) -> list[str]:
    """Name, size and time of a file, or of every file of a folder: another one, read it anew."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = []
    for file in files:
        stat = file.stat()
        found.append(f"{file} {stat.st_size} {stat.st_mtime_ns}")
    return found


def plan_names() -> list[str]:
    """Names of every plan: the user's, then the pack's own."""
    return list(plan_files([*folder_paths.get_folder_paths(PLANS), OWN_PLANS]))


def path_if_there(name: str) -> Path | None:
    """The file of a plan, None if there is none of that name here."""
    return plan_files([*folder_paths.get_folder_paths(PLANS), OWN_PLANS]).get(name)


def embed_inputs() -> list[io.Input]:
    """What a node with a plan's file has so that its workflow carries the plan."""
    return [
        io.Boolean.Input(
            "embed_plan",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Keep the file's plan in the workflow and in pictures, so that whoever opens "
            "them runs the same. Off reads the file at every run.",
        ),
        io.String.Input(
            "embedded_plan",
            default="",
            optional=True,
            socketless=True,
            extra_dict={"hidden": True},
            tooltip="The plan that the workflow carries; the page fills it in.",
        ),
    ]


def register_routes() -> None:
    """What ``web/plans.js`` asks for: a plan's file as text to embed."""
    from aiohttp import web

    @PromptServer.instance.routes.get("/sage_diffusion/plan")
    async def plan_to_embed(request: Any) -> Any:
        file = request.rel_url.query.get("file", "")
        path = path_if_there(file)
        if path is None:
            return web.json_response({"error": f"no plan named {file!r} here"}, status=404)
        try:
            return web.json_response({"text": embed_plan(PrecisionPlan.load(path), file)})
        except PlanError as error:
            return web.json_response({"error": str(error)}, status=422)


def user_plan_folder() -> Path:
    """Where new plans go."""
    return Path(folder_paths.get_folder_paths(PLANS)[0])


def without_ending(name: str, ending: str) -> str:
    """A file's name as a user typed it, to which ``.ending`` is appended once."""
    return name.strip().removesuffix(f".{ending}")


def report_path(prefix: str, ending: str) -> Path:
    """A fresh file of the output folder: ``<prefix>_00001.<ending>``.

    Raises:
        ValueError: the prefix leaves the output folder.
    """
    return _fresh(Path(folder_paths.get_output_directory()), prefix, ending)


def new_tokenizer_path(prefix: str) -> Path:
    """A fresh file of ``models/vq_tokenizers``: ``<prefix>_00001.safetensors``.

    Raises:
        ValueError: the prefix leaves the folder.
    """
    return _fresh(Path(folder_paths.get_folder_paths(TOKENIZERS)[0]), prefix, "safetensors")


def _fresh(root: Path, prefix: str, ending: str) -> Path:
    root = root.resolve()
    folder = (root / prefix).resolve().parent
    if not folder.is_relative_to(root):
        raise ValueError(f"the name must stay inside the folder {root.name}, got {prefix!r}")
    name = without_ending(Path(prefix).name, ending) or "report"
    number = 1
    while (path := folder / f"{name}_{number:05}.{ending}").exists():
        number += 1
    return path


def show(node_id: Any, text: str, state: State = "done") -> None:
    """Text on a node, now; works long after the node itself was executed.

    It goes to the page that queued the prompt that runs now, and names that prompt's workflow: a
    node of the same id in another one keeps its own text.
    """
    server = PromptServer.instance
    if server is None or server.client_id is None or node_id is None:
        return
    context = get_executing_context()
    prompt = None if context is None else context.prompt_id
    data = {
        "node": str(node_id),
        "prompt_id": prompt,
        "workflow": _workflow(server, prompt),
        "state": state,
        "text": text,
    }
    server.send_sync(TEXT_EVENT, data, server.client_id)


def _workflow(server: Any, prompt: str | None) -> str | None:
    """The id of a running prompt's workflow, None where whoever queued it sent none."""
    for item in list(server.prompt_queue.currently_running.values()):
        if item[1] == prompt:
            workflow = item[3].get("extra_pnginfo", {}).get("workflow")
            return workflow.get("id") if isinstance(workflow, dict) else None
    return None
