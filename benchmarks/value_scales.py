"""What scales of V from a sample cost: V alone is quantized, of four layers of SmolLM2-135M.

    python -m benchmarks.value_scales

Relative L1 of the output against exact attention in float64; the softmax is exact.  The tensors are
those of ``benchmarks.fidelity``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.fidelity import capture
from sage_diffusion.accuracy.metrics import rel_l1
from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.quantize.limits import FP8_FAST_VALUE_MAX, V_SMALLEST_SHARE

LAYERS = (2, 10, 18, 28)

Quantizer = Callable[[Tensor], Tensor]


def from_all(precision: Precision) -> Quantizer:
    """A scale per channel of the largest value of all tokens; INT8 minus the sample's mean."""

    def back(v: Tensor) -> Tensor:
        mean = _sampled(v).mean(2) if precision is Precision.INT8 else None
        return quantize.dequantize_value(quantize.quantize_value(v, precision, mean=mean))

    return back


def with_room(room: float) -> Quantizer:
    """FP8 with scales of the sample that leave room for values so many times as large."""

    def back(v: Tensor) -> Tensor:
        scale = _largest(_sampled(v)) * (room / Precision.FP8.qmax)
        return quantize.dequantize_value(quantize.quantize_value(v, Precision.FP8, scale=scale))

    return back


def with_tiles(v: Tensor) -> Tensor:
    """FP8 within 2.25, scales of the sample and a factor of 64 tokens."""
    scale = _largest(_sampled(v)) / FP8_FAST_VALUE_MAX
    made = quantize.quantize_value(v, Precision.FP8, scale=scale, fast=True)
    return quantize.dequantize_value(made)


def int8_tiles(power_of_two: bool) -> Quantizer:
    """INT8 minus the sample's mean, with the sample's scales and a factor of 128 tokens."""

    def back(v: Tensor) -> Tensor:
        mean = _sampled(v).mean(2, keepdim=True)
        scale = (_sampled(v) - mean).square().mean(2, keepdim=True).sqrt()
        tiles = ((v - mean) / scale).unflatten(2, (-1, 128))
        factor = tiles.abs().amax((3, 4), keepdim=True) / Precision.INT8.qmax
        if power_of_two:
            factor = factor.log2().ceil().exp2()
        return ((tiles / factor).round() * factor).flatten(2, 3) * scale + mean

    return back


def int8_own_tiles(tokens: int) -> Quantizer:
    """INT8 minus the sample's mean, with a scale per channel and so many tokens."""

    def back(v: Tensor) -> Tensor:
        mean = _sampled(v).mean(2, keepdim=True)
        tiles = (v - mean).unflatten(2, (-1, tokens))
        scale = tiles.abs().amax(3, keepdim=True) / Precision.INT8.qmax
        return ((tiles / scale).round() * scale).flatten(2, 3) + mean

    return back


def _sampled(v: Tensor) -> Tensor:
    return v[:, :, quantize.sampled_tokens(v.shape[2], v.device)]


def _largest(x: Tensor) -> Tensor:
    amax = x.abs().amax(2)
    return torch.maximum(amax, amax.amax(-1, keepdim=True) * V_SMALLEST_SHARE)


VARIANTS: dict[str, Quantizer] = {
    "fp8, all tokens": from_all(Precision.FP8),
    **{f"fp8, sample, room {room:g}": with_room(room) for room in (1.0, 2.0, 64.0, 256.0, 512.0)},
    "fp8 within 2.25, sample, tiles": with_tiles,
    "int8, all tokens": from_all(Precision.INT8),
    **{f"int8, channels and {n} tokens": int8_own_tiles(n) for n in (64, 128)},
    "int8, sample, tiles": int8_tiles(False),
    "int8, sample, tiles, powers of two": int8_tiles(True),
}


def measure(calls: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Mean relative L1 of every variant."""
    found = dict.fromkeys(VARIANTS, 0.0)
    for q, k, v in calls:
        group = q.shape[1] // k.shape[1]
        scores = q.double() @ k.double().repeat_interleave(group, 1).transpose(2, 3)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = (scores * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1)
        exact = weights @ v.double().repeat_interleave(group, 1)
        for name, back in VARIANTS.items():
            out = weights @ back(v).double().repeat_interleave(group, 1)
            found[name] += rel_l1(out, exact) / len(calls)
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    calls = capture()
    for name, error in measure([calls[i] for i in LAYERS]).items():
        print(f"{name:38} {error:.4f}")


if __name__ == "__main__":
    main()
