"""The Gluon kernel as compiled: run instruction by instruction, against the twin."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from helpers import card, fused_view, relative_l1, steep

from sage_diffusion.kernels.attention import entry, gluon, gluon_columns, reference
from sage_diffusion.kernels.attention.gluon_support import GluonLaunch
from sage_diffusion.kernels.formats import LOG2E, Precision
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.quantize.permute import permute_value
from sage_diffusion.kernels.spec import AttentionSpec


class Case(NamedTuple):
    """One call on quantized operands; lengths of Q and K."""

    cc: int
    qk: str
    pv: str
    head_dim: int
    q_len: int
    k_len: int
    mask: str | None = None
    is_causal: bool = False
    delta_s: bool = False
    heads: int = 2
    kv_heads: int = 2
    block: bool = False
    smooth_v: bool = False
    unsigned_p: bool = False
    tiled: bool = False
    launch: GluonLaunch | None = None


#: Tiles come by twos.
TWO = GluonLaunch(8, 2, 2)

CASES = [
    Case(89, "int4", "fp8", 128, 130, 257, delta_s=True, tiled=True),
    Case(89, "int4", "fp8", 64, 63, 200, mask="bool", tiled=True, launch=TWO),
    Case(
        80, "int4", "int8", 128, 200, 127, is_causal=True, delta_s=True, smooth_v=True, tiled=True
    ),
    Case(80, "int4", "int8", 40, 65, 64, mask="additive", is_causal=True),
    Case(86, "int8", "int8", 72, 63, 65, heads=3, kv_heads=1),
    Case(86, "int8", "int8", 72, 63, 130, heads=3, kv_heads=1, unsigned_p=True, tiled=True),
    Case(86, "int8", "int8", 64, 63, 130, smooth_v=True, unsigned_p=True),
    Case(80, "int4", "int8", 64, 65, 130, mask="bool", unsigned_p=True, tiled=True, launch=TWO),
    Case(80, "int8", "int8", 128, 127, 200, mask="additive", block=True, tiled=True),
    Case(89, "int8", "int8", 128, 33, 330, unsigned_p=True, tiled=True, launch=TWO),
    Case(89, "int8", "fp8", 96, 257, 257, is_causal=True, heads=3, kv_heads=1, tiled=True),
    Case(89, "int8", "fp8", 1, 1, 1),
    Case(89, "int4", "fp8", 160, 65, 127),
    Case(80, "int4", "int8", 256, 64, 63, delta_s=True, tiled=True),
    Case(120, "fp4", "fp8", 128, 127, 130, delta_s=True, smooth_v=True, tiled=True),
    Case(120, "fp4", "int8", 64, 63, 65, mask="additive", heads=3, kv_heads=1, tiled=True),
    Case(120, "fp4", "fp4", 128, 200, 200, is_causal=True, delta_s=True),
    Case(120, "fp4", "fp4", 64, 63, 65, mask="additive", heads=3, kv_heads=1, smooth_v=True),
    Case(120, "fp4", "fp4", 72, 65, 63, mask="bool", delta_s=True, launch=GluonLaunch(4, 2, 2)),
    Case(120, "int8", "fp4", 1, 1, 1),
    Case(120, "int8", "fp8", 80, 64, 63, mask="bool", block=True, smooth_v=True),
    Case(89, "int4", "fp8", 128, 70, 130, mask="bool", is_causal=True, delta_s=True),
    Case(120, "fp4", "fp8", 64, 33, 70, mask="bool", delta_s=True, tiled=True),
    Case(86, "int8", "int8", 64, 65, 129, mask="bool"),
    Case(89, "int4", "fp8", 64, 17, 65, mask="fp16", delta_s=True),
    Case(89, "int8", "fp8", 64, 33, 130, mask="bf16"),
]


def masked(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """A mask that hides every key from the first query."""
    if case.mask is None:
        return None
    shape = (1, case.heads, case.q_len, case.k_len)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[:, :, 0] = False
    if case.mask == "bool":
        return mask
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(case.mask, torch.float32)
    return torch.where(mask, torch.randn(shape, generator=generator), -torch.inf).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:6])))
def test_equals_the_twin(case):
    g = torch.Generator().manual_seed(case.q_len)
    q = torch.randn(1, case.heads, case.q_len, case.head_dim, generator=g)
    k = torch.randn(1, case.kv_heads, case.k_len, case.head_dim, generator=g)
    v = torch.randn(1, case.kv_heads, case.k_len, case.head_dim, generator=g) + 1
    fast, qk = case.pv == "fp8", Precision(case.qk)
    operands = (
        quantize.quantize_rows(
            q, qk, block=128 if case.block else 1, multiplier=2 * LOG2E / case.head_dim**0.5
        ),
        quantize.quantize_rows(k, qk, block=64 if case.block else 1),
    )
    mean = quantize.token_mean(v) if case.smooth_v else None
    scale, by_tile = None, case.tiled and case.pv == "int8"
    if case.tiled:
        v, scale = steep(v)
    made = {"mean": mean, "scale": scale, "fast": fast, "by_tile": by_tile}
    values = quantize.quantize_value(v, Precision(case.pv), **made)
    options = {"is_causal": case.is_causal, "fp16_accumulator": fast, "mask": masked(case, g)}
    options["unsigned_p"] = case.unsigned_p
    if case.delta_s:
        blocks = -(-case.q_len // 128)
        options["delta_s"] = torch.randn(1, case.heads, blocks, case.k_len, generator=g)
    with card(case.cc) as gpu:
        out, lse = gluon.attend_quantized(
            *operands, permute_value(values), **options, launch=case.launch
        )
    names = [name for name, _ in gpu.launches]
    assert names == ["_pack_kernel"] * bool(case.mask) + ["_scales_kernel", "attention_kernel"]
    want, want_lse = reference.attend_quantized(*operands, values, **options)
    # P rounded to 8 bits may differ by one code where exp2 differs in the last place.
    assert relative_l1(out, want) < 1e-4
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    if case.mask is not None:
        assert not out[:, :, 0].any() and torch.isneginf(lse[:, :, 0]).all()


def document_mask(q_len: int, k_len: int) -> torch.Tensor:
    """Two documents, the second behind two tiles of keys that nobody sees."""
    rows, keys = torch.arange(q_len)[:, None], torch.arange(k_len)
    return torch.where(rows < 128, keys < 40, keys >= k_len - 50)


PACKED = {
    # Of every mask: whose rows differ, what the heads and batches share, and its strides.
    "documents": (document_mask(150, 260)[None, None], False),
    "documents-causal": (document_mask(150, 260)[None, None].flip(-2), True),
    "per-batch": (torch.rand(2, 1, 150, 260, generator=torch.Generator().manual_seed(1)) < 0.1, 0),
    "per-head": (
        torch.rand(150, 260, 2, generator=torch.Generator().manual_seed(2)).movedim(-1, 0) < 0.1,
        True,
    ),
    "one-key-for-all": (torch.arange(150)[:, None] % 3 > 0, False),
    "nothing": (torch.zeros(150, 260, dtype=torch.bool), False),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
@pytest.mark.parametrize("name", PACKED)
def test_masks_of_every_broadcast_shape(name, dtype):
    """Tiles that no row of a program sees are left out; the others are hidden bit by bit."""
    mask, is_causal = PACKED[name]
    if dtype != torch.bool:
        mask = torch.where(mask, 0.25, -torch.inf).to(dtype)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 64, generator=g) for n in (150, 260, 260))
    q[:, :, ::7] *= 1e-20  # hidden scores must stay hidden whatever the scales
    k[:, :, 5] *= 30.0
    operands = (
        quantize.quantize_rows(q, Precision.INT8, multiplier=0.2),
        quantize.quantize_rows(k, Precision.INT8),
    )
    values = quantize.quantize_value(v, Precision.INT8)
    options = {"mask": mask, "is_causal": bool(is_causal)}
    with card(80):
        out, lse = gluon.attend_quantized(*operands, permute_value(values), **options)
    want, want_lse = reference.attend_quantized(*operands, values, **options)
    assert relative_l1(out, want) < 1e-4 or not want.any()
    assert ((out - want).abs() <= 0.01 * want.abs().amax(-1, True)).all()
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_the_smallest_number(dtype):
    """A row of finfo.min gives the mean of V, as in PyTorch; beside a visible key it is hidden."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g) for n in (20, 70, 70))
    mask = torch.full((20, 70), torch.finfo(dtype).min, dtype=dtype)
    mask[3:, 66] = 0.0
    operands = (
        quantize.quantize_rows(q * 0.01, Precision.INT8),
        quantize.quantize_rows(k, Precision.INT8),
    )
    values = quantize.quantize_value(v, Precision.INT8)
    with card(80):
        out, _ = gluon.attend_quantized(*operands, permute_value(values), mask=mask)
    want, _ = reference.attend_quantized(*operands, values, mask=mask)
    assert relative_l1(out, want) < 1e-3  # float32 has steps of 0.008 beside fp16's -65504
    only = quantize.dequantize_value(values)[:, :, 66:67]
    torch.testing.assert_close(out[:, :, 3:], only.expand(1, 1, 17, 64), rtol=1e-4, atol=1e-4)
    if dtype is not torch.float16:
        assert relative_l1(out[:, :, :3], v.mean(2, True).expand(1, 1, 3, 64)) < 0.1


