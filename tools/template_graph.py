"""A ComfyUI workflow as the page saves it, from Python: nodes by kind, in groups, laid out."""

from __future__ import annotations

import functools
import importlib
import json
import uuid
from dataclasses import dataclass, field
from typing import Any

#: Kinds of input that are widgets on the node.
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}

#: Modules of ``comfy_extras`` whose nodes the workflows use.
EXTRAS = ("flux", "hunyuan", "images", "model_advanced", "sd3", "custom_sampler", "preview_any")
EXTRAS += ("audio", "image_compare", "lt", "lt_audio", "minimax_h3", "video")

_PAD, _TITLE, _LINE, _GAP = 20, 30, 24, 40


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: Node
    slot: int
    kind: str


@dataclass
class Node:
    """One node; ``node[0]`` is its first output."""

    id: int
    type: str
    title: str | None
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    values: list[Any]
    models: list[dict[str, str]]
    width: int
    height: int
    place: tuple[int, int] = (0, 0)

    def __getitem__(self, slot: int) -> Link:
        return Link(self, slot, self.outputs[slot]["type"])


@dataclass
class Template:
    """A workflow in the making.

    Attributes:
        name: of the file, and so the title in the template browser.
        note: Markdown that explains it.
        models: file name -> folder and address.
    """

    name: str
    note: str
    models: dict[str, tuple[str, str]]
    nodes: list[Node] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[tuple[str, list[Node]]] = field(default_factory=list)

    def group(self, title: str) -> None:
        """What is added from now on stands in a column of this title."""
        self.groups.append((title, []))

    def add(self, kind: str, title: str | None = None, **given: Any) -> Node:
        """A node; inputs are values of widgets or outputs of other nodes.

        Raises:
            KeyError: the node has no such input.
        """
        inputs, values = _inputs(definition(kind), given)
        if given:
            raise KeyError(f"{kind} has no {', '.join(given)}")
        outputs = [
            {"localized_name": name, "name": name, "type": type_, "links": None}
            for name, type_ in outputs_of(kind)
        ]
        models = [
            {"name": value, "url": self.models[value][1], "directory": self.models[value][0]}
            for value in values
            if isinstance(value, str) and value in self.models
        ]
        sockets = sum("widget" not in one for one in inputs)
        lines = max(sockets, len(outputs)) + len(values)
        long = kind in ("CLIPTextEncode",)
        report = 150 if kind.startswith("SageDiffusion") else 300 if "Image" in kind else 0
        height = _TITLE + _LINE * lines + (90 if long else 0) + report
        node = Node(len(self.nodes) + 1, kind, title, inputs, outputs, values, models, 320, height)
        for place, one in enumerate(inputs):
            source = one.pop("source", None)
            if source is None:
                continue
            one["link"] = len(self.links) + 1
            self.links.append(
                [one["link"], source.node.id, source.slot, node.id, place, source.kind]
            )
            output = source.node.outputs[source.slot]
            output["links"] = [*(output["links"] or []), one["link"]]
        self.nodes.append(node)
        self.groups[-1][1].append(node)
        return node

    def to_json(self) -> str:
        """The file's text."""
        boxes = self._lay_out()
        note = {
            "id": len(self.nodes) + 1,
            "type": "MarkdownNote",
            "title": "Read me",
            "pos": [0, -480],
            "size": [760, 380],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [self.note],
            "color": "#432",
            "bgcolor": "#653",
        }
        data = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"sage_diffusion/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes) + 1,
            "last_link_id": len(self.links),
            "nodes": [*map(_node, self.nodes), note],
            "links": self.links,
            "groups": boxes,
            "config": {},
            "extra": {"ds": {"scale": 0.55, "offset": [60, 540]}},
            "version": 0.4,
        }
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    def _lay_out(self) -> list[dict[str, Any]]:
        """Columns from left to right; returns the boxes of the groups."""
        boxes, x = [], 0
        for number, (title, nodes) in enumerate(self.groups):
            y = _PAD
            for node in nodes:
                node.place = (x + _PAD, y + _TITLE)
                y += node.height + _TITLE + _GAP
            width = max(node.width for node in nodes) + 2 * _PAD
            boxes.append(
                {
                    "id": number + 1,
                    "title": f"{number + 1}. {title}",
                    "bounding": [x, -_GAP, width, y + _GAP],
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
            )
            x += width + _GAP
        return boxes


def _node(node: Node) -> dict[str, Any]:
    properties: dict[str, Any] = {"Node name for S&R": node.type}
    if node.models:
        properties["models"] = node.models
    titled = {"title": node.title} if node.title else {}
    return {
        "id": node.id,
        "type": node.type,
        **titled,
        "pos": list(node.place),
        "size": [node.width, node.height],
        "flags": {},
        "order": node.id,
        "mode": 0,
        "inputs": node.inputs,
        "outputs": node.outputs,
        "properties": properties,
        "widgets_values": node.values,
    }


def definition(kind: str) -> dict[str, Any]:
    """``required`` and ``optional`` inputs of a node."""
    found = _class(kind)
    if hasattr(found, "GET_NODE_INFO_V1"):
        return found.GET_NODE_INFO_V1()["input"]
    return found.INPUT_TYPES()


def outputs_of(kind: str) -> list[tuple[str, str]]:
    """Name and type of a node's outputs."""
    found = _class(kind)
    if hasattr(found, "GET_NODE_INFO_V1"):
        info = found.GET_NODE_INFO_V1()
        return list(zip(info["output_name"], info["output"], strict=True))
    names = getattr(found, "RETURN_NAMES", found.RETURN_TYPES)
    return list(zip(names, found.RETURN_TYPES, strict=True))


def _class(kind: str) -> Any:
    """A node's class."""
    return _classes()[kind]


@functools.cache
def _classes() -> dict[str, Any]:
    """Nodes of ComfyUI's own and of this pack."""
    import nodes as core
    from sage_diffusion.nodes import host
    from sage_diffusion.nodes.extension import NODES
    from sage_diffusion.nodes.kv_calibration import register_calibration_folder

    host.register_plan_folder()
    host.register_tokenizer_folder()
    register_calibration_folder()
    found = {node.define_schema().node_id: node for node in NODES} | core.NODE_CLASS_MAPPINGS
    for name in EXTRAS:
        module = importlib.import_module(f"comfy_extras.nodes_{name}")
        found |= getattr(module, "NODE_CLASS_MAPPINGS", {})
        for one in vars(module).values():
            own = isinstance(one, type) and one.__module__ == module.__name__
            if own and hasattr(one, "define_schema"):
                found[one.define_schema().node_id] = one
    return found


def _inputs(
    given_by: dict[str, Any], given: dict[str, Any], prefix: str = ""
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Slots and widgets' values, in the page's order; what is given is taken out."""
    slots: list[dict[str, Any]] = []
    values: list[Any] = []
    for name, (kind, *rest) in [
        *given_by.get("required", {}).items(),
        *given_by.get("optional", {}).items(),
    ]:
        options = rest[0] if rest else {}
        type_ = "COMBO" if isinstance(kind, list) else kind
        full = f"{prefix}{name}"
        slot: dict[str, Any] = {"localized_name": name, "name": full, "type": type_, "link": None}
        value = given.pop(full, given.pop(name, None))
        if type_ == "IMAGECOMPARE":
            continue  # a view that the page makes
        if not WIDGETS & {*type_.split(",")} or isinstance(value, Link):
            slots.append(slot | {"source": value})
            continue
        if type_ != "STRING" or not options.get("socketless"):
            slots.append(slot | {"widget": {"name": full}})
        if value is None:
            value = _default(kind, options)
        values.append(value)
        if options.get("control_after_generate"):
            values.append("fixed")
        if type_ == "COMFY_DYNAMICCOMBO_V3":
            chosen = next(one for one in options["options"] if one["key"] == value)
            more, theirs = _inputs(chosen["inputs"], given, f"{full}.")
            slots += more
            values += theirs
    return slots, values


def _default(kind: Any, options: dict[str, Any]) -> Any:
    """Of a widget."""
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0] if kind else ""
    choices = options.get("options") or [""]
    return choices[0]["key"] if isinstance(choices[0], dict) else choices[0]
