"""The Triton quantizers, as compiled, bit for bit against the twin."""

import numpy as np
import pytest
import torch
from helpers import fused_view, same_bits, steep
from ptxvm import gpu

from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.quantize import reference
from sage_diffusion.kernels.quantize.permute import permute_value

triton = pytest.importorskip("sage_diffusion.kernels.quantize.triton")


def seed_of(value):
    return torch.tensor([value], dtype=torch.int32)


ROWS = {
    "int8": (80, 72, {"precision": Precision.INT8}),
    "int8-mean-unaligned": (89, 41, {"precision": Precision.INT8, "mean": "token"}),
    "int8-block-rotated": (90, 128, {"precision": Precision.INT8, "block": 128, "rotation": True}),
    "int8-block-64": (120, 64, {"precision": Precision.INT8, "block": 64, "multiplier": 0.18}),
    "int4": (
        80,
        64,
        {"precision": Precision.INT4, "mean": "block", "rotation": True, "clip": True},
    ),
    "int4-256": (86, 256, {"precision": Precision.INT4, "mean": "token", "rotation": True}),
    "fp8": (89, 1, {"precision": Precision.FP8, "mean": "token", "multiplier": 0.7}),
    "fp8-block": (120, 40, {"precision": Precision.FP8, "block": 64, "rotation": True}),
    "int8-signs": (
        89,
        64,
        {"precision": Precision.INT8, "rotation": True, "sign_seed": seed_of(987654321)},
    ),
    "fp4": (100, 40, {"precision": Precision.FP4, "mean": "token", "multiplier": 0.7}),
}


def same_rows(got, want):
    """Equal bit for bit, and formats too."""
    micro = (got.micro is None) == (want.micro is None)
    if micro and got.micro is not None:
        micro = same_bits(got.micro, want.micro)
    codes = same_bits(got.data, want.data) and same_bits(got.scale, want.scale)
    return codes and micro and (got.precision, got.block) == (want.precision, want.block)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    cc, dim, options = ROWS[name]
    x = fused_view(1, 2, 35 if options["precision"] is Precision.FP4 else 131, dim, seed=len(name))
    mean = options.get("mean")
    if mean is not None:
        mean = reference.token_mean(x) if mean == "token" else reference.block_mean(x, 128)
    options = {**options, "mean": mean}
    with gpu(cc):
        got = triton.quantize_rows(x, **options)
    want = reference.quantize_rows(x, **options)
    assert same_rows(got, want)


@pytest.mark.parametrize(
    ("cc", "precision", "dim", "options"),
    [
        (89, Precision.INT4, 64, {"rotation": True, "clip": True, "multiplier": 0.3}),
        (80, Precision.INT4, 40, {}),
        (86, Precision.INT4, 128, {"rotation": True, "clip": True}),
        (
            120,
            Precision.FP4,
            128,
            {"rotation": True, "sign_seed": seed_of(2**31 - 1), "clip": True, "multiplier": 0.3},
        ),
    ],
)
def test_smoothed_rows_in_one_pass(cc, precision, dim, options):
    x = fused_view(1, 1 if precision is Precision.FP4 else 2, 131, dim, seed=dim) + 3.0
    with gpu(cc) as driver:
        got, mean = triton.quantize_smoothed_rows(x, precision, **options)
    assert [name for name, _ in driver.launches] == ["_quantize_rows_kernel"]
    torch.testing.assert_close(mean, reference.block_mean(x, 128), rtol=0, atol=2e-6)
    assert same_rows(got, reference.quantize_rows(x, precision, mean=mean, **options))
    with pytest.raises(ValueError, match="int8, int4, fp8 or fp4, got fp16"):
        triton.quantize_smoothed_rows(x, Precision.FP16)


def kernels_of(function):
    """Compiled variants that a kernel has."""
    return sum(len(caches[0]) for caches in function.device_caches.values())


def test_another_seed_compiles_nothing():
    """The kernels read it: as little as a captured graph are they told of it."""
    x, seed = fused_view(1, 1, 17, 64, seed=0), seed_of(3)
    options = {"precision": Precision.INT4, "rotation": True, "sign_seed": seed}
    with gpu(89):
        first = triton.quantize_rows(x, **options)
        compiled = kernels_of(triton._quantize_rows_kernel)
        seed.fill_(4)
        second = triton.quantize_rows(x, **options)
    one, other = (
        reference.quantize_rows(x, **{**options, "sign_seed": seed_of(s)}) for s in (3, 4)
    )
    assert same_rows(first, one) and same_rows(second, other) and not same_rows(one, other)
    assert kernels_of(triton._quantize_rows_kernel) == compiled > 0


@pytest.mark.parametrize(
    "precision,length",
    [(Precision.INT4, 1), (Precision.INT4, 31), (Precision.INT4, 33), (Precision.FP4, 17)],
)
def test_rows_of_any_length_and_bfloat16_extremes(precision, length):
    """A group of zeros, denormals and saturating rows, in the clamped path of bfloat16."""
    x = fused_view(1, 1, length, 72, seed=length, dtype=torch.bfloat16)
    x[:, :, 0] = 0.0
    x[:, :, -1] *= 1e38
    if length > 2:
        x[:, :, 1] *= 1e-39
    options = {"precision": precision, "rotation": True, "clip": True}
    with gpu(89):
        got = triton.quantize_rows(x, **options)
    assert same_rows(got, reference.quantize_rows(x, **options))
    assert got.scale.isfinite().all()


