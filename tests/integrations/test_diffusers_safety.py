"""What hosts do to a patched pipeline: swap processors, copy, offload, cache, share, save."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
import weakref
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from integrations.tiny_adapters import ip_adapter_state
from integrations.tiny_pipelines import Tiny, build
from torch import Tensor, nn

from sage_diffusion import AttentionSession, PrecisionPlan, Rule, SageAttnProcessor, enable
from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.integrations.diffusers import apply
from sage_diffusion.integrations.diffusers.processors import is_routed


@functools.cache
def plain(name: str, steps: int = 2) -> Tensor:
    return build(name)(steps=steps)


def processors(model: nn.Module) -> list[object]:
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


def routed(model: nn.Module) -> int:
    return sum(is_routed(p) for p in processors(model))


def calls_per_step(name: str) -> int:
    return {"sd15": 8, "flux": 4, "wan": 8, "sd3": 2}[name]


# ---------------------------------------------------------------------- the processors themselves
def test_processors_stay_what_hosts_take_them_for():
    tiny = build("flux")
    before = processors(tiny.denoiser)
    apply(tiny.pipe, AttentionSession("fp16"))
    for old, new in zip(before, processors(tiny.denoiser), strict=True):
        assert isinstance(new, type(old))
        assert new.__class__ in (type(old),)
        assert {type(old): 1}[type(new)] == 1
        assert type(old).__name__ in type(new).__name__


def test_removal_puts_the_very_objects_back():
    tiny = build("wan")
    before = processors(tiny.denoiser)
    with apply(tiny.pipe, AttentionSession("int8/fp8")):
        assert all(a is not b for a, b in zip(before, processors(tiny.denoiser), strict=True))
    assert all(a is b for a, b in zip(before, processors(tiny.denoiser), strict=True))
    assert "cache_context" not in vars(tiny.denoiser)
    assert "step" not in vars(tiny.pipe.scheduler)
    assert "progress_bar" not in vars(tiny.pipe)


def test_what_the_host_sets_on_a_processor_survives_removal():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    backend = "_native_math"
    tiny.denoiser.set_attention_backend(backend)
    expected = tiny(steps=2)
    patch.remove()
    assert {p._attention_backend.value for p in processors(tiny.denoiser)} == {backend}
    assert torch.equal(tiny(steps=2), expected)
    tiny.denoiser.reset_attention_backend()
    diffusers.models.attention_dispatch._AttentionBackendRegistry.set_active_backend("native")


def test_the_dispatcher_s_backend_is_asked_where_the_plan_says_fp16(monkeypatch):
    tiny = build("flux")
    registry = diffusers.models.attention_dispatch._AttentionBackendRegistry
    seen = []
    names = diffusers.models.attention_dispatch.AttentionBackendName
    real = registry._backends[names._NATIVE_MATH]
    monkeypatch.setitem(
        registry._backends, names._NATIVE_MATH, lambda **kw: seen.append(1) or real(**kw)
    )
    for processor in processors(tiny.denoiser):
        processor._attention_backend = names._NATIVE_MATH
    apply(tiny.pipe, AttentionSession("fp16"))
    tiny(steps=1)
    assert len(seen) == 4


class SubclassedProcessor(attention_processor.AttnProcessor2_0):
    """Reaches attention through ``super()`` only."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return super().__call__(attn, hidden_states, *args, **kwargs) * 2


