"""What the Hopper kernel serves, as data, and who serves the rest."""

import pytest

from sage_diffusion import machine
from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.kernels.attention.hopper_support import unsupported
from sage_diffusion.kernels.spec import AttentionSpec


@pytest.mark.parametrize(
    "spec,capability,hip,head_dim,reason",
    [
        ("int8/fp8", (9, 0), None, 128, None),
        ("fp8/fp8", (9, 0), None, 1, None),
        ("int8/fp8+block", (9, 0), None, None, None),
        ("int8/fp8", (8, 9), None, 64, "written for wgmma on sm_90, found sm_89"),
        ("int8/fp8", (10, 0), None, 64, "found sm_100"),
        ("int8/fp8", None, "gfx942", 64, "needs an NVIDIA card, found gfx942"),
        ("int8/fp8", (9, 0), None, 160, "up to head_dim 128, got 160"),
        ("int8/fp8-fast", (9, 0), None, 64, "in fp8, not in fp8-fast"),
        ("int8/fp16", (9, 0), None, 64, "in fp8, not in fp16"),
        ("int4/fp8-fast", (9, 0), None, 64, "in int8 or fp8, not in int4"),
        ("int8/fp8+smooth_q", (9, 0), None, 64, "smooth_q is not part"),
    ],
)
def test_unsupported(spec, capability, hip, head_dim, reason):
    got = unsupported(AttentionSpec.parse(spec), capability, hip, head_dim)
    assert (got is None) if reason is None else (reason in got)


@pytest.mark.parametrize(
    "spec,head_dim,version,chosen",
    [
        ("int8/fp8", 128, (3, 6), "hopper"),
        ("int8/fp8", 160, (3, 6), "triton"),
        ("int8/int8", 128, (3, 9), "triton"),
    ],
)
def test_triton_serves_the_rest(monkeypatch, spec, head_dim, version, chosen):
    monkeypatch.setattr(machine, "triton_version", lambda: version)
    backends.select.cache_clear()
    call = AttentionCall.typical(AttentionSpec.parse(spec), "sm_90", head_dim)
    assert backends.select(call).name == chosen
    backends.select.cache_clear()
