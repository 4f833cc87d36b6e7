"""Twelve pipelines end to end: every attention call, the schedule, the plan, the undo."""

from __future__ import annotations

import functools
from collections import Counter

import diffusers
import pytest
import torch
from integrations.tiny_pipelines import PIPELINES, Tiny, build
from torch import Tensor

from sage_diffusion import AttentionSession, PlanError, PrecisionPlan, Rule, enable
from sage_diffusion.integrations.diffusers import SageAttnProcessor, apply
from sage_diffusion.kernels.spec import AttentionSpec

NAMES = list(PIPELINES)


@functools.cache
def plain(name: str) -> Tensor:
    """What the untouched pipeline gives."""
    return build(name)(steps=2)


class Watcher:
    """Keeps what every call was decided to be."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, float, str | None, str]] = []

    def observe(self, event) -> None:
        self.calls.append((event.layer, event.step, event.progress, event.branch, str(event.spec)))


def count_calls(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> int:
    """Attention calls of the denoiser that reach PyTorch."""
    inside = []
    calls = Counter()
    real = torch.nn.functional.scaled_dot_product_attention

    def counting(*args, **kwargs):
        calls[bool(inside)] += 1
        return real(*args, **kwargs)

    before = tiny.denoiser.register_forward_pre_hook(lambda *a: inside.append(1))
    after = tiny.denoiser.register_forward_hook(lambda *a: inside.clear())
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
        tiny(steps=2)
    before.remove()
    after.remove()
    return calls[True]


@pytest.mark.parametrize("name", NAMES)
def test_fp16_reaches_every_call_and_changes_nothing(name, monkeypatch):
    tiny = build(name)
    expected = count_calls(tiny, monkeypatch)
    patch = enable(tiny.pipe).set_attn_processor("fp16")

    assert torch.equal(tiny(steps=2), plain(name))
    summary = patch.summary()
    assert summary.calls == expected > 0
    assert summary.specs == {"fp16": expected}
    assert not summary.quantized and not summary.declined


@pytest.mark.parametrize("name", NAMES)
def test_quantized_is_close_and_removal_is_exact(name):
    tiny = build(name)
    enable(tiny.pipe)
    with tiny.pipe.set_attn_processor("int8/fp8") as patch:
        out = tiny(steps=2)
        summary = patch.summary()

    assert summary.quantized == summary.calls > 0
    reference = plain(name).double().flatten()
    assert not torch.equal(out, plain(name))
    assert torch.nn.functional.cosine_similarity(out.double().flatten(), reference, dim=0) > 0.999
    assert torch.equal(tiny(steps=2), plain(name))
    assert patch.summary().calls == summary.calls  # nothing comes to it any more


@pytest.mark.parametrize("name", NAMES)
def test_each_step_runs_what_the_plan_says(name):
    tiny = build(name)
    plan = PrecisionPlan("int8/fp8", (Rule("fp16", start=0.0, end=0.4), Rule("int8/int8", end=0.9)))
    watcher = Watcher()
    apply(tiny.pipe, AttentionSession(plan, observers=[watcher]))
    tiny(steps=3)

    seen = {(step, progress, spec) for _, step, progress, _, spec in watcher.calls}
    assert seen == {(0, 0.0, "fp16"), (1, 0.5, "int8/int8"), (2, 1.0, "int8/fp8")}
    layers = Counter(layer for layer, *_ in watcher.calls)
    assert len(set(layers.values())) == 1  # every layer ran equally often


def test_sampling_that_ends_leaves_the_session_outside():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    tiny(steps=2)
    assert (patch.session.where.step, patch.session.where.progress) == (-1, 0.0)
    tiny(steps=2)
    assert patch.session.where.steps == 2


@pytest.mark.parametrize("name", ["wan", "qwenimage"])
def test_guidance_branches_are_reported_apart(name):
    tiny = build(name)
    watcher = Watcher()
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", branch="uncond"),))
    apply(tiny.pipe, AttentionSession(plan, observers=[watcher]))
    tiny(steps=2)
    assert {(branch, spec) for *_, branch, spec in watcher.calls} == {
        ("cond", "fp16"),
        ("uncond", "int8/fp8"),
    }


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_guidance_in_one_batch_is_split_where_the_branches_differ(name):
    tiny = build(name)
    watcher = Watcher()
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", branch="uncond"),))
    patch = apply(tiny.pipe, AttentionSession(plan, observers=[watcher]))
    mixed = tiny(steps=1)
    assert {(branch, spec) for *_, branch, spec in watcher.calls} == {
        ("cond", "fp16"),
        ("uncond", "int8/fp8"),
    }
    patch.session.plan = "int8/fp8"
    quantized = tiny(steps=1)
    patch.session.plan = "fp16"
    exact = tiny(steps=1)
    errors = [(x - exact).norm() for x in (mixed, quantized)]
    assert 0 < errors[0] != errors[1] > 0


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPMScheduler",
        "PNDMScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "LMSDiscreteScheduler",
        "LCMScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_progress_follows_any_scheduler(scheduler):
    tiny = build("sd15")
    tiny.pipe.scheduler = getattr(diffusers, scheduler)()
    watcher = Watcher()
    apply(tiny.pipe, AttentionSession("fp16", observers=[watcher]))
    tiny(steps=4)

    entries = len(tiny.pipe.scheduler.timesteps)
    progress = list(dict.fromkeys(p for _, _, p, _, _ in watcher.calls))
    assert progress == [pytest.approx(i / (entries - 1)) for i in range(entries)]


def test_a_scheduler_exchanged_later_is_followed():
    tiny = build("sd15")
    watcher = Watcher()
    patch = apply(tiny.pipe, AttentionSession("fp16", observers=[watcher]))
    first = tiny.pipe.scheduler
    tiny.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    tiny(steps=3)

    assert {(step, p) for _, step, p, *_ in watcher.calls} == {(0, 0.0), (1, 0.5), (2, 1.0)}
    assert patch.schedule == tuple(tiny.pipe.scheduler.sigmas[:3].tolist())
    assert "step" not in vars(first)
    patch.remove()
    assert "step" not in vars(tiny.pipe.scheduler)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_image_to_image_starts_in_mid_schedule(name):
    tiny = build(name)
    cls = {
        "sd15": diffusers.StableDiffusionImg2ImgPipeline,
        "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    }[name]
    pipe = cls(
        **{k: v for k, v in tiny.pipe.components.items() if k != "safety_checker"},
        **({"safety_checker": None, "requires_safety_checker": False} if name == "sd15" else {}),
    )
    pipe.set_progress_bar_config(disable=True)
    watcher = Watcher()
    apply(pipe, AttentionSession("fp16", observers=[watcher]))
    kwargs = {k: v for k, v in tiny.kwargs.items() if k not in ("height", "width")}
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if name == "sd3":
        kwargs |= {"height": 16, "width": 16}
    pipe(image=image, strength=0.5, num_inference_steps=4, output_type="pt", **kwargs)
    progress = list(dict.fromkeys(p for _, _, p, _, _ in watcher.calls))
    assert progress == [pytest.approx(2 / 3), 1.0]


def test_a_plan_with_a_schedule_of_its_own_is_looked_up_by_sigma():
    tiny = build("flux")
    watcher = Watcher()
    plan = PrecisionPlan("fp16", schedule=(1.0, 0.9, 0.0))
    apply(tiny.pipe, AttentionSession(plan, observers=[watcher]))
    tiny(steps=2)  # sigmas 1.0 and 0.5
    expected = [0.0, pytest.approx(0.5 + 0.5 * 0.4 / 0.9)]
    assert list(dict.fromkeys(p for _, _, p, _, _ in watcher.calls)) == expected


def test_head_dims_of_sixty_four_reach_the_quantizers():
    tiny = build("flux")
    reached = []

    class Dims:
        def observe(self, event) -> None:
            reached.append((event.q.shape[-1], str(event.spec)))

    apply(tiny.pipe, AttentionSession("int4/fp8-fast", observers=[Dims()]))
    tiny(steps=1)
    assert set(reached) == {(64, "int4/fp8-fast")}


# ---------------------------------------------------------------------- the interface
def test_set_attn_processor_takes_whatever_says_what_to_run(tmp_path):
    tiny = build("flux")
    pipe = enable(tiny.pipe)
    path = tmp_path / "plan.json"
    plan = PrecisionPlan("int8/fp8", (Rule("fp16", "single*"),))
    plan.save(path)
    session = AttentionSession("int8/int8")
    marker = SageAttnProcessor("int8/fp16")
    for source, expected in (
        ("int8/fp8", "int8/fp8"),
        (AttentionSpec.parse("int8/int8"), "int8/int8"),
        (plan, "int8/fp8"),
        (path, "int8/fp8"),
        (str(path), "int8/fp8"),
        (session, "int8/int8"),
        (marker, "int8/fp16"),
    ):
        patch = pipe.set_attn_processor(source)
        tiny(steps=1)
        assert expected in patch.summary().specs
        assert pipe.sage.session is patch.session
    assert patch.session is marker.session
    assert pipe.set_attn_processor(None) is None
    assert torch.equal(tiny(steps=2), plain("flux"))


def test_a_second_set_replaces_the_first():
    tiny = build("flux")
    pipe = enable(tiny.pipe)
    first = pipe.set_attn_processor("int8/fp8")
    second = pipe.set_attn_processor("fp16")
    tiny(steps=1)
    assert first.summary().calls == 0
    assert second.summary().calls > 0
    first.remove()
    tiny(steps=1)
    assert second.summary().calls == 2 * 4
    pipe.unset_attn_processor()
    assert torch.equal(tiny(steps=2), plain("flux"))


def test_enable_twice_keeps_what_is_set():
    tiny = build("flux")
    patch = enable(tiny.pipe).set_attn_processor("int8/fp8")
    assert enable(tiny.pipe) is tiny.pipe
    assert tiny.pipe.sage.patch is patch


def test_backend_and_strict_are_the_session_s():
    pipe = enable(build("flux").pipe)
    patch = pipe.set_attn_processor("int8/fp8", backend="reference", strict=True)
    assert (patch.session.backend, patch.session.strict) == ("reference", True)
    with pytest.raises(ValueError, match="its own backend"):
        pipe.set_attn_processor(AttentionSession("fp16"), strict=True)
    with pytest.raises(ValueError, match="backend must be one of"):
        pipe.set_attn_processor("int8/fp8", backend="cuda")


def test_summary_names_layers_and_what_is_not_routed():
    tiny = build("sana")
    pipe = enable(tiny.pipe)
    assert pipe.sage.summary().calls == 0
    pipe.set_attn_processor("int8/fp8")
    tiny(steps=1)
    text = str(pipe.sage.summary())
    assert "transformer_blocks.0.attn2  int8/fp8 (reference) x1" in text
    assert "transformer_blocks.0.attn1  not routed: SanaLinearAttnProcessor2_0" in text
    data = pipe.sage.summary().to_dict()
    assert data["skipped"] == {"transformer_blocks.0.attn1": "SanaLinearAttnProcessor2_0"}


# ---------------------------------------------------------------------- bad input
def test_a_plan_for_another_model_is_refused_and_nothing_changes():
    tiny = build("flux")
    pipe = enable(tiny.pipe)
    kept = pipe.set_attn_processor("int8/fp8")
    with pytest.raises(PlanError, match="another model"):
        pipe.set_attn_processor(PrecisionPlan("fp16", (Rule("int8/fp8", "down_blocks.*"),)))
    assert pipe.sage.patch is kept
    tiny(steps=1)
    assert kept.summary().quantized == 4


def test_a_rule_that_matches_nothing_is_logged(caplog):
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", "single*"), Rule("int8/fp8", "down_blocks.*")))
    apply(build("flux").pipe, AttentionSession(plan))
    assert "'down_blocks.*' matches no layer" in caplog.text
    with pytest.raises(PlanError, match="matches no layer"):
        apply(build("flux").pipe, AttentionSession(plan, strict=True))


def test_a_pipe_without_attention_is_refused():
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline has no attention to quantize"):
        enable(pipe).set_attn_processor("int8/fp8")


@pytest.mark.parametrize("target", [None, "flux", torch.zeros(1)])
def test_targets_that_are_no_pipelines_are_refused(target):
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline"):
        enable(target)
    with pytest.raises(TypeError, match="target must be a diffusers pipeline or model"):
        apply(target, AttentionSession("fp16"))


def test_enable_of_a_model_says_what_to_use():
    with pytest.raises(TypeError, match=r"apply\(model, session\)"):
        enable(build("flux").pipe.transformer)


def test_the_vae_is_never_touched():
    tiny = build("sd15")
    apply(tiny.pipe, AttentionSession("int8/fp8"))
    kinds = {type(m.processor).__name__ for m in tiny.pipe.vae.modules() if hasattr(m, "processor")}
    assert kinds == {"AttnProcessor2_0"}
