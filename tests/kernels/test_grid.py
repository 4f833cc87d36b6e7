"""Whole calls as compiled, over a covering design of kernels, shapes, masks and switches.

The simulated card stops at every access out of bounds and every race.  What each kernel was handed
is recorded and handed to its twin: quantizers must agree bit for bit, attention on the same codes
within the rounding of its accumulators.  ``make test`` runs each kernel once, ``make grid`` all.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import grid
from helpers import card, fused_view, relative_l1, same_bits

from sage_diffusion.kernels.attention import entry, reference, terms
from sage_diffusion.kernels.attention.gluon_columns import key_scales
from sage_diffusion.kernels.attention.hopper_support import TILE_KEYS
from sage_diffusion.kernels.formats import LOG2E, TILE_N, QuantizedValue
from sage_diffusion.kernels.quantize import permute
from sage_diffusion.kernels.quantize import reference as twin
from sage_diffusion.kernels.quantize import triton as quantize
from sage_diffusion.kernels.rope import apply_rope
from sage_diffusion.kernels.spec import AttentionSpec


def test_every_pair_of_values_occurs():
    covered = set().union(*map(grid.pairs_of, grid.calls()))
    assert not set(grid.every_pair()) - covered
    assert len(grid.calls()) < 1.2 * len(grid.KERNELS) * len(grid.VALUES["head_dim"])
    for call in grid.calls():
        assert call.head_dim <= call.kernel.largest_head_dim
    for field, values in grid.VALUES.items():
        assert {getattr(call, field) for call in grid.slice_of_calls()} == set(values)


def make_mask(call: grid.Call, heads: int) -> Tensor | None:
    """Its second query sees nothing where queries differ, and a view's rows are not aligned."""
    g = torch.Generator().manual_seed(call.q_len)
    kept = torch.arange(call.k_len) < max(1, call.k_len - 5)
    if call.mask == "none":
        return None
    if call.mask == "keys":
        return kept[None, None, None]
    if call.mask == "key-bias":
        bias = torch.randn(1, heads, 1, call.k_len, generator=g)
        return bias.masked_fill(~kept, -math.inf)
    if call.mask == "queries":
        rows = torch.randn(call.q_len, 1, generator=g)
        rows[1:2] = -math.inf
        return rows
    seen = torch.zeros(1, heads, call.q_len, call.k_len + 3, dtype=torch.bool)[..., 3:]
    seen[:] = torch.rand(seen.shape, generator=g) > 0.4
    seen[:, :, 1:2] = False
    if call.mask == "rows":
        return seen
    bias = 3 * torch.randn(1, 1, call.q_len, call.k_len, generator=g)
    bias[..., 0] = torch.finfo(torch.float32).min
    return bias.masked_fill(~seen[:, :1], -math.inf)


