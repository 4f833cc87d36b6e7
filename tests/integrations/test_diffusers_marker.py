"""``SageAttnProcessor`` as diffusers takes it: ``model.set_attn_processor(..)``."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from integrations.tiny_pipelines import build
from routed import plain, processors, routed

from sage_diffusion import PrecisionPlan, Rule, SageAttnProcessor
from sage_diffusion.integrations.diffusers.processors import is_routed


# ---------------------------------------------------------------------- the marker
def test_a_model_s_own_method_takes_the_marker():
    tiny = build("sd3")
    before = processors(tiny.denoiser)
    marker = SageAttnProcessor(PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),)))
    tiny.denoiser.set_attn_processor(marker)
    assert torch.equal(tiny(steps=2), plain("sd3"))  # nobody says where sampling stands
    assert marker.summary().specs == {"fp16": 4}
    with marker.session.at(1.0):
        assert not torch.equal(tiny(steps=2), plain("sd3"))
    assert marker.summary().specs["int8/fp8"] == 4

    tiny.denoiser.set_attn_processor(SageAttnProcessor("int8/int8"))
    tiny(steps=1)
    assert sum(marker.summary().specs.values()) == 8
    tiny.denoiser.set_attn_processor(dict(zip(tiny.denoiser.attn_processors, before, strict=True)))
    assert torch.equal(tiny(steps=2), plain("sd3"))


MARKED = {
    "all": lambda model: SageAttnProcessor("int8/fp8"),
    # The plan is held against the whole model.
    "rules": lambda model: SageAttnProcessor(
        PrecisionPlan("fp16", (Rule("int8", "down_blocks.*"),)), strict=True
    ),
    "some": lambda model: (
        dict.fromkeys(model.attn_processors, SageAttnProcessor("int8/fp8"))
        | {key: own for key, own in model.attn_processors.items() if ".attn1." not in key}
    ),
}


@pytest.mark.parametrize("kind", MARKED)
def test_the_first_marker_of_a_program_is_understood(kind, monkeypatch):
    """Python looks the method up before it makes the argument."""
    SageAttnProcessor("fp16")
    for cls in (AttentionMixin, AttentionModuleMixin, attention_processor.Attention):
        name = "set_attn_processor" if cls is AttentionMixin else "set_processor"
        monkeypatch.setattr(cls, name, vars(cls)[name]._sage_original)  # as diffusers has it
    tiny = build("sd15")
    tiny.denoiser.set_attn_processor(MARKED[kind](tiny.denoiser))
    taken = [key for key, p in tiny.denoiser.attn_processors.items() if is_routed(p)]
    every = list(tiny.denoiser.attn_processors)
    assert taken == (every if kind != "some" else [key for key in every if ".attn1." in key])
    assert not torch.equal(tiny(steps=1), build("sd15")(steps=1))
    sessions = {tiny.denoiser.attn_processors[key]._sage_slot.session for key in taken}
    (session,) = sessions
    ran = {layer.name for layer in session.summary().layers if layer.quantized}
    assert ran == {
        key.removesuffix(".processor") for key in taken if kind != "rules" or "down_blocks" in key
    }


def test_a_marker_may_be_given_to_some_layers_only():
    tiny = build("sd15")
    marker = SageAttnProcessor("int8/fp8")
    kept = tiny.denoiser.attn_processors
    tiny.denoiser.set_attn_processor(
        {key: marker if ".attn1." in key else value for key, value in kept.items()}
    )
    tiny(steps=1)
    assert routed(tiny.denoiser) == 4
    assert all(".attn1" in layer.name for layer in marker.summary().layers)


def test_a_marker_put_into_a_module_directly_finds_its_default():
    tiny = build("flux")
    marker = SageAttnProcessor("fp16")
    for block in tiny.denoiser.transformer_blocks:
        block.attn.set_processor(marker)
    assert torch.equal(tiny(steps=2), plain("flux"))
    assert [layer.calls for layer in marker.summary().layers] == [2, 2]


def test_a_marker_without_a_default_says_what_to_do():
    tiny = build("sd15")
    module = next(m for m in tiny.denoiser.modules() if hasattr(m, "processor"))
    module.processor = SageAttnProcessor("fp16")
    with pytest.raises(TypeError, match="set_attn_processor"):
        tiny(steps=1)


def test_the_marker_refuses_what_is_no_plan():
    with pytest.raises(ValueError, match="int5"):
        SageAttnProcessor("int5/fp8")
