"""Every recipe of docs/diffusers.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from integrations.tiny_adapters import ip_adapter_state
from integrations.tiny_pipelines import build
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"
RECIPES = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.M | re.S)

#: Recipe -> the pipeline that it is for; Flux where it does not matter.
PIPES = {
    **dict.fromkeys(("Image-to-image on shared parts", "ControlNet", "IP-Adapter"), "sd15"),
    "Wan 2.2": "wan",
}
NEEDS = {
    "LoRA": "peft",
    "Offloading": "accelerate",
    "Weights in torchao": "torchao",
    "Weights in quanto": "optimum.quanto",
    "Weights in GGUF": "gguf",
}


def load_gguf(model: nn.Module) -> nn.Module:
    """The model with 8-bit linear layers of GGUF, as reading such a file makes them."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    fitting = {
        name: old
        for name, old in model.named_modules()
        if type(old) is nn.Linear and old.in_features % 32 == 0
    }
    for name, old in fitting.items():
        new = GGUFLinear(old.in_features, old.out_features, compute_dtype=torch.float32)
        codes = torch.from_numpy(quants.quantize(old.weight.detach().numpy(), kind))
        new.weight, new.bias = GGUFParameter(codes, quant_type=kind), old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    assert len(fitting) > 40
    return model


@pytest.mark.parametrize(("title", "code"), RECIPES, ids=[title for title, _ in RECIPES])
def test_recipe(title, code):
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    torch._dynamo.reset()
    tiny = build(PIPES.get(title, "flux"))
    model = tiny.denoiser

    def call_model():
        with torch.no_grad():
            model(
                hidden_states=torch.randn(1, 16, 4),
                encoder_hidden_states=torch.randn(1, 7, 32),
                pooled_projections=torch.randn(1, 32),
                timestep=torch.tensor([1.0]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(7, 3),
            )

    runs = []

    def run(**more):
        runs.append(tiny(**more))

    names = {"pipe": tiny.pipe, "model": model, "run": run, "call_model": call_model}
    names["load_gguf"] = load_gguf
    if title == "IP-Adapter":
        names |= {"weights": ip_adapter_state(model), "embeds": torch.randn(2, 1, 16)}
    exec(compile(code, f"docs/diffusers.md, {title}", "exec"), names)
    sage = vars(tiny.pipe).get("sage")
    if sage is not None and sage.patch is not None and sage.summary().calls:
        assert sage.summary().quantized > 0 and not sage.summary().warnings
    torch._dynamo.reset()


def test_the_page_has_its_recipes():
    assert len(RECIPES) >= 16
