"""Rotations handed to ``attention()`` and to sessions: the same result whoever applies them."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_l1

from sage_diffusion import (
    LADDER,
    AttentionSession,
    AttentionSpec,
    PrecisionPlan,
    Rope,
    Rule,
    attention,
)
from sage_diffusion.attend import backends, execution, providers
from sage_diffusion.attend.calls import AttentionCall, Call
from sage_diffusion.attend.guard import Guard
from sage_diffusion.kernels.rope import apply_rope, rotated


def inputs(batch=2, heads=4, kv_heads=2, q_len=65, k_len=63, dim=64, dtype=torch.float16):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, q_len, dim, generator=g).to(dtype)
    k, v = (torch.randn(batch, kv_heads, k_len, dim, generator=g).to(dtype) for _ in range(2))
    return q, k + 1, v


def tables(length, dim, interleaved=True, batch=None):
    g = torch.Generator().manual_seed(length)
    shape = (length, dim // 2) if batch is None else (batch, length, dim // 2)
    angle = 6.0 * torch.rand(shape, generator=g)
    return Rope(angle.cos(), angle.sin(), interleaved)


def exact(q, k, v, rope_q, rope_k):
    """PyTorch's attention on what PyTorch rotated, in float64."""
    turned = apply_rope(q, rope_q).double(), apply_rope(k, rope_k).double()
    return F.scaled_dot_product_attention(*turned, v.double(), enable_gqa=True)


@pytest.mark.parametrize("spec", LADDER)
def test_every_spec_is_near_exact_attention_on_rotated_inputs(spec):
    q, k, v = inputs()
    ropes = {"rope_q": tables(65, 64, False), "rope_k": tables(63, 64, batch=2)}
    out = attention(q, k, v, spec, **ropes)
    want = exact(q, k, v, **ropes)
    plain = attention(
        apply_rope(q, ropes["rope_q"]), apply_rope(k, ropes["rope_k"]), v.float(), spec
    )
    assert out.dtype == q.dtype
    # As near as the same spec on inputs that were rotated before, in float32.
    assert relative_l1(out, want) < relative_l1(plain, want) + 1e-3


def test_sdpa_gets_what_pytorch_rotated():
    q, k, v = inputs()
    ropes = {"rope_q": tables(65, 64), "rope_k": None}
    out = attention(q, k, v, "fp16", backend="sdpa", **ropes)
    want = F.scaled_dot_product_attention(rotated(q, ropes["rope_q"]), k, v, enable_gqa=True)
    assert torch.equal(out, want)


#: Backend, spec and compute capability.
OURS = {"triton": ("int8/int8", 80), "gluon": ("int4/fp8-fast", 89), "hopper": ("int8/fp8", 90)}


@pytest.mark.parametrize("backend", OURS)
def test_our_kernels_are_handed_the_tables(backend):
    pytest.importorskip("triton")
    from helpers import card

    name, cc = OURS[backend]
    q, k, v = inputs(batch=1, heads=1, kv_heads=1)
    ropes = {"rope_q": tables(65, 64), "rope_k": tables(63, 64)}
    call = Call(q, k, v, **ropes)
    asked = AttentionCall.of(call, AttentionSpec.parse(name))
    asked = dataclasses.replace(asked, device="cuda", capability=divmod(cc, 10))
    with card(cc):
        chosen, out, _ = execution.run(call, asked, backend)
    assert chosen.name == backend and chosen.folds_rope
    assert relative_l1(out, attention(q, k, v, name, **ropes)) < 1e-4


@pytest.mark.parametrize(
    ("package", "version", "function", "spec"),
    [
        ("sageattention", "2.2.0", "sageattn_qk_int8_pv_fp8_cuda", "int8/fp8-rotate-balance"),
        ("comfy_kitchen", "0.2.40", "int8_attention", "int8/int8-smooth_v-balance-tile_v"),
    ],
)
def test_providers_get_what_pytorch_rotated(monkeypatch, package, version, function, spec):
    """Their packages know no tables; here PyTorch's attention stands for them."""

    def sdpa(q, k, v, **options):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    module = types.ModuleType(package)
    setattr(module, function, sdpa)
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(providers, "installed", {package: version}.get)
    backends.select.cache_clear()
    q, k, v = inputs()
    ropes = {"rope_q": tables(65, 64), "rope_k": tables(63, 64)}
    call = Call(q, k, v, **ropes)
    asked = AttentionCall.of(call, AttentionSpec.parse(spec))
    asked = dataclasses.replace(asked, device="cuda", capability=(8, 9))
    chosen, out, _ = execution.run(call, asked, package)
    backends.select.cache_clear()
    assert not chosen.folds_rope
    turned = rotated(q, ropes["rope_q"]), rotated(k, ropes["rope_k"])
    assert torch.equal(out, F.scaled_dot_product_attention(*turned, v, enable_gqa=True))