def helper(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class HelpedProcessor:
    """Spells the call out, in a function of its module, and keeps keyword-only arguments."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *, attention_mask=None):
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(other), attn.to_v(other)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = helper(q, k, v, attention_mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@pytest.mark.parametrize("cls", [SubclassedProcessor, HelpedProcessor])
def test_third_party_processors_are_routed(cls):
    tiny = build("sd15")
    tiny.denoiser.set_attn_processor(cls())
    expected = tiny(steps=1)
    patch = enable(tiny.pipe).set_attn_processor("fp16")
    assert torch.equal(tiny(steps=1), expected)
    assert patch.summary().calls == calls_per_step("sd15")
    patch = tiny.pipe.set_attn_processor("int8/fp8")
    assert not torch.equal(tiny(steps=1), expected)
    assert patch.summary().quantized == calls_per_step("sd15")


# ---------------------------------------------------------------------- hosts that swap processors
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_fused_projections(name):
    tiny = build(name)
    reference = build(name)
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    for pipe in (tiny.pipe, reference.pipe):
        (pipe.transformer if name == "flux" else pipe.unet).fuse_qkv_projections()
    fused = reference(steps=2)
    assert torch.equal(tiny(steps=2), fused)
    assert patch.summary().calls == 2 * calls_per_step(name)
    tiny.denoiser.unfuse_qkv_projections()
    assert torch.equal(tiny(steps=2), plain(name))
    assert patch.summary().calls == 4 * calls_per_step(name)
    patch.remove()
    assert routed(tiny.denoiser) == 0
    assert torch.equal(tiny(steps=2), plain(name))


def test_processors_kept_by_the_host_are_harmless_after_removal():
    tiny = build("sd15")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    tiny.denoiser.fuse_qkv_projections()  # keeps the routed ones
    patch.remove()
    tiny.denoiser.unfuse_qkv_projections()  # and puts them back
    assert torch.equal(tiny(steps=2), plain("sd15"))
    assert patch.summary().calls == 0
    again = apply(tiny.pipe, AttentionSession("int8/fp8"))
    tiny(steps=1)
    assert again.summary().quantized == calls_per_step("sd15")


def test_default_processors_can_be_set():
    tiny = build("sd15")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    tiny.denoiser.set_default_attn_processor()
    assert routed(tiny.denoiser) == 0
    tiny(steps=1)
    # The plain AttnProcessor computes the softmax by hand.
    assert set(patch.summary().skipped.values()) == {"AttnProcessor"}
    tiny.denoiser.set_attn_processor(attention_processor.AttnProcessor2_0())
    tiny(steps=1)
    assert patch.summary().quantized == calls_per_step("sd15")
    patch.remove()
    assert torch.equal(tiny(steps=2), plain("sd15"))


def test_processors_set_by_the_host_are_what_removal_restores():
    tiny = build("sd15")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    mine = attention_processor.AttnProcessor2_0()
    tiny.denoiser.set_attn_processor(mine)
    tiny(steps=1)
    assert patch.summary().quantized == calls_per_step("sd15")
    patch.remove()
    assert all(p is mine for p in processors(tiny.denoiser))


def test_a_new_processor_of_a_routed_class_is_routed_too():
    tiny = build("sd15")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    # As load_ip_adapter does for the layers that it leaves alone.
    fresh = {key: p.__class__() for key, p in tiny.denoiser.attn_processors.items()}
    tiny.denoiser.set_attn_processor(fresh)
    tiny(steps=1)
    assert patch.summary().quantized == calls_per_step("sd15")
    patch.remove()
    assert {type(p) for p in processors(tiny.denoiser)} == {attention_processor.AttnProcessor2_0}
    assert torch.equal(tiny(steps=2), plain("sd15"))


def test_one_routed_processor_put_into_every_module_is_reported_apart():
    tiny = build("sd15")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    tiny.denoiser.set_attn_processor(processors(tiny.denoiser)[0])
    tiny(steps=1)
    assert [layer.calls for layer in patch.summary().layers] == [1] * 8


@pytest.mark.parametrize("before", [True, False])
def test_ip_adapters(before):
    tiny, reference = build("sd15"), build("sd15")
    enable(tiny.pipe)
    torch.manual_seed(1)
    weights = ip_adapter_state(tiny.denoiser)
    if before:
        tiny.pipe.set_attn_processor("fp16")
    for pipe in (tiny.pipe, reference.pipe):
        pipe.unet._load_ip_adapter_weights([copy.deepcopy(weights)])
        pipe.set_ip_adapter_scale(0.5)
    if not before:
        tiny.pipe.set_attn_processor("fp16")
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}
    expected = reference(steps=2, **image)
    assert torch.equal(tiny(steps=2, **image), expected)
    assert not torch.equal(expected, plain("sd15"))
    layers = {layer.name: layer.calls for layer in tiny.pipe.sage.summary().layers}
    attn2 = {name: n for name, n in layers.items() if name.endswith("attn2")}
    assert set(attn2.values()) == {2}
    assert {name + ".1" for name in attn2} <= set(layers)  # the image's attention

    assert tiny.denoiser.state_dict().keys() == reference.denoiser.state_dict().keys()
    tiny.pipe.set_ip_adapter_scale(0.9)  # seen by the routed processors
    reference.pipe.set_ip_adapter_scale(0.9)
    assert torch.equal(tiny(steps=2, **image), reference(steps=2, **image))

    tiny.pipe.set_attn_processor(None)
    assert torch.equal(tiny(steps=2, **image), reference(steps=2, **image))
    parameters = dict(tiny.denoiser.named_parameters())
    key = next(k for k in parameters if "to_k_ip" in k)
    assert key in dict(reference.denoiser.named_parameters())


def test_ip_adapters_with_masks_of_regions():
    tiny, reference = build("sd15"), build("sd15")
    torch.manual_seed(1)
    weights = ip_adapter_state(tiny.denoiser)
    left = torch.zeros(1, 1, 16, 16)
    left[..., :8] = 1
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}
    masked = {**image, "cross_attention_kwargs": {"ip_adapter_masks": [left]}}
    for pipe in (tiny.pipe, reference.pipe):
        pipe.unet._load_ip_adapter_weights([copy.deepcopy(weights)])
    expected = reference(steps=2, **masked)
    assert not torch.equal(expected, reference(steps=2, **image))
    enable(tiny.pipe, "fp16", strict=True)
    assert torch.equal(tiny(steps=2, **masked), expected)
    tiny.pipe.set_attn_processor("int8/fp8", strict=True)
    got = tiny(steps=2, **masked)
    assert 0 < (got - expected).norm() / expected.norm() < 0.05
    ran = [layer for layer in tiny.pipe.sage.summary().layers if layer.name.endswith("attn2.1")]
    assert ran and all(layer.quantized == 2 for layer in ran)


def test_perturbed_attention_guidance_of_sd3():
    """It changes processors of its layers while it samples, and has a third part in its batch."""
    tiny = build("sd3")
    parts = inspect.signature(diffusers.StableDiffusion3PAGPipeline.__init__).parameters
    known = {key: part for key, part in tiny.pipe.components.items() if key in parts}
    pipe = diffusers.StableDiffusion3PAGPipeline(**known, pag_applied_layers=["0"])
    pipe.set_progress_bar_config(disable=True)

    def sample(**more):
        generator = torch.Generator().manual_seed(0)
        options = {**tiny.kwargs, "num_inference_steps": 2, "output_type": "latent", **more}
        return pipe(**options, generator=generator).images

    expected = sample(pag_scale=3.0)
    assert not torch.equal(expected, sample(pag_scale=0.0))
    before = dict(pipe.transformer.attn_processors)
    enable(pipe, "fp16")
    assert torch.equal(sample(pag_scale=3.0), expected)
    pipe.set_attn_processor("int8/fp8", strict=True)
    got = sample(pag_scale=3.0)
    assert 0 < (got - expected).norm() / expected.norm() < 0.01
    layers = {layer.name: layer.quantized for layer in pipe.sage.summary().layers}
    # The perturbed part attends the text alone, in a call of its own.
    assert layers == {f"transformer_blocks.{name}": 2 for name in ("0.attn", "1.attn", "0.attn.1")}
    pipe.set_attn_processor(None)
    assert pipe.transformer.attn_processors == before
    assert torch.equal(sample(pag_scale=3.0), expected)


def test_ip_adapters_can_be_unloaded_while_patched():
    tiny = build("sd15")
    tiny.pipe.unet._load_ip_adapter_weights([ip_adapter_state(tiny.denoiser)])
    enable(tiny.pipe).set_attn_processor("fp16")
    tiny.pipe.unload_ip_adapter()
    assert torch.equal(tiny(steps=2), plain("sd15"))
    assert tiny.pipe.sage.summary().calls == 2 * calls_per_step("sd15")


def test_lora():
    peft = pytest.importorskip("peft")
    tiny, reference = build("flux"), build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    for pipe in (tiny.pipe, reference.pipe):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)
    expected = reference(steps=2)
    assert torch.equal(tiny(steps=2), expected)
    assert not torch.equal(expected, plain("flux"))
    tiny.denoiser.delete_adapters("default")
    assert torch.equal(tiny(steps=2), plain("flux"))
    assert patch.summary().calls == 4 * calls_per_step("flux")


# ---------------------------------------------------------------------- copies, sharing, saving
def test_a_deep_copied_pipe_has_a_session_and_a_schedule_of_its_own():
    tiny = build("wan")
    enable(tiny.pipe).set_attn_processor(PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),)))
    other = Tiny(copy.deepcopy(tiny.pipe), tiny.kwargs)
    assert other.pipe.sage.session is not tiny.pipe.sage.session
    out = other(steps=2)
    theirs = other.pipe.sage.summary()
    assert theirs.specs == {"fp16": 8, "int8/fp8": 8}
    assert tiny.pipe.sage.summary().calls == 0
    assert tiny.pipe.sage.session.where.steps == 0
    assert torch.equal(tiny(steps=2), out)
    assert other.pipe.sage.summary().calls == theirs.calls

    other.pipe.set_attn_processor(None)
    assert torch.equal(other(steps=2), plain("wan"))
    assert routed(other.denoiser) == 0 < routed(tiny.denoiser)
    assert "progress_bar" in vars(tiny.pipe) and "progress_bar" not in vars(other.pipe)


def test_a_deep_copied_model_has_a_session_of_its_own():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    model = copy.deepcopy(tiny.denoiser)
    slots = {id(p._sage_slot.session) for p in processors(model)}
    assert len(slots) == 1 and id(patch.session) not in slots
    tiny.pipe.transformer = model
    patch.refresh()  # a component exchanged by the host comes to the pipe's session
    tiny(steps=1)
    assert patch.summary().quantized == calls_per_step("flux")


def test_a_copied_scheduler_drives_nothing():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    audio = copy.deepcopy(tiny.pipe.scheduler)  # as pipelines with sound do in mid-call
    audio.set_timesteps(7)
    assert patch.session.where.steps == 0
    assert len(audio.timesteps) == 7


def test_pickled_models_and_pipes_come_back():
    tiny = build("flux")
    enable(tiny.pipe).set_attn_processor("int8/fp8")
    expected = tiny(steps=1)
    other = Tiny(pickle.loads(pickle.dumps(tiny.pipe)), tiny.kwargs)
    assert torch.equal(other(steps=1), expected)
    assert other.pipe.sage.session.where.steps == 1  # it follows its own scheduler
    assert other.denoiser.transformer_blocks[0].attn.processor._sage_slot.layers[0].ran
    other.pipe.set_attn_processor("fp16")
    assert torch.equal(other(steps=2), plain("flux"))


def test_pickles_are_read_in_a_fresh_process(tmp_path):
    tiny = build("flux")
    apply(tiny.pipe, AttentionSession("int8/fp8"))
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(tiny.denoiser.transformer_blocks[0].attn.processor))
    code = f"import pickle; print(type(pickle.load(open({str(path)!r}, 'rb'))).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SageFluxAttnProcessor"


def test_from_pipe_shares_the_patched_model():
    tiny = build("sd15")
    patch = enable(tiny.pipe).set_attn_processor("int8/fp8")
    other = Tiny(diffusers.StableDiffusionPipeline.from_pipe(tiny.pipe), tiny.kwargs)
    other(steps=2)
    assert patch.summary().quantized == 2 * calls_per_step("sd15")
    tiny.pipe.set_attn_processor(None)
    assert torch.equal(other(steps=2), plain("sd15"))


def test_two_pipes_sampling_at_once_do_not_mix():
    tinies = [build("flux"), build("flux")]
    specs = ["int8/fp8", "fp16"]
    patches = [apply(t.pipe, AttentionSession(s)) for t, s in zip(tinies, specs, strict=True)]
    outs: list[Tensor | None] = [None, None]

    def sample(i: int) -> None:
        outs[i] = tinies[i](steps=6)

    threads = [threading.Thread(target=sample, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for patch, spec in zip(patches, specs, strict=True):
        assert patch.summary().specs == {spec: 6 * calls_per_step("flux")}
    assert torch.equal(outs[1], plain("flux", 6))


def test_saved_pipelines_are_the_same(tmp_path):
    tiny = build("flux")
    tiny.pipe.save_pretrained(tmp_path / "plain")
    enable(tiny.pipe).set_attn_processor("int8/fp8")
    tiny(steps=1)
    tiny.pipe.save_pretrained(tmp_path / "patched")
    plain_files = sorted(p.relative_to(tmp_path / "plain") for p in tmp_path.glob("plain/**/*"))
    files = sorted(p.relative_to(tmp_path / "patched") for p in tmp_path.glob("patched/**/*"))
    assert files == plain_files
    for file in files:
        if file.suffix == ".json":
            same = [json.loads((tmp_path / d / file).read_text()) for d in ("plain", "patched")]
            assert same[0] == same[1]
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "patched/transformer")
    assert loaded.state_dict().keys() == tiny.denoiser.state_dict().keys()


def test_a_removed_patch_keeps_nothing_alive():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    tiny(steps=1)
    session = weakref.ref(patch.session)
    patch.remove()
    del patch
    gc.collect()
    assert session() is None


# ---------------------------------------------------------------------- offloading and caches
def offload_groups(model):
    cpu = torch.device("cpu")
    diffusers.hooks.apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )


def test_group_offloading_on_the_cpu():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    if torch.accelerator.current_accelerator() is None:
        try:  # without us
            offload_groups(build("flux").denoiser)
        except AttributeError:
            pytest.skip("this diffusers asks even a PyTorch for the CPU alone for its accelerator")
    offload_groups(tiny.denoiser)
    assert torch.equal(tiny(steps=2), plain("flux"))
    assert patch.summary().calls == 2 * calls_per_step("flux")


@pytest.mark.parametrize("first", ["offload", "patch"])
def test_model_offloading(first):
    pytest.importorskip("accelerate")
    tiny = build("sd15")
    enable(tiny.pipe)
    if first == "patch":
        tiny.pipe.set_attn_processor("fp16")
    tiny.pipe.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        tiny.pipe.set_attn_processor("fp16")
    assert torch.equal(tiny(steps=2), plain("sd15"))
    assert tiny.pipe.sage.summary().calls == 2 * calls_per_step("sd15")
    tiny.pipe.set_attn_processor(None)
    tiny.pipe.remove_all_hooks()
    assert torch.equal(tiny(steps=2), plain("sd15"))


def test_accelerate_s_offloading_hooks():
    accelerate = pytest.importorskip("accelerate")
    tiny = build("sd15")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    expected = tiny(steps=1)
    models = (tiny.denoiser, tiny.pipe.vae)
    for model in models:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(tiny(steps=1), expected)
    assert patch.summary().quantized == 2 * calls_per_step("sd15")
    for model in models:
        accelerate.hooks.remove_hook_from_submodules(model)
    patch.remove()
    assert torch.equal(tiny(steps=2), plain("sd15"))


@pytest.mark.parametrize(
    ("config", "skips"),
    [
        (lambda pipe: diffusers.FirstBlockCacheConfig(threshold=1e9), True),
        (
            lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 1001),
                current_timestep_callback=lambda: 500,
            ),
            True,
        ),
        (lambda pipe: diffusers.TaylorSeerCacheConfig(cache_interval=2), True),
        (lambda pipe: diffusers.MagCacheConfig(calibrate=True, num_inference_steps=4), False),
    ],
    ids=["first-block", "pyramid", "taylor-seer", "mag"],
)
def test_caches_that_skip_blocks(config, skips):
    tiny, reference = build("flux"), build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    for each in (tiny, reference):
        each.denoiser.enable_cache(config(each.pipe))
    assert torch.equal(tiny(steps=4), reference(steps=4))
    assert (patch.summary().calls < 4 * calls_per_step("flux")) == skips
    assert patch.summary().calls > 0
    tiny.denoiser.disable_cache()
    patch.remove()
    assert torch.equal(tiny(steps=2), plain("flux"))


def test_layer_skipping_hooks_are_left_alone():
    tiny, reference = build("qwenimage"), build("qwenimage")
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", "transformer_blocks.0.*"),))
    patch = apply(tiny.pipe, AttentionSession(plan))
    for each in (tiny, reference):
        diffusers.hooks.apply_layer_skip(
            each.denoiser,
            diffusers.LayerSkipConfig(
                indices=[0],
                fqn="transformer_blocks",
                skip_attention=False,
                skip_attention_scores=True,
                skip_ff=False,
            ),
        )
    assert torch.equal(tiny(steps=1), reference(steps=1))
    assert patch.summary().declined == {"a layer-skip hook replaces the attention": 2}


# ---------------------------------------------------------------------- calls that stay the host's
def test_gradients_stay_the_host_s():
    tiny = build("flux")
    patch = apply(tiny.denoiser, AttentionSession("int8/fp8"))
    hidden = torch.randn(1, 16, 4, requires_grad=True)
    out = tiny.denoiser(
        hidden_states=hidden,
        encoder_hidden_states=torch.randn(1, 7, 32),
        pooled_projections=torch.randn(1, 32),
        timestep=torch.tensor([1.0]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(7, 3),
    ).sample
    out.sum().backward()
    assert hidden.grad.abs().sum() > 0
    [reason] = patch.summary().declined
    assert "gradients" in reason


class Odd(nn.Module):
    """An attention module that calls the dispatcher as its test wants."""

    def __init__(self, **more):
        super().__init__()
        self.processor = OddProcessor()
        self.more = more

    def forward(self, x):
        return self.processor(self, x)


class OddProcessor:
    def __call__(self, attn, x):
        return dispatch_attention_fn(x, x, x, **attn.more)


dispatch_attention_fn = diffusers.models.attention_dispatch.dispatch_attention_fn


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"dropout_p": 1e-9}, "dropout"),
        ({"attention_kwargs": {"window_size": (1, 1)}}, "window_size"),
    ],
)
def test_odd_calls_stay_the_host_s_and_are_counted(more, reason, caplog):
    model = Odd(**more)
    x = torch.randn(1, 5, 2, 8)
    expected = model(x)
    patch = apply(model, AttentionSession("int8/fp8"))
    assert torch.equal(model(x), expected)
    [(got, calls)] = patch.summary().declined.items()
    assert reason in got and calls == 1
    assert reason in caplog.text
    patch.remove()
    with apply(model, AttentionSession("int8/fp8", strict=True)), pytest.raises(AttentionRefused):
        model(x)
    with apply(model, AttentionSession("fp16", strict=True)):
        assert torch.equal(model(x), expected)


def test_context_parallel_calls_stay_the_host_s(monkeypatch):
    model = Odd(parallel_config=object())
    seen = []
    monkeypatch.setattr(
        "sage_diffusion.integrations.diffusers.processors.DISPATCH",
        lambda *a, **kw: seen.append(kw["parallel_config"]) or a[0],
    )
    patch = apply(model, AttentionSession("int8/fp8"))
    model(torch.randn(1, 5, 2, 8))
    assert seen == [model.more["parallel_config"]]
    assert list(patch.summary().declined) == ["context parallelism is the host's own"]


def test_flex_block_masks_stay_the_host_s(monkeypatch):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")
    model = Odd(attn_mask=mask)
    monkeypatch.setattr(
        "sage_diffusion.integrations.diffusers.processors.DISPATCH", lambda *a, **kw: a[0]
    )
    patch = apply(model, AttentionSession("int8/fp8"))
    model(torch.randn(1, 8, 2, 8))
    assert list(patch.summary().declined) == ["a mask of type BlockMask"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_two_dimensional_masks_are_key_padding(dtype):
    x = torch.randn(2, 5, 2, 64)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = keep if dtype == torch.bool else torch.zeros(2, 5).masked_fill(~keep, -torch.inf)
    model = Odd(attn_mask=mask)
    expected = model(x)
    with apply(model, AttentionSession("int8/fp16")) as patch:
        got = model(x)
        assert patch.summary().quantized == 1
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    assert not torch.equal(got, expected)


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


# ---------------------------------------------------------------------- imports
def test_a_missing_diffusers_names_the_extra():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import sage_diffusion\n"
        "try:\n"
        "    sage_diffusion.enable\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'sage-diffusion[diffusers]'" in done.stdout


# ---------------------------------------------------------------------- several processes
def _half_of_the_prompts(rank: int, address: str, found: Any) -> None:
    """One of two processes, each with a pipeline of its own, as accelerate launches them."""
    accelerate = pytest.importorskip("accelerate")
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in here.items()})  # of this process alone
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for; they have met already
    try:
        state = accelerate.PartialState(cpu=True)
        tiny = build("flux")
        enable(tiny.pipe, "int8/fp8")
        with state.split_between_processes(["a", "b"]) as prompts:
            out = tiny(steps=1)
        state.wait_for_everyone()
        found.put((rank, prompts, tiny.pipe.sage.summary().quantized, float(out.norm())))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
def test_two_processes_of_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    tiny = build("flux")
    enable(tiny.pipe, "int8/fp8")
    expected = tiny(steps=1)
    context = torch.multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    address = f"file://{tmp_path / 'meeting'}"
    several = [
        context.Process(target=_half_of_the_prompts, args=(rank, address, found)) for rank in (0, 1)
    ]
    for each in several:
        each.start()
    for each in several:
        each.join(60)
    assert [each.exitcode for each in several] == [0, 0]
    results = sorted(found.get() for _ in several)
    assert [(rank, prompts, n) for rank, prompts, n, _ in results] == [(0, ["a"], 4), (1, ["b"], 4)]
    assert [norm for *_, norm in results] == pytest.approx([float(expected.norm())] * 2, rel=1e-5)