def inputs(call: grid.Call, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V; K and V have means for smoothing to take out."""
    dtype = getattr(torch, call.dtype)
    found = []
    for seed, (h, length) in enumerate(
        ((heads, call.q_len), (heads // call.group, call.k_len), (heads // call.group, call.k_len))
    ):
        x = fused_view(1, h, length, call.head_dim, seed, dtype)
        x += seed  # of the storage, so that strides stay
        found.append(x if call.strides == "fused" else x.contiguous())
    return found[0], found[1], found[2]


@contextlib.contextmanager
def recorded(module: Any, *names: str) -> Iterator[list[tuple[str, tuple, dict, Any]]]:
    """Name, arguments and result of every call of these functions."""
    log: list[tuple[str, tuple, dict, Any]] = []
    with contextlib.ExitStack() as stack:
        for name in names:
            function = getattr(module, name, None)
            if function is None:
                continue

            def record(*args, _name=name, _function=function, **kwargs):
                out = _function(*args, **kwargs)
                log.append((_name, args, kwargs, out))
                return out

            stack.enter_context(mock.patch.object(module, name, record))
        yield log


def check_together(args: tuple, options: dict, got: tuple) -> None:
    """The twins of what one launch does, and K's scales as the launch that makes them alone."""
    q, k, v, spec, found = args
    q_codes, q_mean, k_codes, values = got
    given = {"rotation": spec.rotate, "clip": spec.clip, "sign_seed": options["sign_seed"]}
    assert (q_mean is None) != spec.smooth_q
    if q_mean is not None:
        torch.testing.assert_close(q_mean, twin.block_mean(q, 128), rtol=0, atol=1e-5)
    of_q = {"mean": q_mean, "factor": found.q_factor, "multiplier": options["multiplier"]}
    same(q_codes, twin.quantize_rows(q, spec.qk, **of_q, **given))
    of_k = {"mean": found.k_mean, "factor": found.k_factor}
    same(k_codes._replace(columns=None), twin.quantize_rows(k, spec.qk, **of_k, **given))
    assert (k_codes.columns is None) == (options["column_factor"] is None)
    if k_codes.columns is not None:
        assert same_bits(k_codes.columns, key_scales(k_codes, options["column_factor"]))
    if not isinstance(values, QuantizedValue):
        assert values is v
        return
    want = twin.quantize_value(
        v,
        spec.pv,
        mean=found.v_mean,
        scale=found.v_scale,
        fast=spec.pv_accumulator == "fp16",
        clip=spec.clip,
        sums=values.sums is not None,
        by_tile=spec.tile_v,
    )
    same(values, permute.permute_value(want) if options["permuted"] else want)


def check_quantizer(name: str, args: tuple, options: dict, got: Any) -> None:
    """The twin on the same input and means, bit for bit."""
    if name == "quantize_together":
        check_together(args, options, got)
        return
    options = dict(options)
    rope = options.pop("rope", None)
    if rope is not None:
        args = (apply_rope(args[0], rope), *args[1:])
    if name == "quantize_smoothed_rows":
        got, mean = got
        torch.testing.assert_close(mean, twin.block_mean(args[0], 128), rtol=0, atol=1e-5)
        want = twin.quantize_rows(*args, mean=mean, **options)
    elif name == "quantize_rows":
        want = twin.quantize_rows(*args, **options)
    else:
        options.pop("stats", None)  # of V, from which it takes extremes
        permuted = options.pop("permuted", False)
        want = twin.quantize_value(*args, **options)
        want = permute.permute_value(want) if permuted else want
    same(got, want)


def same(got: tuple, want: tuple) -> None:
    """Fields of the one and of the other, bit for bit."""
    for x, y in zip(got, want, strict=True):
        assert same_bits(x, y) if isinstance(x, Tensor) else x == y


def in_token_order(bias: Tensor, k_len: int) -> Tensor:
    """A bias per key from the order in which the Gluon kernels read it."""
    tiles = bias.unflatten(-1, (-1, 64))
    return tiles[..., permute.column_order().argsort()].flatten(-2)[..., :k_len]


def check_bias(args: tuple, options: dict, got: Tensor) -> None:
    """Delta-S and a mask of the keys, whose sum the kernel adds to S."""
    heads, k = args
    want = torch.zeros(1, heads, 1, k.shape[2])
    if options.get("q_mean") is not None:
        first, count = options["first_block"], options["blocks"]
        mean = options["q_mean"][:, :, first : first + count]
        want = reference.delta_s(mean, k, options["k_mean"], options["multiplier"])
    mask = options.get("mask")
    if mask is not None and mask.dtype == torch.bool:
        want = torch.where(mask, want, -math.inf)
    elif mask is not None:
        added = (mask.float() * LOG2E).clamp(terms.MASK_FLOOR, -terms.MASK_FLOOR)
        want = want + torch.where(torch.isneginf(mask), -math.inf, added)
    torch.testing.assert_close(in_token_order(got, k.shape[2]), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            call,
            id=call.name,
            marks=() if call in grid.slice_of_calls() else pytest.mark.exhaustive,
        )
        for call in grid.calls()
    ],
)
def test_call(call: grid.Call):
    heads = 3 if call.group == 3 else 2
    q, k, v = inputs(call, heads)
    mask = make_mask(call, heads)
    spec = AttentionSpec.parse(call.kernel.spec + call.switch)
    module = importlib.import_module(f"sage_diffusion.kernels.attention.{call.kernel.backend}")
    quantizers = ("quantize_rows", "quantize_smoothed_rows", "quantize_value", "quantize_together")
    with (
        card(call.kernel.cc),
        recorded(quantize, *quantizers) as quantized,
        recorded(module, "attend_quantized") as attended,
        recorded(entry, "key_bias") as biased,
    ):
        out, lse = module.attention(
            q, k, v, spec, mask=mask, is_causal=call.is_causal, return_lse=call.return_lse
        )
        ((_, operands, options, (got, got_lse)),) = attended
        bias = options.get("bias")
        if callable(bias):
            bias = bias(0, -(-call.q_len // 128))
        for made in quantized:
            check_quantizer(*made)
    for _, *made in biased:
        check_bias(*made)

    q_codes, k_codes, values = operands
    if call.kernel.backend != "triton" and isinstance(values, QuantizedValue):
        values = permute.restore_value(values)
    delta_s = None
    if bias is not None:
        delta_s = in_token_order(bias, call.k_len).expand(-1, -1, -(-call.q_len // 128), -1)
    want, want_lse = reference.attend_quantized(
        q_codes,
        k_codes,
        values,
        delta_s=delta_s,
        mask=options.get("mask"),
        is_causal=call.is_causal,
        fp16_accumulator=options.get("fp16_accumulator", False),
        unsigned_p=options.get("unsigned_p", False),
        tile=TILE_KEYS if call.kernel.backend == "hopper" else TILE_N,
    )
    assert out is got and out.dtype == q.dtype
    want = want.to(out.dtype)
    if want.any():
        # P rounded to 8 bits may differ by one code where exp2 differs in the last place, and an
        # output rounded to half by one of its own.
        assert relative_l1(out, want) < 2e-4
    assert torch.equal(
        out.float()[torch.isneginf(want_lse)], want[torch.isneginf(want_lse)].float()
    )
    if not call.return_lse:
        assert lse is None
        return
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-5, atol=1e-4)
    if spec.smooth_k:
        k_mean = reference.means_and_factors(q, k, v, spec).k_mean
        got_lse = got_lse + terms.smoothed_lse(q, k_mean, call.head_dim**-0.5)
    torch.testing.assert_close(lse, got_lse, rtol=1e-5, atol=1e-4)
