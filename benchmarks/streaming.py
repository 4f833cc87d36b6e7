"""Would statistics of the step before do? K's mean and V's extremes reused across steps.

    python -m benchmarks.streaming [--steps 20] [--batches 3] [--json]

K is smoothed by its mean over the tokens, and V is scaled by its extremes per channel; both take
a pass over the tensor before it is quantized (``benchmarks.quantize_bytes`` counts their bytes).
Neighbouring steps resemble each other, so the pass could be saved by a streaming estimate.  This
prints what that does to the bundled model's held-out pictures: PSNR against FP16 with statistics
of the call itself, of the step before, averaged over the steps so far, of the first step only,
and with none.  K's mean may be any vector (the softmax does not see it); V's values beyond old
extremes saturate.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.accuracy.compare import Generation, end_to_end
from sage_diffusion.attend.calls import Call, Native
from sage_diffusion.attend.layer import Layer
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers.pipelines import load_pipeline
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler, class_batches
from sage_diffusion.kernels.attention import reference
from sage_diffusion.kernels.spec import AttentionSpec

SPECS = ("int8/fp8-fast", "int4/fp8-fast")

#: Where K's mean comes from, and V's extremes.
SOURCES = {
    "the call itself": ("now", "now"),
    "K's mean of the step before": ("before", "now"),
    "K's mean over the steps so far": ("running", "now"),
    "K's mean of the first step": ("first", "now"),
    "K not smoothed": ("none", "now"),
    "V's extremes of the step before": ("now", "before"),
    "both of the step before": ("before", "before"),
}

#: The step before counts half in a running mean.
_DECAY = 0.5

#: As ``sage-diffusion evaluate`` holds out.
_FIRST, _SEED, _BATCH = 4, 1000, 4


class Estimate:
    """One statistic of one layer, seen step by step."""

    def __init__(self, source: str):
        self.source = source
        self.value: Tensor | None = None

    def see(self, now: Tensor) -> Tensor:
        """What is used in this step, ``now`` being its own."""
        old = self.value
        if self.source == "none":
            return torch.zeros_like(now)
        if self.source == "now" or old is None:
            self.value = now
            return now
        if self.source == "before":
            self.value = now
        elif self.source == "running":
            self.value = _DECAY * old + (1 - _DECAY) * now
        return old


class Streaming(AttentionSession):
    """Runs every quantized call in the Torch twin, with statistics from ``source``."""

    def __init__(self, spec: str, source: tuple[str, str]):
        super().__init__(spec)
        self.source = source
        self.estimates: dict[tuple[str, str], Estimate] = {}

    def _serve(
        self, layer: Layer, spec: AttentionSpec, call: Call, native: Native
    ) -> tuple[Tensor, AttentionSpec]:
        q, k, v, mask, is_causal, scale = call.plain()
        mean = self._estimate(layer.name, "k", k.float().mean(2, keepdim=True))
        top = self._estimate(layer.name, "v", v.float().abs().amax(2, keepdim=True))
        # What K is shifted by is out of the softmax; the twin's own smoothing is switched off.
        out, _ = reference.attention(
            q.float(),
            k.float() - mean,
            v.float().clamp(-top, top),
            replace(spec, smooth_k=False),
            mask=mask,
            is_causal=is_causal,
            scale=scale,
        )
        return out.to(q.dtype), spec

    def _estimate(self, layer: str, which: str, now: Tensor) -> Tensor:
        source = self.source[which == "v"]
        return self.estimates.setdefault((layer, which), Estimate(source)).see(now)


def quality(
    sampler: Any, spec: str, source: tuple[str, str], runs: list[tuple[Any, int, Generation]]
) -> dict[str, float]:
    """PSNR in dB: of the mean squared error, and the mean over the pictures."""
    psnr: list[float] = []
    for classes, seed, exact in runs:
        found = sampler.generate(Streaming(spec, source), classes, seed)
        psnr += end_to_end(found, exact).psnr
    values = torch.tensor(psnr, dtype=torch.float64)
    pooled = -10 * torch.log10((10 ** (-values / 10)).mean())
    return {"pooled": round(float(pooled), 2), "mean": round(float(values.mean()), 2)}


def measure(steps: int, batches: int, sampler: Any = None) -> dict[str, Any]:
    """Quality by spec and source."""
    if sampler is None:
        sampler = PipelineSampler(load_pipeline("bundled"), {"num_inference_steps": steps})
    runs = [
        (classes, _SEED, sampler.generate(AttentionSession("fp16"), classes, _SEED))
        for classes in class_batches(sampler.pipe, batches, _BATCH, _FIRST)
    ]
    return {
        spec: {name: quality(sampler, spec, source, runs) for name, source in SOURCES.items()}
        for spec in SPECS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=3, help="of four pictures")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    result = measure(args.steps, args.batches)
    if args.json:
        print(json.dumps(result))
        return
    for spec, found in result.items():
        print(f"{spec + ', statistics of':40} {'PSNR, pooled':>12} {'mean':>6}")
        for name, psnr in found.items():
            print(f"  {name:38} {psnr['pooled']:12.2f} {psnr['mean']:6.2f}")


if __name__ == "__main__":
    main()
