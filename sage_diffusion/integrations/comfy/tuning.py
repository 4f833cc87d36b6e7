"""A MODEL's own plan, made once: where it is kept, and what it is found again by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.integrations.comfy.carried import Chosen
from sage_diffusion.integrations.comfy.layers import layer_names
from sage_diffusion.plan import PrecisionPlan
from sage_diffusion.plan.embed import content_hash, read_embedded

#: Folder of such plans below the plans' own, and of their measured values.
FOLDER = "auto"

#: Weights that are looked at, and numbers of each: enough to tell fine-tunes apart, quick to read.
_WEIGHTS, _NUMBERS = 64, 16


@dataclass(frozen=True)
class Mark:
    """What a plan was made of.

    Attributes:
        model: class of the model.
        digest: of the model, its patches and the settings, 12 hex digits.
        card: that it was planned for.
    """

    model: str
    digest: str
    card: str

    @property
    def name(self) -> str:
        """Of the plan, below the folder of plans."""
        return f"{FOLDER}/{self.model} {self.digest} {self.card}"

    def is_of(self, name: str) -> bool:
        """Is a plan of this name of the same model and settings, for whatever card?"""
        return name.rpartition(" ")[0] == self.name.rpartition(" ")[0]


def mark_of(model: Any, settings: dict[str, Any], card: str) -> Mark:
    """The mark of a MODEL that is sampled with these settings.

    Args:
        model: a ``ModelPatcher``.
        settings: plain data, whatever decides what is measured and planned.
        card: that the plan is for.
    """
    config = type(getattr(model.model, "model_config", model.model)).__name__
    network = model.model.diffusion_model
    digest = hashlib.sha256(json.dumps([config, layer_names(network), settings]).encode())
    parameters = sorted(network.named_parameters())
    for name, weight in parameters[:: max(1, len(parameters) // _WEIGHTS)]:
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(_some(weight))
    for key, patches in sorted(model.patches.items(), key=lambda item: str(item[0])):
        for strength, patch, scale, *_ in patches:
            digest.update(f"{key} {strength} {scale}".encode())
            for tensor in _tensors(patch):
                digest.update(_some(tensor))
    return Mark(config, digest.hexdigest()[:12], card)


def find(mark: Mark, embedded: str, path: Path) -> Chosen | None:
    """The plan of a mark: the workflow's own, or the one that was kept here; None for neither.

    Args:
        mark: of the MODEL at hand.
        embedded: text of :mod:`sage_diffusion.plan.embed`; empty for none.
        path: of the plan that would have been kept here.

    Raises:
        PlanError: what counts is no plan.
    """
    carried = read_embedded(embedded) if embedded else None
    if carried is not None and mark.is_of(carried.file):
        edited = ", edited by hand" if carried.edited else ""
        origin = f"plan of this workflow{edited}, hash {content_hash(carried.plan)}"
        return Chosen(carried.plan, origin)
    if not path.exists():
        return None
    plan = PrecisionPlan.load(path)
    return Chosen(plan, f"measured before, hash {content_hash(plan)}")


def _some(weight: Tensor) -> bytes:
    """A few numbers of a tensor, of its codes where ComfyUI keeps it quantized; none of one that
    is not loaded yet."""
    codes = getattr(weight, "_qdata", weight)
    if codes.is_meta:
        return b""
    return codes.detach().reshape(-1)[:_NUMBERS].to("cpu", torch.float32).numpy().tobytes()


def _tensors(patch: Any) -> Iterator[Tensor]:
    """Tensors of a weight patch: one, a tuple of them, or an adapter with ``weights``."""
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, (tuple, list)):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):
        yield from _tensors(patch.weights)


def keep_in_workflow(info: Any, prompt: Any, node_id: str, text: str) -> None:
    """Write an embedded plan into what ComfyUI saves beside the pictures of the run under way.

    Args:
        info: the run's ``extra_pnginfo``, may be None.
        prompt: the run's API prompt, may be None.
        node_id: of the node, ``3:7`` in subgraph node 3; ``embedded_plan`` is its last widget.
        text: that :func:`sage_diffusion.plan.embed.embed_plan` wrote.
    """
    inputs = (prompt or {}).get(node_id, {}).get("inputs")
    if isinstance(inputs, dict):
        inputs["embedded_plan"] = text
    workflow = (info or {}).get("workflow")
    node = _node(workflow, node_id) if isinstance(workflow, dict) else None
    values = (node or {}).get("widgets_values")
    if isinstance(values, list) and values and _is_plan(values[-1]):
        values[-1] = text


def _node(workflow: dict[str, Any], node_id: str) -> dict[str, Any] | None:
    """A node of a workflow as the page saves it."""
    subgraphs = {
        graph.get("id"): graph for graph in workflow.get("definitions", {}).get("subgraphs", [])
    }
    graph: dict[str, Any] | None = workflow
    node = None
    for part in node_id.split(":"):
        nodes = [] if graph is None else graph.get("nodes", [])
        node = next((n for n in nodes if str(n.get("id")) == part), None)
        graph = None if node is None else subgraphs.get(node.get("type"))
    return node


def _is_plan(value: Any) -> bool:
    """Is a widget's value that of ``embedded_plan``: empty, or a plan?"""
    return value == "" or (isinstance(value, str) and '"sha256"' in value)
