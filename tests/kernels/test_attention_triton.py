"""The Triton kernel, as compiled for four architectures, against the twin.

The simulated card stops at every access out of bounds and every race.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import card, fused_view, relative_l1, steep

from sage_diffusion.kernels.attention import reference
from sage_diffusion.kernels.formats import LOG2E, Precision
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.spec import AttentionSpec

triton = pytest.importorskip("sage_diffusion.kernels.attention.triton")


class Case(NamedTuple):
    """One launch: compute capability, P/V format and shapes; Hkv = H / group."""

    cc: int
    pv: str
    dim: int
    q_len: int
    k_len: int
    heads: int = 2
    group: int = 1
    batch: int = 1
    mask: str | None = None
    is_causal: bool = False
    block: bool = False
    smooth_v: bool = False
    unsigned_p: bool = False
    tiled: bool = False
    dtype: torch.dtype = torch.float16
    return_lse: bool = True


CASES = {
    "sm80-odd": Case(80, "fp16", 72, 200, 65, heads=3, group=3, is_causal=True),
    "sm80-keys": Case(80, "int8", 64, 63, 200, batch=2, mask="keys", return_lse=False),
    "sm80-one": Case(80, "fp16", 1, 1, 1, heads=1),
    "sm80-int8-future": Case(80, "int8", 128, 70, 65, heads=1, mask="bool", is_causal=True),
    "sm89-additive": Case(89, "fp8", 128, 65, 200, mask="additive"),
    "sm89-fast": Case(89, "fp8-fast", 40, 200, 63, heads=3, group=3, is_causal=True),
    "sm89-wide": Case(89, "fp16", 256, 65, 130, mask="queries", dtype=torch.bfloat16),
    "sm89-float": Case(89, "fp16", 64, 70, 64, mask="double", dtype=torch.float32),
    "sm90-whole": Case(90, "fp8", 64, 128, 128, is_causal=True, block=True),
    "sm90-pair": Case(90, "int8", 128, 65, 65, heads=4, group=2, batch=2, smooth_v=True),
    "sm80-unsigned": Case(80, "int8", 40, 70, 130, mask="bool", unsigned_p=True),
    "sm90-unsigned": Case(90, "int8", 64, 65, 130, is_causal=True, smooth_v=True, unsigned_p=True),
    "sm80-tiles": Case(80, "int8", 40, 70, 200, mask="bool", unsigned_p=True, tiled=True),
    "sm90-tiles": Case(90, "int8", 128, 65, 130, is_causal=True, unsigned_p=True, tiled=True),
    "sm120-tiles": Case(120, "int8", 64, 33, 70, mask="additive", smooth_v=True, tiled=True),
    "sm90-row": Case(90, "fp16", 40, 1, 200, mask="bool"),
    "sm90-fast": Case(90, "fp8-fast", 128, 63, 129, mask="keys", block=True, tiled=True),
    "sm120-block": Case(120, "fp16", 128, 200, 200, heads=3, group=3, block=True),
    "sm120-wide": Case(120, "fp8-fast", 256, 63, 65, smooth_v=True, mask="additive", tiled=True),
    "sm120-short": Case(120, "int8", 72, 129, 1, is_causal=True),
}


def make_mask(kind: str | None, case: Case) -> torch.Tensor | None:
    """Masks that broadcast along different dims; row 3 sees nothing where rows differ."""
    g = torch.Generator().manual_seed(7)
    if kind is None:
        return None
    if kind == "keys":  # [B, 1, 1, Lk]: padding
        return (
            torch.arange(case.k_len)
            < torch.tensor([case.k_len - 5, 70])[: case.batch, None, None, None]
        )
    if kind == "queries":  # [Lq, 1], additive
        rows = torch.randn(case.q_len, 1, generator=g)
        rows[3:] = -math.inf
        return rows
    visible = torch.rand(1, case.heads, case.q_len, case.k_len, generator=g) > 0.4
    visible[:, :, 3:4] = False
    if kind == "bool":  # a view whose rows are not aligned
        wide = torch.zeros(1, case.heads, case.q_len, case.k_len + 3, dtype=torch.bool)
        wide[..., 3:] = visible
        return wide[..., 3:]
    bias = torch.randn(visible.shape, generator=g) * 3
    bias[..., 0] = torch.finfo(torch.float32).min
    bias = bias.masked_fill(~visible, -math.inf)
    return bias.double() if kind == "double" else bias[:, :1].clone()


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel(name: str):
    case = CASES[name]
    heads = (case.heads, case.heads // case.group)
    q = fused_view(case.batch, heads[0], case.q_len, case.dim, 0, case.dtype)
    k = fused_view(case.batch, heads[1], case.k_len, case.dim, 1, case.dtype)
    v = fused_view(case.batch, heads[1], case.k_len, case.dim, 2, case.dtype)
    if case.dtype == torch.float32:
        v = v * torch.logspace(-3, 7, case.dim)  # beyond the range of FP16
    multiplier = case.dim**-0.5 * LOG2E
    rows = {"multiplier": multiplier, "block": 128 if case.block else 1}
    operands = (
        quantize.quantize_rows(q, Precision.INT8, **rows),
        quantize.quantize_rows(k, Precision.INT8, block=64 if case.block else 1),
    )
    fast = case.pv == "fp8-fast"
    values: Any = v
    if case.pv != "fp16":
        mean = quantize.token_mean(v) if case.smooth_v else None
        made = {"mean": mean, "fast": fast, "sums": case.unsigned_p}
        if case.tiled:
            v, made["scale"] = steep(v)
        made["by_tile"] = case.tiled and case.pv == "int8"
        values = quantize.quantize_value(v, Precision(case.pv[:4].strip("-")), **made)
    mask = make_mask(case.mask, case)
    options = {"mask": mask, "is_causal": case.is_causal, "fp16_accumulator": fast}
    options["unsigned_p"] = case.unsigned_p
    before = None if mask is None else mask.clone()
    with card(case.cc) as gpu:
        out, lse = triton.attend_quantized(
            *operands, values, **options, return_lse=case.return_lse, out_dtype=torch.float32
        )
    assert len(gpu.launches) == 1
    want, want_lse = reference.attend_quantized(*operands, values, **options)
    # P rounded to FP8 may differ by one code where exp2 differs in the last place.
    assert relative_l1(out, want) < (1e-4 if case.pv.startswith("fp8") else 1e-5)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    hidden = torch.isneginf(want_lse)
    assert not out[hidden].any()
    if case.return_lse:
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    else:
        assert lse is None
    if mask is not None:
        assert hidden.any() == (case.mask != "keys" and case.q_len > 3)
        assert torch.equal(mask, before)


@pytest.mark.parametrize(
    "cc,name,scale",
    [
        (80, "int8/fp16+rotate", None),
        (89, "int8/fp8", 0.3),
        (90, "int8/int8+block", -0.2),
        (89, "int8/fp8-fast-sample_v", None),  # as plans of version 3 name it
        (120, "int8/fp8-fast+smooth_v", 0.0),
    ],
)
def test_whole_call(cc, name, scale):
    """Quantizers and attention in a row, on views of fused projections, against the twin."""
    spec = AttentionSpec.parse(name)
    q = fused_view(1, 2, 70, 64, 3)
    k, v = fused_view(1, 1, 130, 64, 4) + 2, fused_view(1, 1, 130, 64, 5) + 4
    copies = [x.clone() for x in (q, k, v)]
    mask = torch.arange(130)[None, None, None] < 100
    with card(cc) as gpu:
        out, lse = triton.attention(q, k, v, spec, mask=mask, scale=scale, return_lse=True)
    want, want_lse = reference.attention(q, k, v, spec, mask=mask, scale=scale)
    assert out.dtype == q.dtype and gpu.launches[-1][0] == "_attention_fwd_kernel"
    assert relative_l1(out, want) < 1e-3
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize(("cc", "unsigned_p"), [(80, False), (90, True)])
def test_the_largest_weight_stays_within_a_byte(cc, unsigned_p):
    """Where float32's steps of a score are whole numbers, rounding up keeps the largest code."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g) for n in (33, 130, 130))
    operands = (
        quantize.quantize_rows(q, Precision.INT8, multiplier=2.0**18),
        quantize.quantize_rows(k, Precision.INT8),
        quantize.quantize_value(v, Precision.INT8, sums=True),
    )
    with card(cc):
        out, _ = triton.attend_quantized(*operands, unsigned_p=unsigned_p)
    want, _ = reference.attend_quantized(*operands, unsigned_p=unsigned_p)
    assert relative_l1(out, want) < 0.01


