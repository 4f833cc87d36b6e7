"""What users type: enable with a plan, names of plans, what is said when nothing is quantized."""

from __future__ import annotations

import logging
import re

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from integrations.tiny_pipelines import build

import sage_diffusion
from sage_diffusion import AttentionSession, AttentionSpec, PlanError, PrecisionPlan, Rule, enable
from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.integrations.diffusers import SageAttnProcessor, apply
from sage_diffusion.plan.catalog import shipped
from sage_diffusion.plan.rules import VERSION


def processors(model):
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


# ---------------------------------------------------------------------- ease
def test_enable_with_a_plan_acts_at_once():
    tiny = build("flux")
    assert enable(tiny.pipe, "int8") is tiny.pipe
    tiny(steps=1)
    assert tiny.pipe.sage.summary().specs == {"int8/fp8": 4}
    enable(tiny.pipe, "int4", strict=True)
    assert tiny.pipe.sage.session.strict
    with pytest.raises(PlanError):
        enable(tiny.pipe, PrecisionPlan("fp16", (Rule("int8", "down_blocks.*"),)))
    assert str(tiny.pipe.sage.session.plan.default) == "int4/fp8-fast"


def test_enable_takes_models_and_refuses_before_it_changes_anything():
    model = build("sd15").pipe.unet
    assert enable(model, "int8/fp8").sage.session.layers
    model.sage.set_attn_processor(None)
    assert {type(p).__name__ for p in processors(model)} == {"AttnProcessor2_0"}
    assert type(model).set_attn_processor.__name__ == "set_attn_processor"
    model.set_attn_processor(attention_processor.AttnProcessor2_0())  # its own, still
    pipe = build("flux").pipe
    with pytest.raises(ValueError, match="plans by name are bundled"):
        enable(pipe, "int5")
    assert "sage" not in vars(pipe) and "set_attn_processor" not in vars(pipe)


def test_apply_is_exported():
    assert sage_diffusion.apply is apply


@pytest.mark.parametrize(
    ("alias", "name"),
    [("int8", "int8/fp8"), ("int4", "int4/fp8-fast"), ("fp8", "fp8/fp8"), ("FP4", "fp4/fp4")],
)
def test_short_names(alias, name):
    assert AttentionSpec.parse(alias) == AttentionSpec.parse(name)
    assert str(PrecisionPlan.of(alias).default) == name
    switched = AttentionSpec.parse(alias + "-smooth_k")
    assert switched == AttentionSpec.parse(name + "-smooth_k")


@pytest.mark.parametrize("text", ["int8-fast", "bf16", "wan2", "int8/"])
def test_other_names_are_refused_with_the_list(text):
    with pytest.raises(ValueError, match=r"is not an attention spec.*plans by name are .*wan"):
        PrecisionPlan.of(text)


def test_shipped_plans_are_found_by_name():
    assert "wan" in shipped()
    for name in shipped():
        assert PrecisionPlan.of(name).to_dict()["version"] == VERSION
    pipe = enable(build("wan").pipe, "wan")
    assert pipe.sage.session.plan.name.startswith("Wan 2.1")


def test_reprs_are_read_at_a_glance():
    tiny = build("flux")
    pipe = enable(tiny.pipe)
    assert repr(pipe.sage) == "<sage of FluxPipeline: nothing is set>"
    patch = pipe.set_attn_processor(PrecisionPlan("int4", (Rule("int8", end=0.5),), name="mine"))
    session = "<AttentionSession 'mine', int4/fp8-fast, 1 rules: 4 layers, not sampling>"
    assert repr(pipe.sage) == f"<sage of FluxPipeline: {session}>"
    assert repr(patch) == f"<Patch of FluxPipeline: {session}>"
    patch.remove()
    assert repr(patch) == "<Patch of FluxPipeline: removed>"


def test_pipelines_made_of_the_parts_have_the_same_sage():
    tiny = build("sd15")
    enable(tiny.pipe, "int8")
    second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.pipe)
    assert second.sage is tiny.pipe.sage
    stranger = build("sd15").pipe
    assert not hasattr(stranger, "sage")


# ---------------------------------------------------------------------- nothing is silent
class ByHand:
    """Unknown to everybody."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(other), attn.to_v(other)
        return attn.to_out[0](torch.softmax(q @ k.mT, -1) @ v)


class Linear(ByHand):
    """No softmax: nothing to say of it, whatever stands in its base class."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return attn.to_out[0](hidden_states)


def slices(unet):
    unet.set_attention_slice("auto")


def by_hand(unet):
    unet.set_attn_processor(ByHand())


def default(unet):
    unet.set_default_attn_processor()


