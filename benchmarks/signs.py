"""What the signs of the rotation are worth in 4 bit, on the bundled model's held-out pictures.

    python -m benchmarks.signs [--sequences 3] [--trial layers ..] [--json]
    python -m benchmarks.signs --pick 8 [--plan plan.json] [--json]

Trials, each with several sequences of signs, all in uniform ``int4/fp8-fast``; the first is what
the others are compared with, picture by picture:

* ``steps``: other signs at every step, as a session has them;
* ``one``: the same signs at all steps;
* ``biased``: as ``steps``, without what ``unbiased`` gives back to the scores;
* ``one, biased``: neither;
* ``layers``: other signs in every layer, too;
* ``alike``: steps 2n and 2n + 1 have the same signs;
* ``opposite``: so they have, and in the second one Q and K lie half a step of the grid further in
  every rotated channel, so that a value that was rounded down is rounded up.  What that adds to
  the scores is taken out of them again, as smooth_q's part is added.

``--pick`` asks whether a sequence can be chosen: so many are rated on calibration's pictures and on
held-out ones, in 4 bit or with a plan.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from sage_diffusion.accuracy.compare import Generation, end_to_end
from sage_diffusion.attend.calls import Call
from sage_diffusion.attend.layer import Layer
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers.pipelines import load_pipeline
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler, class_batches
from sage_diffusion.kernels.attention import reference
from sage_diffusion.kernels.formats import LOG2E, QuantizedTensor
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.quantize.limits import score_gain
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan
from sage_diffusion.plan.signs import step_seed

SPEC = "int4/fp8-fast"

#: Runs of four pictures: calibration's own, and others' classes and seeds.
CALIBRATED, HELD_OUT, PER_RUN = ((4, 0), (0,)), ((3, 4), (1000, 2000)), 4

#: Step of the grid of clipped INT4 codes, relative to the root mean square of normal rows.
STEP = 0.335

Pairs = Sequence[tuple[Any, int]]


class LayerSigns(AttentionSession):
    """Every layer has a sequence of its own."""

    def serve(self, layer: Layer, call: Call, native: Any) -> Tensor:
        layer.enlist()
        sequence = 1000 * (layer.index + 1) + (self.plan.sign_seed or 0)
        self._signs.tell(step_seed(sequence, self.where.step))
        return super().serve(layer, call, native)


class Alike(AttentionSession):
    """Two steps share their signs."""

    def serve(self, layer: Layer, call: Call, native: Any) -> Tensor:
        self._signs.tell(step_seed(self.plan.sign_seed or 0, self.where.step // 2))
        return super().serve(layer, call, native)


class Opposite(Alike):
    """And the second of them rounds on a grid that is shifted by half a step."""

    def serve(self, layer: Layer, call: Call, native: Any) -> Tensor:
        if self.where.step % 2 == 0:
            return super().serve(layer, call, native)
        seed = self._signs.on(call.q.device)
        return shifted_attention(call, self.plan.default, seed).to(call.q.dtype)


def shifted_attention(call: Call, spec: AttentionSpec, seed: Tensor) -> Tensor:
    """The twin of ``spec`` with Q and K half a step further in every rotated channel."""
    multiplier = call.q.shape[-1] ** -0.5 * LOG2E
    found = reference.means_and_factors(call.q, call.k, call.v, spec)
    q_mean = quantize.block_mean(call.q, 128)
    q = quantize.prepare(call.q, q_mean, True, seed, found.q_factor)
    k = quantize.prepare(call.k, found.k_mean, True, seed, found.k_factor)
    # (q + a) (k + b) is q k + a sum(k) and what is the same for all keys.
    a, b = (0.5 * STEP * x.square().mean((2, 3), keepdim=True).sqrt() for x in (q, k))
    delta = reference.delta_s(q_mean, call.k, found.k_mean, multiplier)
    delta = delta - a * k.sum(-1)[:, :, None] * multiplier

    def codes(rows: Tensor, factor: float = 1.0) -> QuantizedTensor:
        return quantize.quantize_rows(rows, spec.qk, clip=True, multiplier=factor)

    values = quantize.quantize_value(call.v, spec.pv, scale=found.v_scale, fast=True)
    gain = score_gain(spec, call.q.shape[-1])
    return reference.attend_quantized(
        codes(q + a, multiplier * gain), codes(k + b), values, delta_s=delta, fp16_accumulator=True
    )[0]


def plain(spec: str, rotations: bool = True) -> Callable[[int], AttentionSession]:
    """A session with each step's signs, or with those of one seed at all steps."""

    def make(sequence: int) -> AttentionSession:
        plan = PrecisionPlan(AttentionSpec.parse(spec), sign_seed=sequence if rotations else None)
        return AttentionSession(plan)

    return make


def of(session: type[AttentionSession]) -> Callable[[int], AttentionSession]:
    """A session of this kind in uniform 4 bit."""
    return lambda sequence: session(PrecisionPlan(AttentionSpec.parse(SPEC), sign_seed=sequence))