@pytest.mark.parametrize("is_causal", [False, True])
def test_int4_weights_sum_to_one(is_causal):
    """V that is the same for every token comes out as it is: the sums add the rounded codes."""
    g = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, 2, n, 64, generator=g) for n in (130, 200))
    v = torch.randn(1, 2, 1, 64, generator=g).expand(1, 2, 200, 64)
    operands = (
        quantize.quantize_rows(q, Precision.INT4, multiplier=0.2),
        quantize.quantize_rows(k, Precision.INT4),
    )
    values = quantize.quantize_value(v, Precision.INT8)
    with card(80):
        out, _ = gluon.attend_quantized(*operands, permute_value(values), is_causal=is_causal)
    want = quantize.dequantize_value(values)[:, :, :1].expand_as(out)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cc,precision", [(80, Precision.INT8), (120, Precision.FP4)])
def test_tiles_of_falling_maxima(cc, precision):
    """Each tile's P is scaled to its own maximum, far below the running one or not."""
    g = torch.Generator().manual_seed(0)
    q, v = torch.ones(1, 1, 16, 64), torch.randn(1, 1, 256, 64, generator=g) + 1
    k = (
        torch.ones(1, 1, 256, 64)
        * torch.tensor([0.0, 1.5, -1.0, 1.0]).repeat_interleave(64)[:, None]
    )
    k = k + 0.02 * torch.randn(1, 1, 256, 64, generator=g)
    operands = (
        quantize.quantize_rows(q, Precision.INT8, multiplier=0.25),
        quantize.quantize_rows(k, Precision.INT8),
    )
    values = quantize.quantize_value(v, precision)
    with card(cc):
        out, lse = gluon.attend_quantized(*operands, permute_value(values))
    want, want_lse = reference.attend_quantized(*operands, values)
    assert relative_l1(out, want) < 1e-4
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "cc,name,q_len,scale,mask",
    [
        (89, "int4/fp8-fast", 130, -0.2, torch.arange(200)[None, None, None] < 70),
        (120, "fp4/fp4", 70, None, None),
        (80, "int8/int8+smooth_v", 70, None, torch.linspace(-3, 0, 200).expand(1, 1, 1, -1)),
    ],
)
def test_whole_call(cc, name, q_len, scale, mask, monkeypatch):
    """Quantizers, delta-S by chunks and attention in a row, on views of fused projections."""
    monkeypatch.setattr(entry, "BIAS_BYTES", 0)
    monkeypatch.setattr(gluon, "_MIN_BIAS_BLOCKS", 1)
    spec = AttentionSpec.parse(name)
    q = fused_view(1, 2, q_len, 64, 3)
    k, v = fused_view(1, 1, 200, 64, 4) + 2, fused_view(1, 1, 200, 64, 5) + 4
    copies = [x.clone() for x in (q, k, v)]
    with card(cc) as gpu:
        out, lse = gluon.attention(q, k, v, spec, mask=mask, scale=scale, return_lse=True)
    names = [name for name, _ in gpu.launches]
    assert names.count("attention_kernel") == -(-q_len // 128)
    assert names.count("_bias_kernel") == -(-q_len // 128)
    want, want_lse = reference.attention(q, k, v, spec, mask=mask, scale=scale)
    assert out.dtype == q.dtype
    assert relative_l1(out, want) < 1e-3
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize("head_dim", [40, 160])
def test_delta_s_in_column_order(head_dim):
    """The bias kernel against the twin's delta-S: some blocks of several, plus a mask."""
    q = fused_view(1, 2, 300, head_dim, 1).float()
    k = fused_view(1, 1, 70, head_dim, 2, torch.bfloat16)
    q_mean, k_mean = quantize.block_mean(q, 128), quantize.token_mean(k)
    mask = torch.where(torch.arange(70) < 65, 0.5, -torch.inf).expand(1, 2, 1, 70)
    with card(80):
        got = gluon_columns.key_bias(
            2, k, q_mean=q_mean, k_mean=k_mean, multiplier=0.3, mask=mask, first_block=1, blocks=2
        )
    want = reference.delta_s(q_mean, k, k_mean, 0.3)[:, :, 1:] + mask * LOG2E
    want = gluon_columns.as_columns(want)
    inside = gluon_columns.as_columns(torch.ones(70)) > 0
    torch.testing.assert_close(got[..., inside], want[..., inside], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "cc,qk,pv", [(89, "int8", "fp8"), (80, "int8", "int8"), (120, "fp4", "fp4")]
)
def test_rows_whose_first_tile_is_hidden(cc, qk, pv):
    """What hides a score is a large number there; its exponent's rounding must not outweigh all."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g) for n in (33, 130, 130))
    mask = (torch.arange(130) >= 66).repeat(33, 1)
    mask[0] = True  # so that the tile is looked at
    operands = (
        quantize.quantize_rows(q, Precision(qk), multiplier=0.2),
        quantize.quantize_rows(k, Precision(qk)),
    )
    values = quantize.quantize_value(v, Precision(pv), fast=pv == "fp8")
    options = {"mask": mask, "fp16_accumulator": pv == "fp8"}
    with card(cc):
        out, _ = gluon.attend_quantized(*operands, permute_value(values), **options)
    assert relative_l1(out, reference.attend_quantized(*operands, values, **options)[0]) < 1e-3


@pytest.mark.parametrize("unsigned_p", [False, True])
def test_the_largest_weight_stays_within_a_byte(unsigned_p):
    """Where float32's steps of a score are whole numbers, rounding up keeps the largest code."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g) for n in (33, 130, 130))
    operands = (
        quantize.quantize_rows(q, Precision.INT8, multiplier=2.0**18),
        quantize.quantize_rows(k, Precision.INT8),
    )
    values = quantize.quantize_value(v, Precision.INT8)
    with card(80):
        out, _ = gluon.attend_quantized(*operands, permute_value(values), unsigned_p=unsigned_p)
    want, _ = reference.attend_quantized(*operands, values, unsigned_p=unsigned_p)
    assert relative_l1(out, want) < 0.01


def test_refuses_what_it_cannot_read():
    x = torch.zeros(1, 1, 2, 64)
    int8, int4 = (quantize.quantize_rows(x, p) for p in (Precision.INT8, Precision.INT4))
    fp8 = quantize.quantize_value(x, Precision.FP8)
    with pytest.raises(ValueError, match="must both be int4, int8 or fp4, got int8 and int4"):
        gluon.attend_quantized(int8, int4, fp8)
    with pytest.raises(ValueError, match="got fp8 and fp16_accumulator=False"):
        gluon.attend_quantized(int8, int8, fp8)
    with pytest.raises(ValueError, match="unsigned_p needs v in int8, got fp8"):
        gluon.attend_quantized(int8, int8, fp8, fp16_accumulator=True, unsigned_p=True)
    with pytest.raises(ValueError, match="int8/fp8: the kernel reads P and V in int8, fp4, or"):
        gluon.attention(x, x, x, AttentionSpec.parse("int8/fp8"))
