"""``torch.compile``: one graph, no recompilation while the precision changes from step to step."""

from __future__ import annotations

import gc
import shutil

import diffusers
import pytest
import torch
from integrations.tiny_pipelines import build
from torch import nn

from sage_diffusion import AttentionSession, PrecisionPlan, Rule
from sage_diffusion.integrations.diffusers import Patch, apply

PLAN = PrecisionPlan("int8/fp8", (Rule("fp16", end=0.3), Rule("int8/int8", start=0.7)))


class Graphs:
    """A backend that counts what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(model: nn.Module, pipe, kwargs) -> dict:
    """What the pipeline calls its denoiser with, once."""
    seen: list[dict] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(_named(module, args, kwargs)), with_kwargs=True
    )
    pipe(num_inference_steps=1, output_type="latent", **kwargs)
    hook.remove()
    return seen[0]


def _named(module: nn.Module, args, kwargs) -> dict:
    names = ("sample", "timestep") if hasattr(module, "conv_in") else ("hidden_states",)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def run(model: nn.Module, patch: Patch, kwargs: dict) -> dict[float, torch.Tensor]:
    """Outputs at three levels of precision, twice each."""
    outs = {}
    with torch.no_grad():
        for progress in (0.0, 0.5, 1.0) * 2:
            with patch.session.at(progress):
                outs[progress] = model(**kwargs)[0]
    return outs


@pytest.mark.parametrize("name", ["flux", "wan", "sd3", "sd15"])
def test_one_graph_for_every_precision(name):
    tiny = build(name)
    kwargs = arguments(tiny.denoiser, tiny.pipe, tiny.kwargs)
    patch = apply(tiny.denoiser, AttentionSession(PLAN))
    expected = run(tiny.denoiser, patch, kwargs)
    per_spec = {spec: n for spec, n in patch.summary().specs.items()}
    patch.session.reset_counts()

    graphs = Graphs()
    compiled = torch.compile(tiny.denoiser, backend=graphs, fullgraph=True)
    got = run(compiled, patch, kwargs)

    assert graphs.count == 1
    assert patch.summary().specs == per_spec
    assert set(per_spec) == {"fp16", "int8/fp8", "int8/int8"}
    for progress in expected:
        torch.testing.assert_close(got[progress], expected[progress], rtol=1e-5, atol=1e-5)


def test_identical_blocks_share_one_graph():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=12,
        rope_max_seq_len=16,
    ).eval()
    kwargs = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "return_dict": False,
    }
    patch = apply(model, AttentionSession(PLAN))
    expected = run(model, patch, kwargs)
    patch.session.reset_counts()

    graphs = Graphs()
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    got = run(model, patch, kwargs)

    assert graphs.count == 1
    assert {layer.calls for layer in patch.summary().layers} == {6}
    assert len(patch.summary().layers) == 24
    for progress in expected:
        torch.testing.assert_close(got[progress], expected[progress], rtol=1e-5, atol=1e-5)


def test_sampling_with_a_compiled_transformer():
    tiny = build("flux")
    expected = None
    with apply(tiny.pipe, AttentionSession(PLAN)):
        expected = tiny(steps=3)

    graphs = Graphs()
    tiny.pipe.transformer.compile(backend=graphs, fullgraph=True)
    patch = apply(tiny.pipe, AttentionSession(PLAN))
    out = tiny(steps=3)
    assert graphs.count == 1
    assert set(patch.summary().specs) == {"fp16", "int8/fp8", "int8/int8"}
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    patch.remove()
    calls = patch.summary().calls
    tiny(steps=1)  # compiles the model as it was
    assert patch.summary().calls == calls


def test_a_compiled_component_is_found_behind_its_wrapper():
    tiny = build("flux")
    tiny.pipe.transformer = torch.compile(tiny.pipe.transformer, backend="eager", fullgraph=True)
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    tiny(steps=1)
    assert patch.summary().quantized == 4


def test_graph_breaks_leave_the_routing_intact():
    tiny = build("flux")
    kwargs = arguments(tiny.denoiser, tiny.pipe, tiny.kwargs)
    attn = tiny.denoiser.transformer_blocks[0].attn
    norm = attn.norm_q.forward

    def breaking(x):
        torch._dynamo.graph_break()
        return norm(x)

    attn.norm_q.forward = breaking
    patch = apply(tiny.denoiser, AttentionSession("int8/fp8"))
    with torch.no_grad():
        expected = tiny.denoiser(**kwargs)[0]
        patch.session.reset_counts()
        got = torch.compile(tiny.denoiser, backend="eager")(**kwargs)[0]
    assert patch.summary().quantized == 4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_compiled_calls_that_stay_the_host_s_are_counted():
    tiny = build("flux")
    kwargs = arguments(tiny.denoiser, tiny.pipe, tiny.kwargs)
    patch = apply(tiny.denoiser, AttentionSession("int8/fp8"))
    compiled = torch.compile(tiny.denoiser, backend="aot_eager", fullgraph=True)
    kwargs["hidden_states"] = kwargs["hidden_states"].clone().requires_grad_()
    out = compiled(**kwargs)[0]
    out.sum().backward()
    assert kwargs["hidden_states"].grad.abs().sum() > 0
    [(reason, calls)] = patch.summary().declined.items()
    assert "gradients" in reason
    assert calls == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler")
def test_inductor_s_code_gives_what_eager_gives():
    """The default backend fuses what stands between the layers' attention."""
    tiny = build("sd3")
    kwargs = arguments(tiny.denoiser, tiny.pipe, tiny.kwargs)
    patch = apply(tiny.denoiser, AttentionSession(PLAN, strict=True))
    expected = run(tiny.denoiser, patch, kwargs)
    eager = patch.summary().specs
    patch.session.reset_counts()
    compiled = torch.compile(tiny.denoiser, fullgraph=True)
    for progress, out in run(compiled, patch, kwargs).items():
        torch.testing.assert_close(out, expected[progress], rtol=1e-3, atol=1e-3)
    assert patch.summary().specs == eager
    assert not torch.equal(expected[0.5], expected[0.0])


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_an_exported_model_asks_its_session(strict):
    tiny = build("sd3")
    kwargs = arguments(tiny.denoiser, tiny.pipe, tiny.kwargs)
    patch = apply(tiny.denoiser, AttentionSession(PLAN))
    expected = run(tiny.denoiser, patch, kwargs)
    patch.session.reset_counts()
    program = torch.export.export(tiny.denoiser, (), kwargs, strict=strict)
    assert patch.summary().calls == 0  # nothing ran
    for progress, out in run(program.module(), patch, kwargs).items():
        torch.testing.assert_close(out, expected[progress], rtol=1e-5, atol=1e-5)
    assert set(patch.summary().specs) == {"fp16", "int8/fp8", "int8/int8"}

    patch.remove()
    patch.session.layers.clear()
    gc.collect()
    with pytest.raises(RuntimeError, match="session of this attention layer is not here"):
        program.module()(**kwargs)


def test_a_model_that_is_exported_with_gradients_is_the_model_s_own():
    tiny = build("sd3")
    kwargs = arguments(tiny.denoiser, tiny.pipe, tiny.kwargs)
    expected = tiny.denoiser(**kwargs)[0]
    patch = apply(tiny.denoiser, "int8/fp8")
    program = torch.export.export(tiny.denoiser, (), kwargs, strict=False)
    torch.testing.assert_close(program.module()(**kwargs)[0], expected, rtol=1e-5, atol=1e-5)
    assert patch.summary().quantized == 0
    (reason,) = patch.summary().declined
    assert reason.startswith("gradients are asked for")