def test_wrong_tables_are_refused_before_anything_runs():
    q, k, v = inputs()
    session = AttentionSession("int8/fp8")
    for call in (attention, lambda *x, **options: session.attend("x", *x, **options)):
        with pytest.raises(ValueError, match=r"rope_k.cos must have shape .* L=63, D=64, got \(65"):
            call(q, k, v, rope_k=tables(65, 64))
        with pytest.raises(ValueError, match="head_dim must be even to be rotated by rope_q"):
            call(q[..., :41], k[..., :41], v[..., :41], rope_q=tables(65, 40))
    with pytest.raises(TypeError, match=r"rope_q.cos must be float32, got torch.float64"):
        attention(q, k, v, rope_q=Rope(*(x.double() for x in tables(65, 64)[:2])))
    assert session.summary().calls == 0


def test_tables_pass_through_a_compiled_graph():
    q, k, v = inputs()
    ropes = {"rope_q": tables(65, 64, False), "rope_k": tables(63, 64)}

    def call(q, k, v, ropes):
        return attention(q, k, v, "int8/fp8", **ropes) * 2

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v, ropes), call(q, k, v, ropes))
    layer = AttentionSession("int8/fp8").layer("x")
    compiled = torch.compile(
        lambda q, k, v: layer(q, k, v, **ropes), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(q, k, v), attention(q, k, v, "int8/fp8", **ropes))


# ---------------------------------------------------------------------- sessions
class Watcher:
    def __init__(self):
        self.events = []

    def observe(self, event):
        self.events.append(event)


@pytest.mark.parametrize("spec", ["fp16", "int8/fp8"])
def test_observers_and_the_host_see_q_and_k_rotated(spec):
    q, k, v = inputs()
    ropes = {"rope_q": tables(65, 64), "rope_k": tables(63, 64, False)}
    turned = rotated(q, ropes["rope_q"]), rotated(k, ropes["rope_k"])
    watcher = Watcher()
    out = AttentionSession(spec, observers=[watcher]).attend("x", q, k, v, **ropes)
    (event,) = watcher.events
    assert torch.equal(event.q, turned[0]) and torch.equal(event.k, turned[1])
    if spec == "fp16":
        assert torch.equal(out, F.scaled_dot_product_attention(*turned, v, enable_gqa=True))
    else:
        assert torch.equal(out, attention(q, k, v, spec, **ropes))


def test_the_guard_measures_against_rotated_inputs():
    q, k, v = inputs()
    drift = []
    for ropes in ({}, {"rope_q": tables(65, 64), "rope_k": tables(63, 64)}):
        session = AttentionSession("int8/fp16", guard=Guard(every=1, limit=0.02))
        session.start(1)
        session.attend("x", q, k, v, **ropes)
        session.finish()
        drift.append(session.summary().layers[0].drift)
    assert 0 < drift[1] < 0.02 and drift[1] != drift[0]


def test_a_declined_call_rotates_for_the_host():
    q, k, v = inputs()
    rope = tables(65, 64)
    session = AttentionSession("int8/fp8")
    out = session.attend("x", q.requires_grad_(), k, v, rope_q=rope)
    want = F.scaled_dot_product_attention(rotated(q, rope), k, v, enable_gqa=True)
    assert torch.equal(out, want) and session.layers["x"].declined


def test_both_branches_of_a_batch_get_their_tables():
    q, k, v = inputs()
    ropes = {"rope_q": tables(65, 64, batch=2), "rope_k": tables(63, 64)}
    session = AttentionSession(PrecisionPlan("int8/fp8", (Rule("fp16", branch="uncond"),)))
    session.set_branch(None, ("cond", "uncond"))
    out = session.attend("x", q, k, v, **ropes)
    first = {"rope_q": ropes["rope_q"].rows(0, 1), "rope_k": ropes["rope_k"]}
    assert torch.equal(out[:1], attention(q[:1], k[:1], v[:1], "int8/fp8", **first))
    turned = rotated(q, ropes["rope_q"]), rotated(k, ropes["rope_k"])
    assert torch.equal(out[1:], F.scaled_dot_product_attention(*turned, v, enable_gqa=True)[1:])
