"""Rotations that diffusers' processors hand over instead of applying."""

from __future__ import annotations

import contextlib
import types

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_wan
from integrations.test_diffusers_models import made, outputs
from integrations.tiny_models import MODELS

from sage_diffusion import AttentionSession, PrecisionPlan, Rope, Rule
from sage_diffusion.attend import backends
from sage_diffusion.integrations.diffusers import apply, rotary
from sage_diffusion.kernels.rope import rotated

#: Models whose self-attention hands tables over: Flux's function, and the Wan family's inner one.
FOLDED = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "BriaTransformer2DModel",
    "LongCatImageTransformer2DModel",
    "WanTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "ChronoEditTransformer3DModel",
)


@pytest.fixture
def handed_over(monkeypatch):
    """The rotations that backends were handed, (q's, k's) of every call."""
    load, seen = backends.load, []

    def loads(chosen):
        run = load(chosen)

        def recording(call, spec, return_lse):
            seen.append((call.rope_q, call.rope_k))
            return run(call, spec, return_lse)

        return recording

    monkeypatch.setattr(backends, "load", loads)
    return seen


@contextlib.contextmanager
def rotating_as_before():
    """Processors rotate by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sage_diffusion.integrations.diffusers.processors._folds", lambda *_: False)
        yield


def run(model, name, plan, **at):
    session = AttentionSession(plan)
    with apply(model, session), session.at(0.5, **at):
        return outputs(model, name), session.summary()


@pytest.mark.parametrize("name", FOLDED)
def test_a_float32_model_gives_the_same_bits(name, handed_over):
    """Nothing is rounded between the rotation and the codes either way."""
    model = made(name)
    folded, summary = run(model, name, "int8/fp8")
    tables = [rope for ropes in handed_over for rope in ropes if rope is not None]
    assert tables and all(isinstance(rope, Rope) for rope in tables)
    assert summary.quantized == summary.calls == len(handed_over) and not summary.declined
    handed_over.clear()
    with rotating_as_before():
        before, _ = run(model, name, "int8/fp8")
    assert not any(rope for ropes in handed_over for rope in ropes)
    assert all(torch.equal(a, b) for a, b in zip(folded, before, strict=True))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_a_bfloat16_model_is_as_accurate_as_before(name, handed_over):
    model = made(name).to(torch.bfloat16)
    if hasattr(model, "rope"):
        model.rope.float()  # as loading with torch_dtype leaves it
    inputs = MODELS[name][1]

    def half():
        found = inputs().items()
        return {
            key: x.bfloat16() if getattr(x, "dtype", None) == torch.float32 else x
            for key, x in found
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, (MODELS[name][0], half))
        (plain,), _ = run(model, name, "fp16")
        assert not handed_over
        (folded,), _ = run(model, name, "int8/fp8")
        assert any(rope for ropes in handed_over for rope in ropes)
        with rotating_as_before():
            (before,), _ = run(model, name, "int8/fp8")
    error, old = ((x - plain).float().norm() / plain.float().norm() for x in (folded, before))
    assert 0 < error < max(1.2 * old, 0.01)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_what_the_plan_leaves_alone_rotates_as_ever(name, handed_over):
    model = made(name)
    plain = outputs(model, name)
    kept, summary = run(model, name, PrecisionPlan("int8/fp8", (Rule("fp16", end=0.9),)))
    assert not handed_over and summary.quantized == 0
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


def test_branches_that_differ_within_a_batch_rotate_as_ever(handed_over):
    """The host's own attention needs all of Q and K rotated there."""
    name = "FluxTransformer2DModel"
    model = made(name)
    inputs = MODELS[name][1]

    def twice():
        return {
            key: torch.cat([x, x]) if isinstance(x, torch.Tensor) and "ids" not in key else x
            for key, x in inputs().items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, (MODELS[name][0], twice))
        plan = PrecisionPlan("int8/fp8", (Rule("fp16", branch="uncond"),))
        for chunks, folds in ((("cond", "uncond"), False), (("cond", "cond"), True)):
            handed_over.clear()
            session = AttentionSession(plan)
            session.set_branch(None, chunks)
            with apply(model, session):
                outputs(model, name)
            assert handed_over and all((q is not None) == folds for q, _ in handed_over)


