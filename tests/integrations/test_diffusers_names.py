"""Names of layers in pipelines of several denoisers, and what counts as one."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch
from integrations.test_diffusers_schedule import Loop
from integrations.tiny_models import build as build_model
from integrations.tiny_pipelines import build

from sage_diffusion import AttentionSession, PlanError, PrecisionPlan, Rule, enable
from sage_diffusion.integrations.diffusers import apply, model_name
from sage_diffusion.plan.fingerprint import fingerprint
from sage_diffusion.plan.names import LayerName, means


def control_pipe():
    tiny = build("sd15")
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **tiny.pipe.components,
        controlnet=diffusers.ControlNetModel.from_unet(tiny.pipe.unet),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return tiny.pipe, pipe, tiny.kwargs


def two_experts():
    tiny = build("wan")
    parts = dict(tiny.pipe.components) | {"transformer_2": copy.deepcopy(tiny.pipe.transformer)}
    pipe = diffusers.WanPipeline(**parts, boundary_ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    return tiny.pipe, pipe, tiny.kwargs


def layers(pipe):
    session = AttentionSession("fp16")
    with apply(pipe, session):
        return list(session.layers)


def quantized(pipe, plan):
    """Names of the layers that a plan quantizes at its first step."""
    session = AttentionSession("fp16")
    with apply(pipe, session):
        session.plan = plan
        return {name for name in session.layers if session.quantizes(name, 64)}


@pytest.mark.parametrize("pipes", [control_pipe, two_experts])
def test_a_layer_s_name_does_not_depend_on_the_other_denoisers(pipes):
    alone, together, _ = pipes()
    names = layers(together)
    assert names[: len(layers(alone))] == layers(alone)
    others = names[len(layers(alone)) :]
    assert others and all(
        name.partition(".")[0] in ("controlnet", "transformer_2") for name in others
    )


@pytest.mark.parametrize("pipes", [control_pipe, two_experts])
def test_plans_of_one_denoiser_fit_pipelines_with_more(pipes, caplog):
    alone, together, _ = pipes()
    names = layers(alone)
    calibrated = PrecisionPlan(
        "fp16",
        tuple(Rule("int8/fp8", name) for name in names),
        model=model_name(alone),
        fingerprint=fingerprint(names, model=model_name(alone), head_dims=dict.fromkeys(names, 8)),
    )
    calibrated = PrecisionPlan.from_json(calibrated.to_json())
    enable(together).set_attn_processor(calibrated, strict=True)
    assert not caplog.text
    everything = set(layers(together))
    assert quantized(together, calibrated) == everything  # the same paths inside of both
    first = PrecisionPlan("fp16", (Rule("int8/fp8", names[0]),))
    assert len(quantized(together, first)) == 2


def test_a_rule_may_name_the_component():
    alone, pipe, _ = control_pipe()
    own, every = set(layers(alone)), set(layers(pipe))

    def only(glob):
        return quantized(pipe, PrecisionPlan("fp16", (Rule("int8/fp8", glob),)))

    assert only("*") == every
    assert only("unet.*") == own == only("un?t.*.attn*")
    assert only("controlnet.*") == every - own
    assert only("unet*") == set()  # no path begins so, and the dot says that a component is meant
    assert only("down_blocks.*") == {name for name in every if "down_blocks" in name}
    assert quantized(alone, PrecisionPlan("fp16", (Rule("int8/fp8", "unet.*"),))) == own


def test_plans_that_name_a_component_mean_what_they_meant():
    _, pipe, _ = two_experts()
    every = layers(pipe)
    old = PrecisionPlan(
        "fp16",
        (
            Rule("int8/fp8", "transformer.blocks.0.attn1"),
            Rule("int8/int8", "transformer_2.blocks.1.*"),
            Rule("int8/fp16", "blocks.1.*"),
        ),
    )
    assert quantized(pipe, old) == {
        "blocks.0.attn1",
        *(name for name in every if ".1." in name or name.startswith("blocks.1.")),
    } - {name for name in every if name.startswith("transformer_2.blocks.0")}
    assert old.resolve(LayerName("blocks.1.attn1", "transformer_2", False), 0).pv == "int8"
    assert old.resolve(LayerName("blocks.1.attn1", "transformer"), 0).pv == "fp16"
    # One of two: calibrated on both, it knows the second although no rule names it.
    known = PrecisionPlan(
        "fp16", (Rule("int8/fp8", "blocks.*"),), fingerprint={"layers": list(map(str, every))}
    )
    assert quantized(pipe, known) == {name for name in every if name.startswith("blocks")}
    with pytest.raises(PlanError, match="another model"):
        apply(pipe, AttentionSession(PrecisionPlan("fp16", (Rule("int8/fp8", "down_blocks.*"),))))


def test_both_experts_run_what_a_plan_for_one_says():
    _, pipe, kwargs = two_experts()
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", "blocks.*.attn1"),))
    enable(pipe).set_attn_processor(plan)
    pipe(num_inference_steps=4, output_type="latent", **kwargs)
    ran = {layer.name for layer in pipe.sage.summary().layers if layer.quantized}
    assert ran == {f"{part}blocks.{i}.attn1" for part in ("", "transformer_2.") for i in (0, 1)}


def test_names_survive_copies_pickles_and_json():
    name = LayerName("blocks.0.attn1", "transformer_2", False)
    for other in (copy.deepcopy(name), pickle.loads(pickle.dumps(name)), name.sub(1)):
        assert isinstance(other, LayerName) and other.component == "transformer_2"
    assert name.sub(1) == "transformer_2.blocks.0.attn1.1"
    assert name.sub(1).path == "blocks.0.attn1.1"
    assert LayerName("a.b", "unet").sub(2) == "a.b.2"
    assert means("b*", name) and not means("b*", str(name))


# ---------------------------------------------------------------------- what denoises
class Parts:
    """Components of a pipeline, and nothing else of it."""

    def __init__(self, **components):
        self.components = components


def text_conditioner():
    return diffusers.AnimaTextConditioner(
        source_dim=32,
        target_dim=32,
        model_dim=32,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=50,
        min_sequence_length=8,
    )


@pytest.mark.skipif(not hasattr(diffusers, "AnimaTextConditioner"), reason="an older diffusers")
@pytest.mark.parametrize("name", ["text_conditioner", "prior", "adapter"])
def test_what_is_told_no_time_does_not_denoise_whatever_it_is_called(name):
    pipe = Parts(**{name: text_conditioner(), "unet_vae": build("sd15").pipe.vae})
    pipe.components["net"] = build("flux").denoiser
    names = layers(pipe)
    assert {each.component for each in names} == {"net"}
    assert names[0] == "transformer_blocks.0.attn"


def test_masked_transformers_are_told_no_time_and_denoise_all_the_same():
    vq = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    unvit = diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=8,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=8,
        vocab_size=16,
        codebook_size=12,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        block_num_heads=2,
    )
    assert {each.component for each in layers(Parts(vqvae=vq, transformer=unvit))} == {
        "transformer"
    }


class WithDecoder(Loop):
    """Decodes by a diffusion model of its own, which its scheduler knows nothing of."""

    def __init__(self):
        super().__init__(diffusers.DDIMScheduler())
        self.components["finisher"] = build_model("UNet2DModel")

    def __call__(self, steps):
        super().__call__(steps)
        for _ in range(2):
            self.components["finisher"](torch.zeros(1, 4, 16, 16), torch.tensor([1]))


def test_a_diffusion_model_that_runs_apart_from_the_steps_is_left_alone():
    pipe = WithDecoder()
    patch = apply(pipe, AttentionSession("int8/fp8"))
    with torch.no_grad():
        pipe(3)
        pipe(3)
    ran = {layer.name.partition(".")[0]: layer for layer in patch.summary().layers if layer.calls}
    assert ran["finisher"].ran == {("fp16", "native"): 4}
    assert ran["transformer_blocks"].quantized == 6
