"""Patched models beside offloading, caches that skip blocks, and several processes."""

from __future__ import annotations

import os
from typing import Any

import diffusers
import pytest
import torch
from integrations.tiny_pipelines import build
from routed import calls_per_step, plain

from sage_diffusion import AttentionSession, PrecisionPlan, Rule, enable
from sage_diffusion.integrations.diffusers import apply


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