SWAPS = [
    (slices, "SlicedAttnProcessor", r"disable_attention_slicing\(\)"),
    (by_hand, "ByHand", "AttnProcessor2_0"),
    (default, "AttnProcessor", "AttnProcessor2_0"),
]


@pytest.mark.parametrize(("swap", "name", "cure"), SWAPS)
def test_softmax_attention_that_passes_by_is_one_warning(swap, name, cure, caplog):
    tiny = build("sd15")
    patch = apply(tiny.pipe, "int8/fp8")
    swap(tiny.pipe.unet)
    with caplog.at_level(logging.WARNING, "sage_diffusion"):
        tiny()
        tiny()
    said = [r.getMessage() for r in caplog.records if f"{name} computes" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("8 attention modules (down_blocks")
    assert any(f"{name} computes" in warning for warning in patch.summary().warnings)
    assert re.search(cure, said[0])


@pytest.mark.parametrize(("swap", "name", "cure"), SWAPS)
def test_in_strict_it_is_an_error(swap, name, cure):
    tiny = build("sd15")
    patch = enable(tiny.pipe).set_attn_processor("int8/fp8", strict=True)
    swap(tiny.pipe.unet)
    with pytest.raises(AttentionRefused, match=f"{name} computes.*{cure}"):
        tiny()
    patch.session.plan = "fp16"
    tiny()  # nothing was to be quantized
    assert not patch.session.run


@pytest.mark.parametrize(("swap", "name", "cure"), SWAPS)
def test_a_model_that_has_nothing_else_is_refused_with_the_cure(swap, name, cure):
    tiny = build("sd15")
    swap(tiny.pipe.unet)
    with pytest.raises(ValueError, match=f"has no attention to quantize.*{name} computes.*{cure}"):
        enable(tiny.pipe, "int8/fp8")


def test_what_computes_no_softmax_is_only_listed(caplog):
    tiny = build("sd15")
    own = tiny.pipe.unet.attn_processors
    some = {key: Linear() if "mid" in key or "down" in key else p for key, p in own.items()}
    tiny.pipe.unet.set_attn_processor(some)
    patch = enable(tiny.pipe).set_attn_processor("int8/fp8", strict=True)
    tiny()
    assert set(patch.summary().skipped.values()) == {"Linear"}
    assert not patch.summary().warnings and not caplog.records


def test_set_attn_processor_that_fails_leaves_what_was_there():
    tiny = build("sd15")
    own = processors(tiny.pipe.unet)
    half = tiny.pipe.unet.attn_processors
    half = {key: ByHand() if "down" in key else p for key, p in half.items()}
    for before in (None, "fp16"):
        if before is not None:
            tiny.pipe.unet.set_attn_processor(dict(zip(half, own, strict=True)))
            kept = enable(tiny.pipe).set_attn_processor(before)
        tiny.pipe.unet.set_attn_processor(dict(half))
        there = processors(tiny.pipe.unet)
        with pytest.raises(AttentionRefused):
            enable(tiny.pipe).set_attn_processor("int8/fp8", strict=True)
        assert (
            "progress_bar" in vars(tiny.pipe) if before else "progress_bar" not in vars(tiny.pipe)
        )
        assert type(tiny.pipe.scheduler) == diffusers.DDIMScheduler  # noqa: E721
        if before is None:
            assert all(a is b for a, b in zip(processors(tiny.pipe.unet), there, strict=True))
            assert tiny.pipe.sage.patch is None
        else:
            assert tiny.pipe.sage.patch is kept
            tiny()
            assert kept.summary().calls == 2 * 6


def test_a_marker_that_fails_leaves_the_processors():
    unet = build("sd15").pipe.unet
    before = processors(unet)
    marker = SageAttnProcessor(PrecisionPlan("fp16", (Rule("int8", "transformer_blocks.*"),)))
    mixed = {
        key: marker if "attn1" in key else attention_processor.AttnProcessor2_0()
        for key in unet.attn_processors
    }
    with pytest.raises(PlanError):
        unet.set_attn_processor(mixed)
    assert all(a is b for a, b in zip(processors(unet), before, strict=True))


@pytest.mark.parametrize("how", ["marker", "model"])
def test_rules_of_time_without_a_pipeline_are_warned_of(how, caplog):
    tiny = build("sd3")
    session = AttentionSession(PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),)))
    if how == "marker":
        tiny.denoiser.set_attn_processor(SageAttnProcessor(session))
    else:
        apply(tiny.denoiser, session)
    tiny(steps=2)
    [warning] = session.summary().warnings
    assert "nobody says where sampling stands" in warning and "enable" in warning
    assert caplog.text.count("nobody says") == 1
    session.warnings.clear()
    with session.at(0.7):
        tiny(steps=1)
    assert not session.summary().warnings
