"""Sampled rows against the whole call, for every spec, mask and granularity."""

import math

import pytest
import torch
import torch.nn.functional as F

from sage_diffusion.attend import rows as measure_module
from sage_diffusion.attend.rows import (
    RowCall,
    compare_rows,
    exact_attention,
    measure,
    outliers,
    sample_rows,
)
from sage_diffusion.kernels.attention.reference import attention
from sage_diffusion.kernels.spec import LADDER, AttentionSpec


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 300, 32, generator=generator) + 1
    k = torch.randn(2, 2, 200, 32, generator=generator) + torch.randn(32, generator=generator)
    v = torch.randn(2, 2, 200, 32, generator=generator)
    return q, k, v


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("name", [*LADDER, "int8/fp8+block", "int4/fp8-clip+block+smooth_v"])
def test_rows_equal_the_whole_call(call, name, mask, is_causal):
    q, k, v = call
    spec = AttentionSpec.parse(name)
    seen = torch.rand(1, 1, 300, 200, generator=torch.Generator().manual_seed(1)) > 0.2
    masks = {None: None, "bool": seen, "additive": torch.where(seen, 0.3, -1.0)}
    rows = sample_rows(300, 40, 5)
    whole, _ = attention(q, k, v, spec, mask=masks[mask], is_causal=is_causal)
    found = RowCall(q, k, v, rows, mask=masks[mask], is_causal=is_causal).run(spec)
    # Q K^T comes from the same codes; the smooth_q term is added in another order, so now and then
    # a P next to a rounding boundary falls on its other side.
    difference = (found - whole[:, :, rows]).abs()
    assert difference.mean() < 2e-4
    assert difference.max() < 0.05


@pytest.mark.parametrize("heads", [None, 1, 4])
def test_exact_rows_come_some_heads_at_a_time(call, monkeypatch, heads):
    q, k, v = call
    mask = None
    if heads is not None:
        generator = torch.Generator().manual_seed(2)
        mask = torch.rand(2, heads, 300, 200, generator=generator) > 0.3
    rows = sample_rows(300, 20, 1)
    whole = RowCall(q, k, v, rows, mask=mask, is_causal=True).exact()
    monkeypatch.setattr(measure_module, "_MAX_VALUES", 2 * 200 * 32)  # one head of two
    parts = RowCall(q, k, v, rows, mask=mask, is_causal=True).exact()
    assert torch.allclose(parts, whole, atol=1e-6)
    seen = torch.ones(300, 200, dtype=torch.bool).tril()
    seen = seen if mask is None else mask & seen
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True, attn_mask=seen
    )
    assert torch.allclose(parts, expected[:, :, rows].nan_to_num(), atol=1e-5)


def test_rows_are_spread_distinct_and_seeded():
    rows = sample_rows(1000, 64, 3)
    assert len(rows.unique()) == 64
    assert (rows.diff() > 0).all()
    assert torch.equal(rows, sample_rows(1000, 64, 3))
    assert not torch.equal(rows, sample_rows(1000, 64, 4))
    assert sample_rows(10, 64, 0).tolist() == list(range(10))


def test_sampled_scores_are_near_the_whole_ones(call):
    q, k, v = call
    specs = [AttentionSpec.parse(name) for name in ("int8/fp8", "int4/fp8-fast")]
    few = measure(RowCall(q, k, v, sample_rows(300, 48, 0)), specs)
    every = measure(RowCall(q, k, v, torch.arange(300)), specs)
    assert torch.allclose(few, every, rtol=0.15)
    assert few[0, 2] < few[1, 2] / 10  # INT8's squared error is far below INT4's


def test_comparison_edges():
    zero, one = torch.zeros(3), torch.ones(3)
    assert compare_rows(zero, zero).tolist() == [1, 0, 0]
    assert compare_rows(torch.full((3,), torch.nan), one).tolist() == [0, 1, 1]
    assert compare_rows(one, one).tolist() == pytest.approx([1, 0, 0])


def test_outliers_find_one_loud_channel():
    x = torch.randn(1, 2, 500, 64, generator=torch.Generator().manual_seed(0))
    quiet = outliers(x)
    x[:, 1, :, 7] *= 30
    assert 3 < quiet < 6
    assert outliers(x) > 3 * quiet


def qkv(seed: int = 0, q_len: int = 70, k_len: int = 90, heads: int = 4, kv_heads: int = 2):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, q_len, 32), (2, kv_heads, k_len, 32), (2, kv_heads, k_len, 32))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mask_kind", [None, "bool", "additive", "row"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_exact_attention_is_sdpa(mask_kind, is_causal, sampled, monkeypatch) -> None:
    monkeypatch.setattr(measure_module, "_MAX_SCORES", 2 * 4 * 90 * 16)  # several slices
    q, k, v = qkv()
    generator = torch.Generator().manual_seed(1)
    full = torch.ones(70, 90, dtype=torch.bool)
    mask = None
    if mask_kind == "bool":
        mask = torch.rand(2, 1, 70, 90, generator=generator) > 0.3
        mask[..., 0] = True  # SDPA's answer for a row without any key is not ours to repeat
        full = mask
    elif mask_kind == "additive":
        mask = torch.randn(1, 4, 70, 90, generator=generator)
    elif mask_kind == "row":
        mask = torch.rand(2, 1, 1, 90, generator=generator) > 0.3
        mask[..., 0] = True
        full = mask
    bias = mask if mask_kind == "additive" else torch.zeros(1)
    if is_causal:
        full = full & torch.ones(70, 90, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(
        q.double(),
        k.double(),
        v.double(),
        attn_mask=torch.where(full, bias.double(), -math.inf),
        scale=0.2,
        enable_gqa=True,
    )
    rows = torch.tensor([3, 41, 69]) if sampled else None
    found = exact_attention(q, k, v, mask=mask, is_causal=is_causal, scale=0.2, rows=rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected if rows is None else expected[:, :, rows], atol=2e-6, rtol=1e-5
    )
