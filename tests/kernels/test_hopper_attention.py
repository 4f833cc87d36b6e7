"""The Hopper kernel as compiled: run instruction by instruction, against the twin."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from helpers import card, fused_view, relative_l1

from sage_diffusion.kernels.attention import hopper, reference
from sage_diffusion.kernels.attention.hopper_support import TILE_KEYS, HopperLaunch
from sage_diffusion.kernels.formats import LOG2E, Precision
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.quantize.permute import permute_value
from sage_diffusion.kernels.spec import AttentionSpec


class Case(NamedTuple):
    """One call on quantized operands; lengths of Q and K."""

    qk: str
    head_dim: int
    q_len: int
    k_len: int
    mask: torch.dtype | None = None
    is_causal: bool = False
    heads: int = 2
    kv_heads: int = 2
    block: bool = False
    smooth_v: bool = False
    launch: HopperLaunch | None = None


CASES = [
    Case("int8", 128, 130, 257),
    Case("int8", 128, 200, 127, is_causal=True, block=True, smooth_v=True),
    Case("fp8", 128, 65, 200, heads=3, kv_heads=1),
    Case("int8", 64, 63, 200, mask=torch.bool),
    Case("int8", 64, 127, 65, launch=HopperLaunch(8, 4)),
    Case("int8", 72, 257, 257, is_causal=True, mask=torch.float16),
    Case("fp8", 40, 64, 63, mask=torch.float32),
    Case("int8", 1, 1, 1),
]


def masked(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """A mask that hides every key from the first query."""
    if case.mask is None:
        return None
    shape = (1, case.heads, case.q_len, case.k_len)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[:, :, 0] = False
    if case.mask == torch.bool:
        return mask
    return torch.where(mask, torch.randn(shape, generator=generator), -torch.inf).to(case.mask)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:4])))
def test_equals_the_twin(case):
    g = torch.Generator().manual_seed(case.q_len)
    q = torch.randn(1, case.heads, case.q_len, case.head_dim, generator=g)
    k = torch.randn(1, case.kv_heads, case.k_len, case.head_dim, generator=g)
    v = torch.randn(1, case.kv_heads, case.k_len, case.head_dim, generator=g) + 1
    qk = Precision(case.qk)
    operands = (
        quantize.quantize_rows(
            q, qk, block=128 if case.block else 1, multiplier=2 * LOG2E / case.head_dim**0.5
        ),
        quantize.quantize_rows(k, qk, block=64 if case.block else 1),
    )
    mean = quantize.token_mean(v) if case.smooth_v else None
    values = quantize.quantize_value(v, Precision.FP8, mean=mean)
    options = {"is_causal": case.is_causal, "mask": masked(case, g)}
    with card(90) as gpu:
        out, lse = hopper.attend_quantized(
            *operands, permute_value(values), **options, launch=case.launch
        )
    assert [name for name, _ in gpu.launches] == ["_scales_kernel", "attention_kernel"]
    want, want_lse = reference.attend_quantized(*operands, values, **options, tile=TILE_KEYS)
    # P rounded to 8 bits may differ by one code where exp2 differs in the last place.
    assert relative_l1(out, want) < 1e-4
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    if case.mask is not None:
        assert not out[:, :, 0].any() and torch.isneginf(lse[:, :, 0]).all()


@pytest.mark.parametrize(
    "name,scale,mask",
    [
        ("int8/fp8+smooth_v", -0.2, torch.arange(200)[None, None, None] < 70),
        ("fp8/fp8+rotate", None, None),
    ],
)
def test_whole_call(name, scale, mask):
    """Quantizers and attention in a row, on views of fused projections; a mask of the keys."""
    spec = AttentionSpec.parse(name)
    q = fused_view(1, 2, 70, 64, 3)
    k, v = fused_view(1, 1, 200, 64, 4) + 2, fused_view(1, 1, 200, 64, 5) + 4
    copies = [x.clone() for x in (q, k, v)]
    with card(90) as gpu:
        out, lse = hopper.attention(q, k, v, spec, mask=mask, scale=scale, return_lse=True)
    names = [name for name, _ in gpu.launches]
    assert names.count("attention_kernel") == 1 and ("_bias_kernel" in names) == (mask is not None)
    want, want_lse = reference.attention(q, k, v, spec, mask=mask, scale=scale)
    assert out.dtype == q.dtype
    assert relative_l1(out, want) < 1e-3
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


def test_refuses_what_it_cannot_read():
    x = torch.zeros(1, 1, 2, 64)
    int8, int4 = (quantize.quantize_rows(x, p) for p in (Precision.INT8, Precision.INT4))
    fp8, value8 = (quantize.quantize_value(x, p) for p in (Precision.FP8, Precision.INT8))
    with pytest.raises(ValueError, match="must both be int8 or fp8, got int8 and int4"):
        hopper.attend_quantized(int8, int4, fp8)
    with pytest.raises(ValueError, match=r"v must be fp8 .*, got int8 and fp16_accumulator=False"):
        hopper.attend_quantized(int8, int8, value8)
    with pytest.raises(ValueError, match="got fp8 and fp16_accumulator=True"):
        hopper.attend_quantized(int8, int8, fp8, fp16_accumulator=True)
    with pytest.raises(ValueError, match="delta_s must be None"):
        hopper.attend_quantized(int8, int8, fp8, delta_s=x)
    with pytest.raises(ValueError, match="int8/int8: the kernel reads P and V in fp8, not in int8"):
        hopper.attention(x, x, x, AttentionSpec.parse("int8/int8"))
