"""One launch that quantizes Q, K and V, as compiled, against the twins."""

import pytest
import torch

pytest.importorskip("triton")

from helpers import card, fused_view, same_bits

from sage_diffusion.kernels.attention.gluon_columns import key_scales
from sage_diffusion.kernels.quantize import reference, together, triton
from sage_diffusion.kernels.quantize.permute import permute_value
from sage_diffusion.kernels.rope import Rope, apply_rope
from sage_diffusion.kernels.spec import AttentionSpec

#: cc, spec, D, Lq, Lk, dtype, interleaved RoPE, a factor of scales in column order.
CASES = {
    "int8": (89, "int8/fp8-fast+smooth_v", 64, 33, 70, torch.bfloat16, False, -0.25),
    "int4": (80, "int4/int8", 72, 131, 65, torch.float16, True, 1.0),
    "one scale": (80, "int8/int8-tile_v", 64, 33, 65, torch.float16, False, 1.0),
    "fp4": (120, "fp4/fp4", 40, 17, 64, torch.float16, True, None),
}


@pytest.mark.parametrize("name", CASES)
def test_is_what_the_twins_find(name):
    """Two query heads share one of K and V, and other signs than those of seed 0 rotate."""
    cc, spec, dim, q_len, k_len, dtype, pairs, factor = CASES[name]
    spec = AttentionSpec.parse(spec)
    q = fused_view(1, 2, q_len, dim, 0, dtype) + 1
    k, v = (fused_view(1, 1, k_len, dim, seed, dtype) + 3 for seed in (1, 2))
    g = torch.Generator().manual_seed(dim)
    angles = (torch.rand(length, dim // 2, generator=g) * 6 for length in (q_len, k_len))
    rope_q, rope_k = (Rope(x.cos(), x.sin(), pairs) for x in angles)
    turned_q, turned_k = apply_rope(q, rope_q), apply_rope(k, rope_k)
    found = reference.sample(turned_q, turned_k, v, spec)
    seed = torch.tensor([12345], dtype=torch.int32)
    options = {"column_factor": factor, "rope_q": rope_q, "rope_k": rope_k, "sign_seed": seed}
    with card(cc) as gpu:
        q_codes, q_mean, k_codes, values = together.quantize_together(
            q, k, v, spec, found, multiplier=0.3, permuted=True, **options
        )
        launched = [launch for launch, _ in gpu.launches]
        columns = None if factor is None else key_scales(k_codes, factor)
    assert launched == ["_stats_kernel"] * (name == "one scale") + ["_quantize_kernel"]
    alike = {"rotation": True, "sign_seed": seed, "clip": spec.clip}
    of_q = {"mean": q_mean, "factor": found.q_factor, "multiplier": 0.3}
    of_v = {"mean": found.v_mean, "scale": found.v_scale, "clip": spec.clip}
    of_v["by_tile"] = spec.tile_v
    want_q = reference.quantize_rows(turned_q, spec.qk, **of_q, **alike)
    want_k = reference.quantize_rows(
        turned_k, spec.qk, mean=found.k_mean, factor=found.k_factor, **alike
    )
    fast = spec.pv_accumulator == "fp16"
    want_v = permute_value(reference.quantize_value(v, spec.pv, fast=fast, **of_v))
    for got, want in ((q_codes, want_q), (k_codes, want_k), (values, want_v)):
        for part in ("data", "scale", "micro", "tiles", "mean"):
            x, y = getattr(got, part, None), getattr(want, part, None)
            assert (x is None) == (y is None) and (x is None or same_bits(x, y)), part
    assert (q_mean is None) != spec.smooth_q
    if q_mean is not None:
        exact = reference.block_mean(turned_q, 128)
        torch.testing.assert_close(q_mean, exact, rtol=0, atol=1e-5)
    assert (k_codes.columns is None) == (columns is None)
    assert columns is None or same_bits(k_codes.columns, columns)


def test_refuses_what_it_cannot_write():
    x = torch.zeros(1, 1, 2, 64)
    spec = AttentionSpec("fp16", "fp16")
    with pytest.raises(ValueError, match="int8, int4, fp8 or fp4, got fp16"):
        triton.quantize_together(x, x, x, spec, reference.Sample(None, None))
