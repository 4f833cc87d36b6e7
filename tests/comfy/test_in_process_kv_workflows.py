"""The workflow files of compressed KV caches, node by node, with small models in them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_in_process_kv import bundled  # noqa: F401
from test_in_process_kv_calibration import clip_of

ROOT = Path(__file__).resolve().parent.parent.parent


def classes():
    """Node classes by type, ComfyUI's and the pack's."""
    import asyncio

    from comfy_extras import nodes_ar_video, nodes_custom_sampler, nodes_textgen

    import nodes
    from sage_diffusion.nodes.kv import KVCacheCompression, KVCacheReport

    found = dict(nodes.NODE_CLASS_MAPPINGS)
    for module in (nodes_ar_video, nodes_custom_sampler, nodes_textgen):
        extension = asyncio.run(module.comfy_entrypoint())
        made = asyncio.run(extension.get_node_list())
        found |= {one.GET_SCHEMA().node_id: one for one in made}
    pack = (KVCacheCompression, KVCacheReport)
    return found | {one.GET_SCHEMA().node_id: one for one in pack}


def run(name, stand_ins, settings):
    """Outputs of a workflow file's nodes, by type.

    ``stand_ins`` compute in the place of some types; ``settings`` are other values of widgets.
    """
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    known, sources = classes(), {link[0]: (link[1], link[2]) for link in graph["links"]}
    waiting = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    made, by_type = {}, {}
    while waiting:
        node = next(
            n
            for n in waiting
            if all(sources[i["link"]][0] in made for i in n["inputs"] if i["link"])
        )
        waiting.remove(node)
        widgets = [i["name"] for i in node["inputs"] if "widget" in i]
        given = dict(zip(widgets, node.get("widgets_values") or [], strict=False))
        for each in node["inputs"]:
            if each["link"]:
                source, slot = sources[each["link"]]
                given[each["name"]] = made[source][slot]
        given |= settings.get(node["type"], {})
        if "sampling_mode" in given:  # as ComfyUI hands on a dynamic combo
            given["sampling_mode"] = {"sampling_mode": given["sampling_mode"]}
        made[node["id"]] = by_type[node["type"]] = compute(node["type"], given, stand_ins, known)
    return by_type


def compute(kind, given, stand_ins, known):
    if kind in stand_ins:
        return (stand_ins[kind](**given),)
    node = known[kind]
    if hasattr(node, "execute"):
        return node.execute(**given).args
    return getattr(node(), node.FUNCTION)(**given)


@pytest.fixture
def alone(monkeypatch):
    """Nodes that run without a server."""
    from server import PromptServer

    from sage_diffusion.nodes import kv

    monkeypatch.setattr(PromptServer, "instance", None, raising=False)
    for node in (kv.KVCacheCompression, kv.KVCacheReport):
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None), raising=False)


def nothing(**given):
    """Of loaders and viewers."""


def test_a_text_is_written_with_a_compressed_cache(alone):
    viewers = {"PreviewAny": nothing, "PreviewImage": nothing}
    found = run(
        "kv_text",
        {"CLIPLoader": lambda **given: clip_of("llama"), **viewers},
        {
            "TextGenerate": {"max_length": 20, "prompt": "A fox in the snow. " * 20},
            "SageDiffusionKVCacheReport": {"text": "A fox runs through fresh snow. " * 10},
        },
    )
    text, bars, report, data = found["SageDiffusionKVCacheReport"]
    assert text == found["TextGenerate"][0] and len(text) == 20
    assert bars.shape[0] == 1 and "x as much\n4 layers" in report  # so short a text gains nothing
    lines = {line["kind"]: line for line in json.loads(data)}
    assert lines["text"]["parts"]["k.codes"] > 0
    assert 0 < lines["predictions"]["kl"] < 0.1 and "\npredictions: KL 0.0" in report


def test_a_video_is_sampled_with_a_compressed_cache(alone, bundled):  # noqa: F811
    prompt = [[torch.zeros(1, 1, 16), {}]]
    viewers = ("CLIPLoader", "VAELoader", "VAEDecode", "SaveAnimatedWEBP", "PreviewImage")
    stand_ins = {
        "UNETLoader": lambda **given: bundled,
        "CLIPTextEncode": lambda **given: prompt,
        **dict.fromkeys(viewers, nothing),
    }
    settings = {
        "EmptyARVideoLatent": {"width": 128, "height": 128, "length": 25},
        "SamplerARVideo": {"num_frame_per_block": 1},
        "BasicScheduler": {"steps": 1},
    }
    found = run("kv_video", stand_ins, settings)
    latent, bars, report, data = found["SageDiffusionKVCacheReport"]
    assert latent["samples"].shape == (1, 16, 7, 16, 16) and bars.shape[0] == 1
    assert "at its peak instead of" in report and json.loads(data)[0]["parts"]["k.codes"] > 0
    exact = run("kv_video", stand_ins, settings | {"SageDiffusionKVCache": {"preset": "lossless"}})
    same, *_ = exact["SageDiffusionKVCacheReport"]
    cache = found["SageDiffusionKVCache"][2]
    report_node = classes()["SageDiffusionKVCacheReport"]
    _, both, told, _ = report_node.execute(latent, cache, exact=same).args
    assert both.shape[0] == 2 and "exact run, by 2 frames: " in told