VALUES = {
    "int8": (80, 72, torch.float16, {"precision": Precision.INT8, "sums": True}),
    "int8-tiles": (80, 72, torch.float16, {"precision": Precision.INT8, "by_tile": True}),
    "int8-tiles-permuted": (
        120,
        40,
        torch.bfloat16,
        {"precision": Precision.INT8, "by_tile": True, "permuted": True, "mean": "token"},
    ),
    "fp8-smooth": (89, 40, torch.float16, {"precision": Precision.FP8, "mean": "token"}),
    "fp8-fast": (120, 256, torch.bfloat16, {"precision": Precision.FP8, "fast": True}),
    "fp8-sampled": (89, 40, torch.float16, {"precision": Precision.FP8, "scale": 7.0}),
    "fp8-fast-tiles": (
        90,
        72,
        torch.bfloat16,
        {"precision": Precision.FP8, "fast": True, "scale": 7.0},
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    cc, dim, dtype, options = VALUES[name]
    v = fused_view(1, 2, 131, dim, seed=dim, dtype=dtype) + 3
    v[..., dim // 2] = 0.0
    if options.get("mean"):
        options = {**options, "mean": reference.token_mean(v)}
    if "scale" in options:
        v, scale = steep(v)
        v[:, 0, 64:128], v[:, 1, 70] = 0.0, 1e30 if dtype is torch.bfloat16 else 6e4
        options = {**options, "scale": scale.clamp(min=1e-9)}
    by_tile = options.get("by_tile", False)
    if by_tile:  # of other sizes, nothing, one beyond half, and a saturating one
        v, _ = steep(v)
        v[:, 0, 64:128], v[:, 1, 70] = 0.0, 1e30 if dtype is torch.bfloat16 else 6e4
    with gpu(cc) as driver:
        got = triton.quantize_value(v, **options)
    launched = [name for name, _ in driver.launches]
    known = by_tile or "scale" in options
    assert launched == ["_stats_kernel"] * (not known) + ["_quantize_value_kernel"]
    want = reference.quantize_value(v, **{k: x for k, x in options.items() if k != "permuted"})
    assert reference.dequantize_value(want).isfinite().all()
    want = permute_value(want) if options.get("permuted") else want
    assert same_bits(got.data, want.data)
    assert same_bits(got.scale, want.scale)
    assert (got.precision, got.length) == (want.precision, want.length)
    assert (got.sums is None) == (not options.get("sums"))
    assert got.sums is None or torch.equal(got.sums, want.sums)
    assert (got.tiles is None) == (not options.get("fast") or "scale" not in options)
    assert got.tiles is None or torch.equal(got.tiles, want.tiles)


def test_means_and_extremes():
    x = fused_view(2, 3, 600, 40, seed=0)
    with gpu(80):
        stats, blocks = triton.channel_stats(x), triton.block_mean(x, 128)
        mean = triton.token_mean(x)
    torch.testing.assert_close(stats.mean, reference.token_mean(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(mean, stats.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(blocks, reference.block_mean(x, 128), rtol=0, atol=1e-6)
    assert torch.equal(stats.low, x.float().amin(2)) and torch.equal(stats.high, x.float().amax(2))


def test_known_extremes_give_the_same_values():
    v = fused_view(1, 1, 70, 64, seed=1)
    with gpu(89):
        stats = triton.channel_stats(v)
        got = triton.quantize_value(v, Precision.INT8, mean=stats.mean, stats=stats)
        want = triton.quantize_value(v, Precision.INT8, mean=stats.mean)
    assert same_bits(got.data, want.data) and same_bits(got.scale, want.scale)


def test_offsets_beyond_32_bits():
    """Fused QKV views overflow 32-bit offsets: here the third row starts at element 2^31."""
    storage = torch.from_numpy(np.zeros(2**31 + 64, np.float16))  # pages that nobody touches
    x = storage.as_strided((1, 1, 3, 64), (1, 1, 2**30, 1))
    x.copy_(torch.randn(1, 1, 3, 64))
    with gpu(89):
        rows = triton.quantize_rows(x, Precision.INT8)
        values = triton.quantize_value(x, Precision.INT8)
    assert same_bits(rows.data, reference.quantize_rows(x, Precision.INT8).data)
    assert same_bits(values.data, reference.quantize_value(x, Precision.INT8).data)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"precision": Precision.FP16}, "int8, int4, fp8 or fp4, got fp16"),
        ({"precision": Precision.FP4, "block": 64}, "block must be 1 for fp4, got 64"),
        ({"precision": Precision.INT8, "block": 48}, "block must be 1, 32, 64 or 128, got 48"),
    ],
)
def test_rows_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        triton.quantize_rows(torch.zeros(1, 1, 2, 64), **options)


def test_values_refuse():
    v = torch.zeros(1, 1, 2, 64)
    with pytest.raises(ValueError, match="must be int8, fp8 or fp4, got int4"):
        triton.quantize_value(v, Precision.INT4)
    with pytest.raises(ValueError, match="permuted must be True for fp4, got False"):
        triton.quantize_value(v, Precision.FP4)
