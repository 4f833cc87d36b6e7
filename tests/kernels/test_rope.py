"""RoPE folded into the quantizers: the twin against diffusers, the kernels against the twin."""

import importlib

import pytest
import torch
from helpers import card, fused_view, relative_l1, same_bits

from sage_diffusion.kernels.attention import reference as attention
from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.quantize import limits, reference
from sage_diffusion.kernels.rope import Rope, apply_rope, check_rope, rotated
from sage_diffusion.kernels.spec import AttentionSpec

PAIRINGS = [pytest.param(True, id="interleaved"), pytest.param(False, id="halves")]


def tables(length, dim, interleaved, *, full=False, batch=None, seed=0):
    """Random angles; the columns of full tables differ within a pair, which no rotation needs."""
    g = torch.Generator().manual_seed(seed)
    shape = (length, dim if full else dim // 2)
    angle = 6.0 * torch.rand(shape if batch is None else (batch, *shape), generator=g)
    return Rope(angle.cos(), angle.sin(), interleaved)


def full_tables(rope):
    """The same rotation with D columns, as diffusers writes them."""
    if rope.interleaved:
        return rope._replace(
            cos=rope.cos.repeat_interleave(2, -1), sin=rope.sin.repeat_interleave(2, -1)
        )
    return rope._replace(cos=torch.cat([rope.cos] * 2, -1), sin=torch.cat([rope.sin] * 2, -1))


def same_rows(got, want):
    assert len(got) == len(want)
    return all(
        same_bits(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(got, want, strict=True)
    )


# ---------------------------------------------------------------------- the twin
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("interleaved", PAIRINGS)
def test_twin_rounds_to_what_diffusers_computes(interleaved, dtype):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    x = fused_view(2, 3, 65, 72, 0, dtype)
    rope = tables(65, 72, interleaved, full=True)
    want = embeddings.apply_rotary_emb(
        x, (rope.cos, rope.sin), use_real_unbind_dim=-1 if interleaved else -2
    )
    assert torch.equal(rotated(x, rope), want)
    assert apply_rope(x, rope).dtype == torch.float32


@pytest.mark.parametrize("interleaved", PAIRINGS)
def test_half_tables_are_the_full_ones(interleaved):
    x = fused_view(1, 2, 63, 40, 1)
    rope = tables(63, 40, interleaved)
    assert torch.equal(apply_rope(x, rope), apply_rope(x, full_tables(rope)))


def test_scores_depend_on_distance_alone():
    """What a rotation is for: q and k moved by as many tokens give the same score."""
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(200.0)[:, None] * 0.5 ** torch.arange(32)
    for interleaved in (True, False):
        rope = Rope(angle.cos(), angle.sin(), interleaved)
        rows, keys = (apply_rope(x.expand(1, 1, 200, 64), rope)[0, 0] for x in (q, k))
        scores = rows @ keys.T
        distances = scores.diagonal(-7)
        torch.testing.assert_close(distances, distances[:1].expand(193), rtol=0, atol=2e-3)
        assert (scores.diagonal(-8)[0] - distances[0]).abs() > 0.1


def test_tables_of_a_batch_are_cut_with_it():
    shared, own = tables(9, 8, True), tables(9, 8, True, batch=4)
    assert shared.rows(2, 4) is shared
    assert torch.equal(own.rows(2, 4).sin, own.sin[2:4])


@pytest.mark.parametrize(
    "spec", ["fp16", "int8/fp16", "int8/fp8", "int4/fp8-fast", "int8/int8+block"]
)
def test_reference_attention_rotates_q_and_k(spec):
    q, k, v = fused_view(2, 6, 70, 40, 0), *(fused_view(2, 2, 50, 40, s) + 1 for s in (1, 2))
    ropes = tables(70, 40, True, batch=2), tables(50, 40, False, seed=1)
    parsed = AttentionSpec.parse(spec)
    out, lse = attention.attention(q, k, v, parsed, rope_q=ropes[0], rope_k=ropes[1])
    turned = [apply_rope(x, rope) for x, rope in zip((q, k), ropes, strict=True)]
    want, want_lse = attention.attention(*turned, v, parsed)
    assert out.dtype == q.dtype and torch.equal(out, want.to(q.dtype))
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: r._replace(cos=r.cos[:8]), ValueError, r"L=9, D=8, got \(8, 4\)"),
        (lambda r: r._replace(sin=r.sin[:, :3]), ValueError, r"\[L, D / 2\] .* got \(9, 3\)"),
        (lambda r: r._replace(cos=r.cos.expand(3, 9, 4)), ValueError, r"B=2, .* \(3, 9, 4\)"),
        (lambda r: r._replace(cos=r.cos[None]), ValueError, "cos and sin must have one shape"),
        (
            lambda r: r._replace(sin=r.sin.half()),
            TypeError,
            "sin must be float32, got torch.float16",
        ),
        (lambda r: r._replace(cos=r.cos.to("meta")), ValueError, "on q's device cpu, got meta"),
        (lambda r: r._replace(cos=None), TypeError, "cos must be a tensor, got NoneType"),
        (lambda r: (r.cos, r.sin), TypeError, "rope_q must be a Rope or None, got tuple"),
    ],
)
def test_wrong_tables_say_what_must_hold(change, error, message):
    with pytest.raises(error, match=message):
        check_rope(change(tables(9, 8, True)), torch.zeros(2, 1, 9, 8), "q")