def test_offsets_beyond_32_bits():
    """One tile of V spans 2^31 elements, so that even a step to the next leaves 32 bits."""
    try:
        storage = torch.from_numpy(np.zeros(128 * 2**25 + 64, np.float16))  # pages nobody touches
    except MemoryError:
        pytest.skip("needs 8 GiB of address space")
    v = storage.as_strided((1, 1, 129, 64), (1, 1, 2**25, 1))
    v.copy_(torch.randn(1, 1, 129, 64))
    q, k = (quantize.quantize_rows(torch.randn(1, 1, n, 64), Precision.INT8) for n in (2, 129))
    with card(89):
        out, _ = triton.attend_quantized(q, k, v)
    want, _ = reference.attend_quantized(q, k, v.contiguous())
    assert relative_l1(out, want) < 1e-5


def test_refuses_what_it_cannot_read():
    x = torch.zeros(1, 1, 2, 64)
    int8, fp8 = (quantize.quantize_rows(x, p) for p in (Precision.INT8, Precision.FP8))
    with pytest.raises(ValueError, match="k must be int8, got fp8"):
        triton.attend_quantized(int8, fp8, x)
    with pytest.raises(ValueError, match="delta_s must be None"):
        triton.attend_quantized(int8, int8, x, delta_s=torch.zeros(1, 1, 1, 2))
    with pytest.raises(ValueError, match="v must be int8 or fp8, got fp4"):
        triton.attend_quantized(int8, int8, quantize.quantize_value(x, Precision.FP4))
    with pytest.raises(ValueError, match="unsigned_p needs v in int8 with its sums, got half"):
        triton.attend_quantized(int8, int8, x, unsigned_p=True)
    with pytest.raises(ValueError, match="fp16_accumulator needs v in fp8, got half"):
        triton.attend_quantized(int8, int8, x, fp16_accumulator=True)
    with pytest.raises(ValueError, match=r"int4/int8: the kernel reads Q and K in int8 or fp4"):
        triton.attention(x, x, x, AttentionSpec.parse("int4/int8"))
