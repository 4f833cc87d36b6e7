"""What balances Q's and K's channels: the twin on hard inputs, and the kernel against the twin."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import card, fused_view, relative_l1

from sage_diffusion.kernels.attention import reference as attention
from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.quantize import reference
from sage_diffusion.kernels.rope import Rope, apply_rope
from sage_diffusion.kernels.spec import AttentionSpec


def normal(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def error(q, k, v, name):
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return relative_l1(attention.attention(q, k, v, AttentionSpec.parse(name))[0], want)


@pytest.mark.parametrize(
    ("length", "block"), [(1, 2), (2, 2), (130, 2), (256, 4), (600, 8), (1024, 16), (4097, 16)]
)
def test_one_token_of_every_sixteen(length, block):
    """Of a short sequence one of fewer: 64 tokens at least, where there are as many."""
    tokens = reference.sampled_tokens(length, torch.device("cpu"))
    assert (tokens // block).tolist() == list(range(-(-length // block)))
    assert tokens.max() < length
    if length == 1024:  # of a picture every column is met, not the same of every row
        assert all((tokens % width).unique().numel() > width // 2 for width in (16, 32, 64))


#: Channels that carry the signal, by head; factors of K that Q has the inverse of.
CHANNELS = {"four": [[3, 17, 40, 55]] * 2, "one": [[9]] * 2, "one per head": [[9], [30]]}


@pytest.mark.parametrize("where", CHANNELS)
@pytest.mark.parametrize("factor", [30.0, 60.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_keys_with_few_large_channels_are_like_any_others(where, factor, dim):
    q, k, v = normal(*[(1, 2, 512, dim)] * 3, seed=dim)
    limits = {"int8/fp16": 1.2, "int4/fp8-fast": 1.3, "fp4/fp8-fast": 1.3}
    plain = {name: error(q, k, v, name) for name in limits}
    for head, channels in enumerate(CHANNELS[where]):
        k[:, head, :, channels] *= factor
        q[:, head, :, channels] /= factor
    for name, limit in limits.items():
        assert error(q, k, v, name) < limit * plain[name], name
    assert error(q, k, v, "int4/fp8-fast-balance") > 1.5 * plain["int4/fp8-fast"]


def test_factors_are_powers_of_two_whose_product_is_one():
    q, k, v = normal((2, 4, 200, 40), (2, 2, 130, 40), (2, 2, 130, 40))
    k[..., 7] *= 100.0
    k[..., 8] *= 1e9
    q[:, 2:, :, 9] = 0.0
    k[..., 10] = 5.0  # nothing is left of it once it is smoothed
    found = reference.sample(q, k, v, AttentionSpec.parse("int4/int8"))
    exponents = found.q_factor.log2()
    assert torch.equal(exponents, exponents.round()) and exponents.abs().max() == 8
    assert torch.equal(found.q_factor * found.k_factor, torch.ones(2, 2, 40))
    assert (exponents[..., 7] > exponents[..., :7].amax(-1)).all() and (
        exponents[..., 8] == 8
    ).all()
    assert (found.q_factor[:, 1, 9] == 1).all() and (found.q_factor[..., 10] == 1).all()
    tokens = reference.sampled_tokens(130, q.device)
    torch.testing.assert_close(found.k_mean, k[:, :, tokens].mean(2))
    torch.testing.assert_close(found.v_mean, v[:, :, tokens].mean(2))
    plain = reference.sample(q, k, v, AttentionSpec.parse("int8/fp16-smooth_k"))
    assert plain[:2] == (None, None)
    assert found.v_scale is None


def test_scales_of_v_leave_room_for_what_the_sample_misses():
    _, k, v = normal(*[(1, 2, 512, 64)] * 3)
    tokens = reference.sampled_tokens(512, v.device)
    v[:, :, tokens, 5] = 0.0
    spec = AttentionSpec.parse("int8/fp8-fast")
    scale = reference.sample(k, k, v, spec).v_scale
    seen = v[:, :, tokens].abs().amax(2)
    assert torch.equal(scale[..., 6:], seen[..., 6:] * (1 / 2.25))
    assert torch.equal(scale[..., 5], seen.amax(-1) * (1 / 16) * (1 / 2.25))
    nothing = reference.sample(k, k, torch.zeros_like(v), spec)
    assert (nothing.v_scale == 1).all()


@pytest.mark.parametrize(
    ("name", "factor", "limit"),
    [
        *(("int8/fp8", 200.0, 0.04), ("int8/fp8-fast", 200.0, 0.04), ("fp4/fp4", 200.0, 0.2)),
        *(("int8/fp8", 1e8, math.inf), ("int8/fp8-fast", 1e8, 0.04), ("fp4/fp4", 1e8, math.inf)),
    ],
)
def test_an_outlier_of_v_that_the_sample_misses(name, factor, limit):
    """There is room for 256 times of what it meets, or a factor of the tile."""
    q, k, v = normal(*[(1, 1, 512, 64)] * 3)
    unseen = min(set(range(512)) - set(reference.sampled_tokens(512, v.device).tolist()))
    v[:, :, unseen] *= factor
    k[:, :, unseen] += q.mean(2) * 8
    assert error(q, k, v, name) < limit  # finite at least


@pytest.mark.parametrize("name", ["int8/fp16", "int8/int8", "int4/int8", "fp4/fp4", "fp8/fp8"])
def test_hard_inputs(name):
    """Nothing in a tensor, one token, an outlier that no sample meets, rows of a picture."""
    spec = AttentionSpec.parse(name)
    four_bit = spec.clip
    zeros = torch.zeros(1, 2, 40, 64)
    out, lse = attention.attention(zeros, zeros, zeros, spec)
    assert not out.any() and lse.isfinite().all()
    one = normal(*[(1, 2, 1, 64)] * 3)
    assert relative_l1(attention.attention(*one, spec)[0], one[2]) < 0.1
    q, k, v = normal(*[(1, 1, 256, 64)] * 3)
    unseen = set(range(256)) - set(reference.sampled_tokens(256, q.device).tolist())
    k[:, :, min(unseen)] *= 1e30
    out, _ = attention.attention(q, k, v, spec)
    assert out.isfinite().all()
    for period in (16, 32, 64):
        q, k, v = normal(*[(1, 1, 512, 64)] * 3, seed=period)
        k = k + 4 * normal((1, 1, period, 64), seed=1)[0].repeat(1, 1, 512 // period, 1)
        plain = dataclasses.replace(spec, balance=False)
        errors = []
        for candidate in (spec, plain):
            want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            errors.append(relative_l1(attention.attention(q, k, v, candidate)[0], want))
        assert errors[0] < (1.3 if four_bit else 1.2) * errors[1]


# ---------------------------------------------------------------------- the kernels
#: cc, batch, heads, KV heads, Lq, Lk, D, dtype, interleaved RoPE or none, spec.
CASES = {
    "odd": (80, 2, 4, 2, 257, 131, 40, torch.float16, None, "int4/int8-tile_v"),
    "bfloat16": (90, 1, 2, 2, 1, 33, 128, torch.bfloat16, None, "int8/fp8-smooth_k+smooth_v"),
    "wide": (120, 1, 1, 1, 70, 2100, 256, torch.float16, None, "int8/fp8-fast"),
    "rope": (89, 2, 2, 1, 200, 65, 64, torch.float16, True, "int4/fp8-fast+smooth_v"),
    "rope halves": (80, 1, 2, 2, 33, 200, 64, torch.bfloat16, False, "int8/int8"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_finds_what_the_twin_finds(name):
    module = pytest.importorskip("sage_diffusion.kernels.quantize.sample")
    cc, batch, heads, kv_heads, q_len, k_len, dim, dtype, pairs, spec = CASES[name]
    spec = AttentionSpec.parse(spec)
    q = fused_view(batch, heads, q_len, dim, 0, dtype) + 1
    k, v = (fused_view(batch, kv_heads, k_len, dim, seed, dtype) + 3 for seed in (1, 2))
    k[..., 3] *= 20.0
    k[..., 5], q[..., 6] = 0.0, 0.0
    ropes = (None, None)
    if pairs is not None:
        angles = (torch.rand(length, dim // 2) * 6 for length in (q_len, k_len))
        ropes = tuple(Rope(x.cos(), x.sin(), pairs) for x in angles)
    with card(cc) as gpu:
        got = module.sample(q, k, v, spec, rope_q=ropes[0], rope_k=ropes[1])
    assert [launch for launch, _ in gpu.launches] == ["_sample_kernel"]
    turned = [apply_rope(x, rope) for x, rope in zip((q, k), ropes, strict=True)]
    want = reference.sample(*turned, v, spec)
    if "-tile_v" in str(spec):
        parts = torch.stack(
            [torch.stack([x.amin(2), x.amax(2)]) for x in v.float().split(128, 2)], 3
        )
        assert torch.equal(got.v_extremes, parts)
    assert (got.v_extremes is None) == ("-tile_v" not in str(spec))
    assert torch.equal(got.q_factor, want.q_factor) and torch.equal(got.k_factor, want.k_factor)
    assert len(got.q_factor.unique()) > 1
    for name in ("k_mean", "v_mean", "v_scale"):
        assert (getattr(got, name) is None) == (getattr(want, name) is None)
    if want.v_mean is not None:
        torch.testing.assert_close(got.v_mean, want.v_mean, rtol=0, atol=1e-5)
    if want.v_scale is not None:  # about a mean whose sum has another order
        rtol = 0 if want.v_mean is None else 1e-5
        torch.testing.assert_close(got.v_scale, want.v_scale, rtol=rtol, atol=0)
    if want.k_mean is not None:
        torch.testing.assert_close(got.k_mean, want.k_mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothed", [False, True])
def test_balanced_rows_are_bit_exact(smoothed):
    """Two heads share a factor; it comes after the mean and before the rotation."""
    triton = pytest.importorskip("sage_diffusion.kernels.quantize.triton")
    x = fused_view(2, 4, 131, 72, 0)
    factor = torch.exp2(torch.randint(-8, 9, (2, 2, 72), generator=torch.Generator()).float())
    options = {"factor": factor, "rotation": True, "multiplier": 0.3}
    precision = Precision.INT4 if smoothed else Precision.INT8
    with card(80):
        if smoothed:
            got, mean = triton.quantize_smoothed_rows(x, precision, clip=True, **options)
            options |= {"mean": mean, "clip": True}
        else:
            options["mean"] = reference.token_mean(x)
            got = triton.quantize_rows(x, precision, **options)
    want = reference.quantize_rows(x, precision, **options)
    assert torch.equal(got.data, want.data) and torch.equal(got.scale, want.scale)
