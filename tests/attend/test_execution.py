"""Kernels that don't compile: refused before, named after, replaced only where "auto" allows."""

import ast
import dataclasses
import functools

import pytest
import torch

from sage_diffusion import AttentionSession, AttentionSpec, attention, machine
from sage_diffusion.attend import backends
from sage_diffusion.attend.backend import Backend, run_kernel
from sage_diffusion.attend.calls import AttentionCall, Call
from sage_diffusion.attend.execution import KernelCompilationError


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(1, 2, 40, 64) for _ in range(3))


class Broken:
    """A backend whose kernel raises what Triton's compiler would."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def attention(self, *args):
        self.calls += 1
        FakeKernel().run(self.error)


class FakeKernel:
    """Looks like a ``triton.JITFunction`` on the stack."""

    arg_names = ()

    @staticmethod
    def fn():
        """Its ``__name__`` is the kernel's."""

    def run(self, error):
        raise error


@pytest.fixture(params=["compilation", "resources", "passes"])
def broken(request, monkeypatch):
    """Preferred by "auto" over everything else, refuses nothing, compiles never."""
    if request.param == "passes":
        error = RuntimeError("PassManager::run failed")
    else:
        errors = pytest.importorskip("triton.runtime.errors")
        from triton.compiler.errors import CompilationError

        error = {
            "compilation": CompilationError("x = 1", ast.parse("x = 1").body[0], "no such dot"),
            "resources": errors.OutOfResources(200000, 101376, "shared memory"),
        }[request.param]
    kernel = Broken(error)
    record = Backend("broken", "never compiles", lambda call: None, lambda: kernel.attention)
    monkeypatch.setattr(backends, "BACKENDS", (record, *backends.BACKENDS))
    backends.select.cache_clear()
    kernel.says = {
        "compilation": "no such dot",
        "resources": "out of resource: shared memory, Required: 200000, Hardware limit: 101376",
        "passes": "PassManager::run failed",
    }[request.param]
    yield kernel
    backends.select.cache_clear()


def test_a_session_goes_on_with_the_next_backend_and_counts_why(broken, qkv):
    session = AttentionSession("int8/fp8")
    expected = attention(*qkv, "int8/fp8", backend="reference")
    for _ in range(3):
        assert torch.equal(session.attend("x", *qkv), expected)
    assert broken.calls == 1  # not compiled again and again
    summary = session.summary()
    assert dict(summary.layers[0].ran) == {("int8/fp8", "reference"): 3}
    ((reason, calls),) = summary.compilation_failures.items()
    assert calls == 3 and reason in str(summary)
    assert summary.to_dict()["compilation_failures"] == {reason: 3}
    assert reason.startswith("broken: fn could not be compiled for cpu: ")
    assert broken.says in reason
    session.attend("x", *(x.half() for x in qkv))
    assert broken.calls == 2  # another variant of the kernel is another compilation
    session.reset_counts()
    assert session.summary().compilation_failures == {}
    AttentionSession("int8/fp8").attend("x", *qkv)
    assert broken.calls == 3  # remembered by the session, not by the process


def test_a_named_backend_raises(broken, qkv):
    session = AttentionSession("int8/fp8", backend="broken")
    for call in (
        lambda: session.attend("x", *qkv),
        lambda: attention(*qkv, "int8/fp8", backend="broken"),
    ):
        with pytest.raises(KernelCompilationError) as caught:
            call()
        error = caught.value
        assert (error.kernel, error.target) == ("broken: fn", "cpu")
        assert broken.says in error.message and error.__cause__ is broken.error
    assert session.summary().layers[0].ran == {} and not session.summary().compilation_failures


def test_auto_without_a_session_takes_the_next_backend_too(broken, qkv):
    expected = attention(*qkv, "int8/fp8", backend="reference")
    assert torch.equal(attention(*qkv, "int8/fp8"), expected)


def test_the_host_runs_it_where_nobody_else_can(broken, qkv, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS[:1])
    session = AttentionSession("int8/fp8")
    out = session.attend("x", *qkv)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(*qkv))
    ((reason, calls),) = session.summary().declined.items()
    assert calls == 1 and broken.says in reason


