"""Branches of guidance: off, switched off in mid-run, of another pipeline, of modular guiders."""

from __future__ import annotations

import diffusers
import pytest
import torch
from integrations.tiny_pipelines import build

from sage_diffusion import AttentionSession, PrecisionPlan, Rule, enable
from sage_diffusion.integrations.diffusers import apply
from sage_diffusion.integrations.diffusers.guidance import branches_of

PLAN = PrecisionPlan("fp16", (Rule("int8/fp8", branch="cond"), Rule("int8/int8", branch="uncond")))


class Branches:
    """Branches and specs, by step."""

    def __init__(self):
        self.seen = {}

    def observe(self, event):
        self.seen.setdefault(event.step, set()).add((event.branch, str(event.spec)))

    @property
    def all(self):
        return set().union(*self.seen.values())


COND, UNCOND = ("cond", "int8/fp8"), ("uncond", "int8/int8")


def watched(pipe):
    seen = Branches()
    enable(pipe, AttentionSession(PLAN, observers=[seen]))
    return seen


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("sd15", {"guidance_scale": 1.0}),
        ("sd3", {"guidance_scale": 1.0}),
        ("pixart", {"guidance_scale": 1.0}),  # a variable of its call, no property
        ("wan", {"guidance_scale": 1.0}),
        ("flux2", {}),  # its guidance is an input of the model
    ],
)
def test_without_guidance_every_call_is_conditional(name, off):
    tiny = build(name)
    seen = watched(tiny.pipe)
    tiny(steps=2, **off)
    assert seen.all == {COND}


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart", "wan"])
def test_with_guidance_both_are_told_apart(name):
    tiny = build(name)
    seen = watched(tiny.pipe)
    tiny(steps=2)
    assert seen.all == {COND, UNCOND}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_guidance_switched_off_in_mid_run(name, pictures):
    names = ["prompt_embeds"]
    if name == "sdxl":
        names += ["add_text_embeds", "add_time_ids"]

    def off(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs |= {key: kwargs[key].chunk(2)[-1] for key in names}
        return kwargs

    tiny = build(name)
    seen = watched(tiny.pipe)
    tiny(
        steps=4,
        num_images_per_prompt=pictures,
        callback_on_step_end=off,
        callback_on_step_end_tensor_inputs=names,
    )
    assert [seen.seen[step] for step in range(4)] == [{COND, UNCOND}] * 2 + [{COND}] * 2


@pytest.mark.parametrize("made", ["parts", "from_pipe"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_second_pipeline_over_the_same_parts_guides_for_itself(made, scale):
    tiny = build("sd15")
    seen = watched(tiny.pipe)
    tiny()
    cls = diffusers.StableDiffusionImg2ImgPipeline
    if made == "parts":
        second = cls(**tiny.pipe.components, requires_safety_checker=False)
    else:
        second = cls.from_pipe(tiny.pipe)
    second.set_progress_bar_config(disable=True)
    seen.seen.clear()
    kwargs = {k: v for k, v in tiny.kwargs.items() if "embeds" in k}
    second(
        image=torch.rand(1, 3, 16, 16),
        num_images_per_prompt=2,
        guidance_scale=scale,
        strength=0.5,
        num_inference_steps=4,
        output_type="pt",
        **kwargs,
    )
    assert seen.all == ({COND} if scale == 1 else {COND, UNCOND})
    assert second.sage is tiny.pipe.sage
    seen.seen.clear()
    tiny()
    assert seen.all == {COND, UNCOND}
    tiny.pipe.set_attn_processor(None)
    assert "progress_bar" not in vars(second)


def test_calls_for_one_branch_only_are_not_split():
    """ControlNet's guess mode runs the control on the conditional half; with two pictures, too."""
    tiny = build("sd15")
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **tiny.pipe.components,
        controlnet=diffusers.ControlNetModel.from_unet(
            tiny.pipe.unet, conditioning_embedding_out_channels=(8,)
        ),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    calls = []

    class Calls:
        def observe(self, event):
            calls.append((event.layer.component, event.branch, event.q.shape[0]))

    apply(pipe, AttentionSession("fp16", observers=[Calls()]))
    pipe(
        image=torch.rand(1, 3, 16, 16),
        num_images_per_prompt=2,
        guess_mode=True,
        num_inference_steps=1,
        output_type="latent",
        **tiny.kwargs,
    )
    assert set(calls) == {
        ("controlnet", None, 2),
        ("unet", "cond", 2),
        ("unet", "uncond", 2),
    }


@pytest.mark.parametrize(("guidance", "branches"), [(5.0, {COND, UNCOND}), (1.0, {COND})])
def test_guiders_of_modular_pipelines_name_the_branches(guidance, branches):
    from diffusers.modular_pipelines.wan import modular_blocks_wan

    tiny = build("wan")
    pipe = modular_blocks_wan.WanBlocks().sub_blocks["denoise"].init_pipeline()
    pipe.update_components(
        transformer=tiny.pipe.transformer,
        scheduler=tiny.pipe.scheduler,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=guidance),
    )
    seen = watched(pipe)
    embeds = {k: v.repeat(2, 1, 1) for k, v in tiny.kwargs.items() if "embeds" in k}
    pipe(**embeds, height=16, width=16, num_frames=5, num_inference_steps=2)  # two videos
    assert seen.all == branches
    assert set(seen.seen) == {0, 1}
    pipe.set_attn_processor(None)
    assert "prepare_models" not in vars(pipe.guider)


class Own:
    """What a pipeline of one's own may say."""

    components: dict = {}  # noqa: RUF012

    def __call__(self, negative_prompt=None):
        pass


def test_what_a_pipeline_says_itself_counts():
    own = Own()
    assert branches_of(own) == (None, ())  # it knows a negative prompt, and does not tell more
    own.do_classifier_free_guidance = False
    assert branches_of(own, said=True) == ("cond", ())
    own.guidance_chunks = ("cond", "uncond")
    assert branches_of(own) == (None, ("cond", "uncond"))