TRIALS: dict[str, Callable[[int], AttentionSession]] = {
    "steps": plain(SPEC),
    "one": plain(SPEC, rotations=False),
    "biased": plain(f"{SPEC}-unbiased"),
    "one, biased": plain(f"{SPEC}-unbiased", rotations=False),
    "layers": of(LayerSigns),
    "alike": of(Alike),
    "opposite": of(Opposite),
}


class Pictures:
    """Some runs of a model, and what comes of them in FP16.

    Args:
        pipe: class-conditional pipeline.
        which: count and first of the batches of classes, and seeds.
        steps: of sampling.
    """

    def __init__(self, pipe: Any, which: Any, steps: int = 20):
        (count, first), seeds = which
        batches = class_batches(pipe, count, PER_RUN, first)
        self.pairs = [(batch, seed) for batch in batches for seed in seeds]
        self.sampler = PipelineSampler(pipe, {"num_inference_steps": steps})
        self.exact = [self._run(AttentionSession("fp16"), *pair) for pair in self.pairs]

    def _run(self, session: AttentionSession, labels: Any, seed: int) -> Generation:
        return self.sampler.generate(session, labels, seed)

    def psnr(self, make: Callable[[], AttentionSession]) -> list[float]:
        """Of every picture, dB; a session for each run."""
        found = []
        for pair, exact in zip(self.pairs, self.exact, strict=True):
            found += end_to_end(self._run(make(), *pair), exact).psnr
        return found


def summary(psnr: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Of ``[sequences, pictures]``, dB; the difference is that of the pictures' means over their
    sequences, with its standard error over pictures."""
    difference = psnr.mean(0) - base.mean(0)
    return {
        "mean": float(psnr.mean()),
        "pooled": float(-10 * np.log10((10 ** (-psnr / 10)).mean())),
        "worst": float(psnr.min()),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
    }


def compare(pictures: Pictures, trials: Sequence[str], sequences: int) -> dict[str, Any]:
    """The figures of every trial, the first one's the base."""
    found: dict[str, Any] = {}
    base = None
    for name in trials:
        count = 1 if name.startswith("one") else sequences
        rows = [
            pictures.psnr(lambda make=TRIALS[name], s=s: make(s))  # type: ignore[misc]
            for s in range(count)
        ]
        psnr = np.array(rows)
        base = psnr if base is None else base
        found[name] = summary(psnr, base)
        print(f"{name:12} {line(found[name])}", file=sys.stderr, flush=True)
    return found


def line(row: dict[str, float]) -> str:
    """A trial's figures for people."""
    return (
        f"mean {row['mean']:.2f} dB, pooled {row['pooled']:.2f}, worst {row['worst']:.1f}; "
        f"{row['difference']:+.2f} +- {row['standard_error']:.2f}"
    )


def pick(pipe: Any, plan: PrecisionPlan, count: int) -> dict[str, Any]:
    """Mean PSNR of sequences on both kinds of pictures, how the two go together, and the gain of
    the one that calibration's pictures like best over the mean of all."""
    found = []
    for which in (CALIBRATED, HELD_OUT):
        pictures = Pictures(pipe, which)
        rows = [
            pictures.psnr(lambda s=s: AttentionSession(replace(plan, sign_seed=s)))  # type: ignore[misc]
            for s in range(count)
        ]
        found.append(np.array(rows))
    rated, held = (psnr.mean(1) for psnr in found)
    chosen = found[1][int(rated.argmax())] - found[1].mean(0)
    return {
        "calibrated": np.round(rated, 2).tolist(),
        "held_out": np.round(held, 2).tolist(),
        "correlation": float(np.corrcoef(rated, held)[0, 1]),
        "chosen": int(rated.argmax()),
        "gain": float(chosen.mean()),
        "standard_error": float(chosen.std(ddof=1) / math.sqrt(len(chosen))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trial", action="append", choices=TRIALS, help="repeatable [all]")
    parser.add_argument("--sequences", type=int, default=3, help="of signs, of each trial [3]")
    parser.add_argument("--pick", type=int, default=0, help="rate so many sequences instead")
    parser.add_argument("--plan", help="JSON file whose sequence is picked [uniform 4 bit]")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    pipe = load_pipeline("bundled")
    pipe.set_progress_bar_config(disable=True)
    if args.pick:
        plan = PrecisionPlan.load(args.plan) if args.plan else PrecisionPlan.of(SPEC)
        found = pick(pipe, plan, args.pick)
        text = [f"{name}: {value}" for name, value in found.items()]
    else:
        trials = ["steps", *(t for t in args.trial or TRIALS if t != "steps")]
        found = compare(Pictures(pipe, HELD_OUT), trials, args.sequences)
        text = [f"{name:12} {line(row)}" for name, row in found.items()]
    print(json.dumps(found) if args.json else "\n".join(text))


if __name__ == "__main__":
    main()
