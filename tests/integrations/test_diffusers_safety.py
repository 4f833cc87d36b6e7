"""What hosts do to a patched pipeline: swap processors, adapt, fuse, call in odd ways."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from integrations.tiny_adapters import ip_adapter_state
from integrations.tiny_pipelines import build
from routed import calls_per_step, plain, processors, routed
from torch import nn

from sage_diffusion import AttentionSession, enable
from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.integrations.diffusers import apply


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