def test_other_errors_are_not_the_compilers(qkv, monkeypatch):
    kernel = Broken(RuntimeError("device-side assert triggered"))
    record = Backend("broken", "", lambda call: None, lambda: kernel.attention)
    monkeypatch.setattr(backends, "BACKENDS", (record, *backends.BACKENDS))
    backends.select.cache_clear()
    with pytest.raises(RuntimeError, match=r"^device-side assert"):
        attention(*qkv, "int8/fp8")
    backends.select.cache_clear()


def test_triton_itself_is_named(qkv):
    """The name of a real kernel, from the stack that Triton's compiler leaves."""
    pytest.importorskip("triton")
    from helpers import card
    from triton import knobs

    from sage_diffusion.attend import execution
    from sage_diffusion.kernels.quantize import stats

    def fail(*args, **kwargs):
        raise RuntimeError("PassManager::run failed")

    call = AttentionCall.of(Call(*qkv), AttentionSpec.parse("int8/fp8"))
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = fail  # called right before a kernel is compiled
    try:
        with card(86), pytest.raises(RuntimeError) as caught:
            stats._stats_kernel.device_caches.clear()
            stats.token_mean(qkv[0])
    finally:
        knobs.runtime.jit_cache_hook = before
    error = execution._failure("triton", call, caught.value)
    assert error.kernel == "triton: _stats_kernel"


@pytest.mark.parametrize(
    ("cc", "tiles", "kernel", "says"),
    [
        (89, 8, "attention_kernel", "out of resource: shared memory, Required: 131072"),
        (86, 4, "_quantize_kernel", "fp8e4nv not supported in this architecture"),
    ],
)
def test_a_gluon_kernel_is_named_too(monkeypatch, cc, tiles, kernel, says):
    """Really compiled: a ring of too many tiles, and a format that the card doesn't have."""
    pytest.importorskip("triton")
    from helpers import card

    from sage_diffusion.attend import execution
    from sage_diffusion.kernels.attention import gluon
    from sage_diffusion.kernels.attention.gluon_support import GluonLaunch

    kernel_entry = functools.partial(
        gluon.attention, tuned=lambda *call: GluonLaunch(8, 2, tiles // 2)
    )
    attend = functools.partial(run_kernel, kernel_entry)
    record = Backend("gluon", "refuses nothing", lambda call: None, lambda: attend)
    monkeypatch.setattr(backends, "BACKENDS", (record,))
    backends.select.cache_clear()
    q, k, v = torch.randn(3, 1, 1, 64, 128).half().unbind()
    call = Call(q, k, v)
    asked = AttentionCall.of(call, AttentionSpec.parse("int8/fp8-fast"))
    asked = dataclasses.replace(asked, capability=(cc // 10, cc % 10))
    with card(cc), pytest.raises(KernelCompilationError) as caught:
        execution.run(call, asked, "gluon")
    backends.select.cache_clear()
    assert (caught.value.kernel, caught.value.target) == (f"gluon: {kernel}", f"sm_{cc}")
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("backend", "spec", "changes", "version", "reason"),
    [
        ("triton", "int8/fp8", {"capability": (7, 5)}, (3, 9), "needs sm_80 or newer, found sm_75"),
        ("triton", "int8/fp8", {}, (3, 5), "needs triton 3.6 or newer, found 3.5: pip install"),
        ("triton", "fp4/fp4", {"capability": (10, 0)}, (3, 8), "needs triton 3.9 or newer"),
        ("gluon", "int4/int8", {}, (3, 5), "needs triton 3.6 or newer, found 3.5"),
        ("hopper", "int8/fp8", {"capability": (9, 0)}, (3, 5), "needs triton 3.6 or newer"),
        (
            "gluon",
            "int8/int8",
            {"head_dim": 160},
            (3, 9),
            "head_dim 128, got 160",
        ),
        ("gluon", "int4/int8", {"capability": (9, 0)}, (3, 9), "found sm_90"),
    ],
)
def test_refused_before_anything_is_compiled(monkeypatch, backend, spec, changes, version, reason):
    """Card, Triton version and head dim; ``load`` would import the kernel."""
    monkeypatch.setattr(machine, "triton_version", lambda: version)
    backends.select.cache_clear()
    major, minor = changes.get("capability", (8, 9))
    parsed, head_dim = AttentionSpec.parse(spec), changes.get("head_dim", 128)
    call = AttentionCall.typical(parsed, f"sm_{major}{minor}", head_dim)
    with pytest.raises(backends.BackendUnavailable, match=reason):
        backends.select(call, backend)
    backends.select.cache_clear()
