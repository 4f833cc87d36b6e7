"""Models whose attention does not ask for an override: reached through their modules, or said."""

from __future__ import annotations

import pytest
import torch

from sage_diffusion.integrations.comfy import attached, patch


def error(actual, exact):
    return float((actual - exact).norm() / exact.norm())


def test_a_model_without_the_override_is_reached_through_its_modules(families):
    """As PixArt does: attention is called without ``transformer_options``."""
    from silent_attention import Silent

    sd3 = families("sd3")
    model = sd3.model.clone()
    blocks = model.model.diffusion_model.joint_blocks
    plain = sd3.sample()
    silent = Silent()
    blocks[0].add_module("silent", silent)
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

    host = mmdit.optimized_attention

    def route(q, k, v, heads, **kwargs):
        return blocks[0].silent(q, k, v, heads)

    mmdit.optimized_attention = route
    try:
        patched = patch(model, "int8/fp16")
        quantized = sd3.sample(patched)
        assert 0 < error(quantized, plain) < 0.01
        summary = attached(patched).last.summary
        assert [layer.name for layer in summary.layers] == ["double.00.silent"]
        assert summary.quantized == 6
        assert torch.equal(sd3.sample(model), plain)
        assert "forward" not in silent.__dict__
    finally:
        mmdit.optimized_attention = host
        del blocks[0].silent


def test_a_model_out_of_reach_is_a_warning(families):
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

    sd3 = families("sd3")
    host = mmdit.optimized_attention

    def deaf(*args, **kwargs):
        kwargs.pop("transformer_options")
        return host(*args, **kwargs)

    mmdit.optimized_attention = deaf
    try:
        patched = patch(sd3.model, "int8/fp16")
        sd3.sample(patched)
    finally:
        mmdit.optimized_attention = host
    assert "NOT QUANTIZED: no attention call of SD3 was intercepted" in str(attached(patched).last)


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        ("comfy.ldm.pixart.blocks", "AttentionKVCompress", {"dim": 64, "num_heads": 2}),
        ("comfy.ldm.hydit.attn_layers", "Attention", {"dim": 64, "num_heads": 2}),
    ],
)
def test_silent_families_are_recognized(module, name, options):
    import importlib

    import comfy.ops

    from sage_diffusion.integrations.comfy.layers import reach_of

    cls = getattr(importlib.import_module(module), name)
    host = torch.nn.Module()
    host.blocks = torch.nn.ModuleList(
        [cls(**options, operations=comfy.ops.disable_weight_init) for _ in range(2)]
    )
    assert list(reach_of(host).hidden) == ["double.00", "double.01"]
