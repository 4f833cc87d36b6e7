"""The Torch attention against float64: published figures and orderings, masks, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import biased, relative_l1

from sage_diffusion.kernels.attention import reference
from sage_diffusion.kernels.formats import LOG2E, Precision
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.spec import LADDER, AttentionSpec

SPECS = [AttentionSpec.parse(name) for name in LADDER]


def exact(q, k, v, **options):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)


@pytest.mark.parametrize("name,limit", [("int8/fp16", 0.022), ("int8/fp8", 0.040)])
def test_normal_tensors_meet_the_published_error(name, limit):
    """SageAttention reports 0.021 for INT8 per block with FP16 (2410.02367, table 9)."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1024, 128, generator=g).half() for _ in range(3))
    out, _ = reference.attention(q, k, v, AttentionSpec.parse(name))
    assert relative_l1(out, exact(q, k, v)) <= limit


@pytest.fixture(scope="module")
def errors():
    """Relative L1 error of a spec on tensors with channel bias and outliers."""
    q, k, v = biased(1, 2, 256, 64, seed=0)
    centred = v.double() - v.double().mean(2, keepdim=True)
    want = exact(q, k, v)
    spread = exact(q, k, centred).abs().sum()  # what is left of the output without V's bias
    known: dict[str, float] = {}

    def error(name: str) -> float:
        if name not in known:
            out, _ = reference.attention(q, k, v, AttentionSpec.parse(name))
            known[name] = ((out.double() - want).abs().sum() / spread).item()
        return known[name]

    return error


@pytest.mark.parametrize(
    "better,worse",
    [
        # SageAttention2, 2411.10958, table 4: Q and K > Q > K > nothing
        ("int4/fp16-rotate-clip", "int4/fp16-rotate-clip-smooth_k"),
        ("int4/fp16-rotate-clip-smooth_k", "int4/fp16-rotate-clip-smooth_q"),
        ("int4/fp16-rotate-clip-smooth_q", "int4/fp16-rotate-clip-smooth_q-smooth_k"),
        # without smoothing, rotation alone does not rescue 4 bit
        ("int4/fp16-rotate-clip", "int4/fp16-clip-smooth_q-smooth_k"),
        # with both, rotation and clipping help
        ("int4/fp16", "int4/fp16-rotate-clip"),
        # table 6: per token > per block
        ("int4/fp16-rotate-clip", "int4/fp16-rotate-clip+block"),
        ("int8/fp16", "int8/fp16+block"),
        # SageAttention, 2410.02367, table 1: smoothing K
        ("int8/fp16", "int8/fp16-smooth_k"),
        # table 7: FP16 > FP8; INT8 P has a scale per row and tile here, not the paper's static one
        ("int8/fp16", "int8/int8"),
        ("int8/int8", "int8/fp8"),
        # table 10: smoothing V where it is biased
        ("int8/fp8+smooth_v", "int8/fp8"),
        ("int8/fp8-fast+smooth_v", "int8/fp8-fast"),
        ("int8/int8", "int8/int8-smooth_v"),
        ("int8/int8", "int8/int8-unsigned_p"),
        # of 8 bit, too
        ("int8/fp16", "int8/fp16-rotate"),
        ("int8/fp16", "int4/fp16"),
    ],
)
def test_published_orderings(errors, better, worse):
    assert errors(better) < 0.95 * errors(worse)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_masks_and_causal_combine(spec):
    """Masked keys have no influence at all, and a fully masked row gives 0."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 70, 40, generator=g) for _ in range(3))
    k, v = k[:, :2], v[:, :2]
    mask = torch.rand(2, 1, 70, 70, generator=g) > 0.3
    mask[:, :, 5] = False
    bias = torch.where(mask, 0.5, -math.inf)
    out, lse = reference.attention(q, k, v, spec, mask=mask, is_causal=True)
    same, shifted = reference.attention(q, k, v, spec, mask=bias, is_causal=True)
    torch.testing.assert_close(out, same, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse + 0.5, shifted, rtol=1e-4, atol=1e-4)
    assert not out[:, :, 5].any() and torch.isneginf(lse[:, :, 5]).all()
    visible = mask & torch.ones(70, 70, dtype=torch.bool).tril()
    want = exact(q, k, v, attn_mask=visible, enable_gqa=True)
    want = torch.where(visible.any(-1, keepdim=True), want, 0.0)
    assert relative_l1(out, want) < {"fp16": 1e-6, "int8": 0.06, "int4": 0.2, "fp4": 0.25}[spec.qk]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_log_sum_exp_is_of_the_unsmoothed_scores(spec):
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 65, 64, generator=g) for _ in range(3))
    k = k + 3
    _, lse = reference.attention(q, k, v, spec)
    want = ((q.double() @ k.double().mT) / 8).logsumexp(-1)
    tolerance = 0.02 if spec.qk in ("fp16", "int8") else 0.3
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("qk", ["int4", "fp4"])
def test_unbiased_scores_are_right_in_expectation(qk, head_dim):
    """V of ones on the diagonal shows P, and P the scores: their slope on the exact ones."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 8, length, head_dim) for length in (1024, 64))
    v = torch.eye(64, head_dim).expand(1, 8, -1, -1)
    exact = q @ k.transpose(2, 3) / head_dim**0.5
    exact = exact - exact.mean(-1, keepdim=True)

    def slope(name):
        p = reference.attention(q, k, v, AttentionSpec.parse(name))[0][..., :64]
        return ((p.log() * exact).sum() / exact.square().sum()).item()

    assert slope(f"{qk}/fp16") == pytest.approx(1, abs=3e-3)
    assert slope(f"{qk}/fp16-unbiased") < 0.985


