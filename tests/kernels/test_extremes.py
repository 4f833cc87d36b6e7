"""Finite in gives finite out, as compiled: what spares our kernels' outputs a pass (``finite``)."""

import pytest
import torch

pytest.importorskip("triton")

from helpers import card, relative_l1

from sage_diffusion import AttentionSpec
from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import Call
from sage_diffusion.kernels.attention import gluon_support, reference
from sage_diffusion.machine import triton_version

TOKENS = 70


def extremes(dtype):
    """q, k and v ``[1, 6, 70, 64]``: a head for each kind of extreme."""
    g = torch.Generator().manual_seed(0)
    top = torch.finfo(dtype).max
    large = top if dtype == torch.float16 else 3e38

    def normal(rows=TOKENS):
        return torch.randn(rows, 64, generator=g)

    def sign(rows=TOKENS):
        return normal(rows).sign()

    heads = (
        (normal() * 3, normal(), torch.full((TOKENS, 64), top)),
        (normal(), normal(), sign() * top),
        (sign() * large, sign() * large, normal()),
        (torch.zeros(TOKENS, 64),) * 3,
        tuple(sign() * torch.finfo(dtype).tiny for _ in range(3)),
        (
            torch.cat([normal(35), sign(35) * large]),
            torch.cat([sign(35) * large, torch.zeros(35, 64)]),
            torch.cat([normal(35) * 1e-7, sign(35) * top]),
        ),
    )
    return tuple(torch.stack(x)[None].to(dtype) for x in zip(*heads, strict=True))


def hiding_mask():
    """A row that sees nothing, one that sees the last keys, and rows at both ends of float32."""
    limits, mask = torch.finfo(torch.float32), torch.zeros(1, 1, TOKENS, TOKENS)
    mask[:, :, 0] = -torch.inf
    mask[:, :, 1, :66] = -torch.inf
    mask[:, :, 2], mask[:, :, 3] = limits.min, limits.max
    mask[:, :, 4, ::2], mask[:, :, 4, 1::2] = limits.max, limits.min
    return mask


@pytest.mark.parametrize(
    ("backend", "cc", "spec", "dtype", "options"),
    [
        ("hopper", 90, "int8/fp8", torch.float16, {"is_causal": True}),
        ("hopper", 90, "int8/fp8", torch.bfloat16, {"mask": hiding_mask()}),
        ("hopper", 90, "fp8/fp8", torch.float16, {}),
        ("gluon", 89, "int8/fp8-fast", torch.float16, {"mask": hiding_mask() == 0}),
        ("gluon", 89, "int4/fp8-fast", torch.float16, {"is_causal": True}),
        ("gluon", 80, "int4/int8", torch.bfloat16, {"mask": hiding_mask()}),
        ("gluon", 80, "int8/int8", torch.float16, {"scale": 0.0, "is_causal": True}),
        ("gluon", 120, "fp4/fp4", torch.float16, {}),
        ("triton", 80, "int8/int8", torch.float16, {}),
        ("triton", 89, "int8/fp8", torch.float16, {"mask": hiding_mask()}),
    ],
)
def test_finite_in_gives_finite_out(backend, cc, spec, dtype, options):
    record = next(b for b in backends.BACKENDS if b.name == backend)
    if backend != "triton" and triton_version() < gluon_support.TRITON_VERSION:
        pytest.skip("this Triton has no Gluon that the kernels are written in")
    assert record.finite
    q, k, v = extremes(dtype)
    parsed = AttentionSpec.parse(spec)
    with card(cc):
        out, _ = record.load()(Call(q, k, v, **options), parsed, False)
    assert out.isfinite().all()
    want, _ = reference.attention(q, k, v, parsed, **options)
    assert want.isfinite().all()
    # Where scores are large, float32 has steps beyond 1 and every kernel its own rounding.
    ordinary = [0, 1, 3, 4]
    assert relative_l1(out[:, ordinary], want[:, ordinary]) < 0.02


@pytest.mark.parametrize(
    ("backend", "cc", "spec"),
    [("hopper", 90, "int8/fp8"), ("gluon", 89, "int8/fp8-fast"), ("triton", 80, "int8/int8")],
)
def test_a_softmax_scale_of_zero_and_rows_of_every_size(backend, cc, spec):
    """Hidden scores are -inf, and no row's scale may turn them into NaN."""
    record = next(b for b in backends.BACKENDS if b.name == backend)
    if backend != "triton" and triton_version() < gluon_support.TRITON_VERSION:
        pytest.skip("this Triton has no Gluon that the kernels are written in")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, TOKENS, 64, generator=g) for _ in range(3))
    q = q * torch.logspace(-37, 0, TOKENS)[:, None]
    call = Call(*(x.bfloat16() for x in (q, k, v)), is_causal=True, scale=0.0)
    with card(cc):
        out, _ = record.load()(call, AttentionSpec.parse(spec), False)
    means = v.bfloat16().float().cumsum(2) / torch.arange(1, TOKENS + 1)[:, None]
    assert relative_l1(out, means) < 0.03
