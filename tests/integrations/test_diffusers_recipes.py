"""Every recipe of docs/diffusers.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from integrations.tiny_pipelines import build

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"
RECIPES = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.M | re.S)

#: Recipe -> the pipeline that it is for; Flux where it does not matter.
PIPES = {"Image-to-image on shared parts": "sd15", "ControlNet": "sd15", "Wan 2.2": "wan"}
NEEDS = {"LoRA": "peft", "Offloading": "accelerate"}


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

    names = {"pipe": tiny.pipe, "model": model, "run": tiny, "call_model": call_model}
    exec(compile(code, f"docs/diffusers.md, {title}", "exec"), names)
    sage = vars(tiny.pipe).get("sage")
    if sage is not None and sage.patch is not None and sage.summary().calls:
        assert sage.summary().quantized > 0 and not sage.summary().warnings
    torch._dynamo.reset()


def test_the_page_has_its_recipes():
    assert len(RECIPES) >= 10