def test_a_declined_call_rotates_by_the_hosts_own_function(monkeypatch):
    """The session is asked, finds no backend, and the output is the model's own, bit for bit."""
    name = "FluxTransformer2DModel"
    model = made(name)
    plain = outputs(model, name)

    def unavailable(call, backend, failed=()):
        raise backends.BackendUnavailable(call.spec, {})

    monkeypatch.setattr(backends, "select", unavailable)
    kept, summary = run(model, name, "int8/fp8")
    assert summary.quantized == 0 and summary.declined
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


def test_observers_see_what_the_host_would_have_rotated():
    name = "FluxTransformer2DModel"
    model = made(name)
    seen = {True: [], False: []}

    class Watcher:
        def __init__(self, folded):
            self.folded = folded

        def observe(self, event):
            seen[self.folded].append((event.q.clone(), event.k.clone()))

    for folded in (True, False):
        how = contextlib.nullcontext() if folded else rotating_as_before()
        with how, apply(model, AttentionSession("int8/fp8", observers=[Watcher(folded)])):
            outputs(model, name)
    assert seen[True]
    for (q, k), (q_before, k_before) in zip(seen[True], seen[False], strict=True):
        assert torch.equal(q, q_before) and torch.equal(k, k_before)


# ---------------------------------------------------------------------- the tensor in between
def unrotated():
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(20.0).reshape(5, 4)
    rope, calls = Rope(angle.cos(), angle.sin()), []

    def rotate():
        calls.append(1)
        return rotated(x.transpose(1, 2), rope).transpose(1, 2)

    return x, rotary.with_tables(x, rope, 2, rotate), rotate(), calls


def test_any_other_use_finds_it_rotated():
    x, put, want, calls = unrotated()
    assert torch.equal(put * 2, want * 2) and torch.equal(torch.cat([x, put]), torch.cat([x, want]))
    assert torch.equal(put[:, 1], want[:, 1]) and torch.equal(put.data, want)
    assert len(calls) == 2  # one of them ours: the rotation is kept
    assert type(put.transpose(1, 2)) is torch.Tensor
    tensor, rope = rotary.taken_apart(put, 2)
    assert torch.equal(tensor, want) and rope is None  # it may have been changed since


def test_a_look_at_its_shape_or_dtype_rotates_nothing():
    x, put, _, calls = unrotated()
    assert put.shape == x.shape and put.size(1) == 5 and put.dtype == torch.float32
    assert put.ndim == put.dim() == 4 and put.device == x.device and put.numel() == 80
    assert torch.zeros(2, dtype=torch.float16).type_as(put).dtype == torch.float32
    tensor, rope = rotary.taken_apart(put, 2)
    assert tensor is x and torch.equal(rope.cos, torch.arange(20.0).reshape(5, 4).cos())
    assert len(calls) == 1  # ours


def test_a_write_goes_to_the_rotated():
    x, put, want, _ = unrotated()
    before = x.clone()
    put[:, :2] = 0
    tensor, rope = rotary.taken_apart(put, 2)
    want[:, :2] = 0
    assert rope is None and torch.equal(tensor, want) and torch.equal(x, before)


def test_another_layout_or_odd_tables_rotate_at_once():
    x, put, want, _ = unrotated()
    tensor, rope = rotary.taken_apart(put, 1)
    assert rope is None and torch.equal(tensor, want)
    assert rotary.with_tables(x, Rope(torch.ones(4, 8), torch.ones(4, 8)), 2, x.clone) is None
    assert rotary.with_tables(x, Rope(*torch.ones(2, 5, 8).double()), 2, x.clone) is None


def test_the_wan_familys_function_is_recognized_by_its_instructions():
    processor = transformer_wan.WanAttnProcessor.__call__
    inner = [c for c in processor.__code__.co_consts if isinstance(c, types.CodeType)]
    if not inner:
        pytest.skip(f"diffusers {diffusers.__version__} rotates elsewhere")
    code = rotary.with_pairs_routed(processor.__code__)
    assert [c.co_names for c in code.co_consts if isinstance(c, types.CodeType)] == [
        (rotary.PAIRS,)
    ]
    other = compile("def apply_rotary_emb(x, cos, sin): return x", "", "exec")
    assert rotary.with_pairs_routed(other) is other
    cos, sin = torch.rand(2, 1, 5, 1, 8)
    x = torch.randn(2, 5, 3, 8, dtype=torch.bfloat16)
    want = rotated(x.transpose(1, 2), rotary.pair_tables(cos, sin)).transpose(1, 2)
    assert torch.equal(rotary.rotate_pairs(x, cos, sin), want)
    assert rotary.pair_tables(cos[0], sin[0]) is None