def test_an_odd_head_dim_has_no_pairs():
    with pytest.raises(ValueError, match="head_dim must be even to be rotated by rope_k, got 41"):
        check_rope(tables(9, 40, True), torch.zeros(1, 1, 9, 41), "k")


# ---------------------------------------------------------------------- the kernels
#: cc, precision, length, head dim, dtype, full tables, tables per batch entry, options.
ROWS = {
    "int8": (80, "int8", 65, 72, torch.float16, True, None, {}),
    "int8-block": (90, "int8", 127, 128, torch.bfloat16, False, 2, {"block": 64}),
    "int4": (89, "int4", 63, 64, torch.bfloat16, True, 2, {"rotation": True, "clip": True}),
    "fp8": (120, "fp8", 1, 128, torch.float16, False, None, {"rotation": True}),
    "fp4": (120, "fp4", 17, 40, torch.float16, True, 1, {}),
}


@pytest.mark.parametrize("interleaved", PAIRINGS)
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_bit_exact(name, interleaved):
    triton = pytest.importorskip("sage_diffusion.kernels.quantize.triton")
    cc, precision, length, dim, dtype, full, batch, options = ROWS[name]
    x = fused_view(2, 1, length, dim, len(name), dtype)
    x[:, :, length // 2] *= 1e30 if dtype is torch.bfloat16 else 100.0
    rope = tables(length, dim, interleaved, full=full, batch=batch)
    turned = apply_rope(limits.finite(x), rope)
    options = {**options, "precision": Precision(precision), "mean": reference.token_mean(turned)}
    with card(cc):
        got = triton.quantize_rows(x, rope=rope, **options)
    assert same_rows(got, reference.quantize_rows(turned, **options))


@pytest.mark.parametrize("interleaved", PAIRINGS)
def test_smoothed_rows_in_one_pass(interleaved):
    triton = pytest.importorskip("sage_diffusion.kernels.quantize.triton")
    x = fused_view(1, 2, 131, 64, 3) + 3.0
    rope = tables(131, 64, interleaved)
    options = {"rotation": True, "multiplier": 0.3}
    with card(89) as driver:
        got, mean = triton.quantize_smoothed_rows(x, Precision.INT4, rope=rope, **options)
    assert [name for name, _ in driver.launches] == ["_quantize_rows_kernel"]
    turned = apply_rope(x, rope)
    torch.testing.assert_close(mean, reference.block_mean(turned, 128), rtol=0, atol=2e-6)
    assert same_rows(got, reference.quantize_rows(turned, Precision.INT4, mean=mean, **options))


@pytest.mark.parametrize("interleaved", PAIRINGS)
def test_means_are_those_of_the_rotated(interleaved):
    triton = pytest.importorskip("sage_diffusion.kernels.quantize.triton")
    x = fused_view(2, 1, 200, 72, 0)
    # The tables' columns of every second channel, as a host slices them out of full ones.
    full = full_tables(tables(200, 72, True, batch=2))
    rope = Rope(full.cos[..., 0::2], full.sin[..., 1::2], interleaved)
    with card(80):
        mean, blocks = triton.token_mean(x, rope), triton.block_mean(x, 128, rope)
    turned = apply_rope(x, rope)
    torch.testing.assert_close(mean, reference.token_mean(turned), rtol=0, atol=1e-6)
    torch.testing.assert_close(blocks, reference.block_mean(turned, 128), rtol=0, atol=1e-6)


CALLS = {
    "triton": (80, "triton", "int8/int8"),
    "gluon-int4": (89, "gluon", "int4/fp8-fast"),
    "hopper": (90, "hopper", "int8/fp8"),
    "gluon-fp4": (120, "gluon", "fp4/fp8-fast"),
}


@pytest.mark.parametrize("name", CALLS)
def test_whole_calls_rotate_q_and_k(name):
    """Two heads share K; K's mean is large before it is rotated, and Q's tables are not K's."""
    pytest.importorskip("triton")
    cc, backend, spec = CALLS[name]
    module = importlib.import_module(f"sage_diffusion.kernels.attention.{backend}")
    q = fused_view(1, 2, 65, 64, 0, torch.bfloat16) + 1
    k, v = (fused_view(1, 1, 63, 64, seed, torch.bfloat16) + 2 for seed in (1, 2))
    ropes = {"rope_q": tables(65, 64, True), "rope_k": tables(63, 64, cc == 89, seed=1)}
    parsed = AttentionSpec.parse(spec)
    with card(cc):
        out, lse = module.attention(q, k, v, parsed, return_lse=True, **ropes)
    want, want_lse = attention.attention(q, k, v, parsed, **ropes)
    assert relative_l1(out, want) < 1e-5
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("interleaved", PAIRINGS)
def test_delta_s_is_of_the_rotated_keys(interleaved):
    """K is read by slices of 64 channels: here pairs D / 2 apart lie in two of them."""
    pytest.importorskip("triton")
    columns = importlib.import_module("sage_diffusion.kernels.attention.gluon_columns")
    k = fused_view(2, 1, 65, 72, 0) + 2.0
    rope, q_mean = tables(65, 72, interleaved, batch=2), torch.randn(2, 3, 2, 72)
    turned = apply_rope(k, rope)
    mean = reference.token_mean(turned)
    with card(89):
        got = columns.key_bias(3, k, q_mean=q_mean, k_mean=mean, blocks=2, rope=rope)
    want = attention.delta_s(q_mean, turned, mean, 1.0)
    torch.testing.assert_close(got, columns.as_columns(want), rtol=1e-5, atol=1e-4)
