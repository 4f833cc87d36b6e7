"""The block-scaled Triton kernel, as compiled for sm_120, against the twin.

sm_100, where it is meant to run, has tensor memory, which no simulation here knows: that it is
compiled to that card's FP4 instruction is checked with every other kernel's code.
"""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from helpers import card, fused_view, relative_l1, steep

from sage_diffusion.kernels.attention import entry, reference, triton, triton_fp4
from sage_diffusion.kernels.formats import LOG2E, Precision
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.quantize.permute import permute_value
from sage_diffusion.kernels.spec import AttentionSpec


class Case(NamedTuple):
    """One call on quantized operands; lengths of Q and K."""

    pv: str
    head_dim: int
    q_len: int
    k_len: int
    mask: str | None = None
    is_causal: bool = False
    delta_s: bool = False
    heads: int = 2
    kv_heads: int = 2
    smooth_v: bool = False
    tiled: bool = False


CASES = [
    Case("fp4", 64, 65, 200, is_causal=True, delta_s=True),
    Case("fp4", 72, 200, 63, mask="additive", heads=3, kv_heads=1, smooth_v=True),
    Case("fp4", 128, 63, 65, mask="keys", delta_s=True),
    Case("fp8-fast", 40, 65, 130, mask="bool", delta_s=True, tiled=True),
    Case("fp8", 64, 1, 1),
]


def masked(case: Case, g: torch.Generator) -> torch.Tensor | None:
    """A mask that hides every key from the first query, where queries differ."""
    if case.mask is None:
        return None
    if case.mask == "keys":
        return torch.arange(case.k_len) % 3 < 2
    shape = (1, case.heads, case.q_len, case.k_len)
    mask = torch.rand(shape, generator=g) < 0.5
    mask[:, :, 0] = False
    if case.mask == "bool":
        return mask
    return torch.where(mask, torch.randn(shape, generator=g), -torch.inf)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:5])))
def test_equals_the_twin(case):
    g = torch.Generator().manual_seed(case.q_len)
    q = torch.randn(1, case.heads, case.q_len, case.head_dim, generator=g)
    k = torch.randn(1, case.kv_heads, case.k_len, case.head_dim, generator=g)
    v = torch.randn(1, case.kv_heads, case.k_len, case.head_dim, generator=g) + 1
    operands = (
        quantize.quantize_rows(q, Precision.FP4, multiplier=2 * LOG2E / case.head_dim**0.5),
        quantize.quantize_rows(k, Precision.FP4),
    )
    fast = case.pv == "fp8-fast"
    mean = quantize.token_mean(v) if case.smooth_v else None
    scale = None
    if case.tiled:
        v, scale = steep(v)
    values = quantize.quantize_value(v, Precision(case.pv[:3]), mean=mean, scale=scale, fast=fast)
    stored = permute_value(values) if case.pv == "fp4" else values
    options = {"is_causal": case.is_causal, "fp16_accumulator": fast, "mask": masked(case, g)}
    if case.delta_s:
        blocks = -(-case.q_len // 128)
        options["delta_s"] = torch.randn(1, case.heads, blocks, case.k_len, generator=g)
    with card(120) as gpu:
        out, lse = triton.attend_quantized(*operands, stored, **options)
    assert [name for name, _ in gpu.launches] == ["_attention_fp4_kernel"]
    want, want_lse = reference.attend_quantized(*operands, values, **options)
    # P may differ by one code where exp2 differs in the last place.
    assert relative_l1(out, want) < 1e-4
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    if case.mask in ("bool", "additive"):
        assert not out[:, :, 0].any() and torch.isneginf(lse[:, :, 0]).all()


def test_whole_call(monkeypatch):
    """Quantizers, delta-S by chunks and attention in a row, on views of fused projections."""
    monkeypatch.setattr(entry, "BIAS_BYTES", 0)
    spec = AttentionSpec.parse("fp4/fp4-rotate-clip+smooth_v")
    q = fused_view(1, 1, 130, 64, 3)
    k, v = fused_view(1, 1, 70, 64, 4) + 2, fused_view(1, 1, 70, 64, 5) + 4
    copies = [x.clone() for x in (q, k, v)]
    with card(120) as gpu:
        out, lse = triton.attention(q, k, v, spec, scale=-0.2, return_lse=True)
    names = [name for name, _ in gpu.launches]
    assert names.count("_attention_fp4_kernel") == names.count("_bias_kernel") == 2
    want, want_lse = reference.attention(q, k, v, spec, scale=-0.2)
    assert out.dtype == q.dtype
    assert relative_l1(out, want) < 1e-3
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


def test_refuses_what_it_cannot_read():
    x = torch.zeros(1, 1, 2, 64)
    int8, fp4 = (quantize.quantize_rows(x, p) for p in (Precision.INT8, Precision.FP4))
    fp8 = quantize.quantize_value(x, Precision.FP8)
    with pytest.raises(ValueError, match="k must be fp4, got int8"):
        triton_fp4.attend_quantized(fp4, int8, fp8)
    with pytest.raises(ValueError, match="got int8 and fp16_accumulator=False"):
        triton_fp4.attend_quantized(fp4, fp4, quantize.quantize_value(x, Precision.INT8))