def test_int8_tile_without_a_visible_key_below_a_low_maximum():
    """Its own maximum is -inf; any stand-in above the running one would overflow exp2."""
    q, k = torch.full((1, 1, 1, 64), -40.0), torch.full((1, 1, 128, 64), 40.0)
    v = torch.randn(1, 1, 128, 64)
    mask = (torch.arange(128) < 64)[None]
    spec = AttentionSpec.parse("int8/int8-smooth_k")
    out, _ = reference.attention(q, k, v, spec, mask=mask)
    torch.testing.assert_close(out, v[:, :, :64].mean(2, keepdim=True), rtol=0, atol=0.02)


@pytest.mark.parametrize("qk", ["int4", "int8"])
def test_row_sums_of_int8_weights(qk):
    """INT4 Q and K divide by the rounded weights, which then sum to one; INT8 by the exact ones."""
    g = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, 2, n, 64, generator=g) for n in (65, 200))
    v = torch.randn(1, 2, 1, 64, generator=g).expand(1, 2, 200, 64)
    codes = (
        quantize.quantize_rows(q, Precision(qk), multiplier=LOG2E / 8),
        quantize.quantize_rows(k, Precision(qk)),
    )
    values = quantize.quantize_value(v, Precision.INT8)
    out, lse = reference.attend_quantized(*codes, values)
    rows, keys = (quantize.dequantize_rows(x)[..., :64].double() for x in codes)
    exact_lse = (rows @ keys.mT / LOG2E).logsumexp(-1)
    off = (out / quantize.dequantize_value(values)[:, :, :1] - 1).abs().amax()
    lse_off = (lse - exact_lse).abs().amax()
    assert (off < 1e-6 and lse_off > 1e-4) if qk == "int4" else (off > 1e-4 and lse_off < 1e-5)


@pytest.mark.parametrize("qk", ["int4", "int8"])
def test_an_unsigned_p_halves_its_own_rounding(qk):
    """P's error alone, on codes that are the same: its step is 1/255 of a tile's largest weight."""
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, 200, 64, generator=g) for _ in range(3))
    codes = (
        quantize.quantize_rows(q, Precision(qk), multiplier=LOG2E / 8),
        quantize.quantize_rows(k, Precision(qk)),
    )
    values = quantize.quantize_value(v, Precision.INT8)
    rows, keys = (quantize.dequantize_rows(x)[..., :64].double() for x in codes)
    weights = (rows @ keys.mT / LOG2E).softmax(-1)
    want = weights @ quantize.dequantize_value(values).double()
    signed, unsigned = (
        relative_l1(reference.attend_quantized(*codes, values, unsigned_p=flag)[0], want)
        for flag in (False, True)
    )
    assert 0.4 < unsigned / signed < 0.6


@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e4, 1e30])
def test_extreme_inputs_stay_finite(spec, magnitude):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, 66, 64, generator=g) for _ in range(3))
    mask = torch.full((66, 66), torch.finfo(torch.float32).max)
    mask[:, ::2] = torch.finfo(torch.float32).min
    scaled = [(x * magnitude).bfloat16() for x in (q, k)]
    out, lse = reference.attention(*scaled, v.bfloat16(), spec, mask=mask)
    assert out.isfinite().all() and not lse.isnan().any()


@pytest.mark.parametrize("length", [1, 63, 65])
def test_short_sequences(length):
    g = torch.Generator().manual_seed(length)
    q = torch.randn(1, 2, 3, 8, generator=g)
    k, v = (torch.randn(1, 2, length, 8, generator=g) for _ in range(2))
    for spec in SPECS[1:5]:
        out, _ = reference.attention(q, k, v, spec, is_causal=True)
        want = exact(q, k, v, attn_mask=torch.ones(3, length, dtype=torch.bool).tril())
        assert relative_l1(out, want) < 0.05, spec
