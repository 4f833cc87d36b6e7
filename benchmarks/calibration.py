"""What calibration adds to a sampling run, and how long planning takes.

    python -m benchmarks.calibration [--tokens 4096] [--json]

Calibration: an untrained diffusion transformer of two heads is sampled plainly and under
``calibrate`` as it is by default (15 % of the cells, 64 query rows a call, every spec that an
RTX 4090 can run; no second pass).  So narrow a model is the worst case: what is not attention takes
little time in it.  CPU time of the process is compared, so that other programs don't count.

Planning: score tables of 60 layers x 50 steps and five specs beside FP16, made up, all cells
measured or a quarter of them, and once with errors of neighbouring steps that add up; completing
the table, solving and compressing into rules count.  Completing alone is also measured for a table
with both halves of guidance and six quantized specs, with the memory that it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from sage_diffusion.adapt.calibrate import SPECS, calibrate
from sage_diffusion.adapt.complete import complete_log
from sage_diffusion.adapt.planner import make_plan
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.integrations.diffusers.bundled import EmojiPipeline
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

#: Layers, steps and share of the measured cells of the planned tables, and whether errors add up.
PLANNED = ((60, 50, 1.0, False), (60, 50, 0.25, False), (60, 50, 1.0, True))


def sampler_of(tokens: int, layers: int = 4, steps: int = 12) -> PipelineSampler:
    """An untrained model of two heads of 64 over a square of ``tokens`` tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"tokens must be a square number, got {tokens}")
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        sample_size=2 * side,
        patch_size=2,
        num_embeds_ada_norm=4,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = EmojiPipeline(model.eval(), FlowMatchEulerDiscreteScheduler(), None)
    pipe.set_progress_bar_config(disable=True)
    return PipelineSampler(pipe, {"num_inference_steps": steps})


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def overhead(sampler: PipelineSampler, rounds: int = 1) -> dict[str, float]:
    """CPU seconds of two runs plainly and calibrated, medians of alternating rounds."""
    prompts = [[0], [1]]

    def plain() -> None:
        for prompt in prompts:
            sampler.sample(prompt, 0)

    def calibrated() -> None:
        calibrate(sampler, prompts, specs=SPECS, bar_db=math.inf)

    sampler.sample(prompts[0], 0)
    times = [(cpu_seconds(plain), cpu_seconds(calibrated)) for _ in range(rounds)]
    bare, watched = (statistics.median(column) for column in zip(*times, strict=True))
    return {"plain": bare, "calibrated": watched, "overhead": watched / bare - 1}


def table_of(layers: int, steps: int, share: float, specs: tuple[str, ...] = SPECS) -> ScoreTable:
    """A table whose errors differ by orders of magnitude between layers and steps."""
    random = np.random.default_rng(0)
    table = ScoreTable(specs, steps, {"model": "synthetic"})
    rank_two = random.normal(size=(layers, 2)) @ random.normal(size=(2, steps)).cumsum(1) / 4
    level = np.exp(rank_two + random.normal(0, 0.2, (layers, steps)))
    by_spec = np.geomspace(1e-6, 1e-2, len(specs))
    period = round(1 / share)
    for i in range(layers):
        for step in range(steps):
            name = f"blocks.{i}.attn"
            table.saw(name, step, None, 1.0, 1)
            if (i + step) % period == 0:
                error = level[i, step] * by_spec * np.exp(random.normal(0, 0.1, len(specs)))
                table.add(name, step, None, np.stack([1 - error, np.sqrt(error), error], -1))
    table.fingerprint["layers"] = list(table.layers)
    return table


def correlate(table: ScoreTable, rate: float = 0.6) -> None:
    """Rate every cell by its local error; errors n steps apart correlate by ``rate ** n``."""
    kinds, branches = len(table.specs), len(table.branches)
    lags = np.zeros((kinds, branches, branches, table.steps))
    lags[:, range(branches), range(branches)] = rate ** np.arange(table.steps)
    table.sensitivity = {
        "method": "gradient",
        "layers": list(table.layers),
        "branches": list(table.branches),
        "effect": table.metric("error").tolist(),
        "factor": [1.0] * kinds,
        "correlation": lags.tolist(),
        "peak": 1.0,
    }


def completing(layers: int, steps: int, branches: int, specs: int, share: float) -> dict[str, Any]:
    """CPU seconds of completing a made-up table, and by how many bytes the process's peak grew."""
    random = np.random.default_rng(0)
    shape = layers, steps, branches
    smooth = (
        random.normal(size=(layers, branches, 2)) @ random.normal(size=(2, steps)).cumsum(1) / 4
    )
    values = smooth.transpose(0, 2, 1)[..., None] + np.linspace(-14, -5, specs)
    values = values + random.normal(0, 0.2, (*shape, specs))
    known = random.random(shape) < share
    before, began = _peak(), time.process_time()
    complete_log(values, known)
    return {
        "layers": layers,
        "steps": steps,
        "branches": branches,
        "specs": specs,
        "measured": share,
        "seconds": time.process_time() - began,
        "bytes": _peak() - before,
    }


def _peak() -> int:
    """Bytes, on Linux."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def planning(
    layers: int, steps: int, share: float, correlated: bool = False
) -> dict[str, float | bool]:
    """CPU seconds of one plan, and what came out."""
    table = table_of(layers, steps, share)
    if correlated:
        correlate(table)
    began = time.process_time()
    made = make_plan(table, budget=0.2063)
    return {
        "layers": layers,
        "steps": steps,
        "specs": len(made.specs),
        "measured": share,
        "correlated": correlated,
        "seconds": time.process_time() - began,
        "gap": made.gap,
        "rules": len(made.plan.rules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    result = {
        "tokens": args.tokens,
        "completing": completing(60, 50, 2, 6, 0.25),
        "calibration": overhead(sampler_of(args.tokens)),
        "planning": [planning(*shape) for shape in PLANNED],
    }
    if args.json:
        print(json.dumps(result))
        return
    table = result["completing"]
    print(
        f"completing {table['layers']} layers x {table['steps']} steps x {table['branches']} "
        f"branches x {table['specs']} specs from {table['measured']:.0%}: "
        f"{table['seconds']:.1f} s of CPU, {table['bytes'] / 2**30:.2f} GiB"
    )
    cost = result["calibration"]
    print(f"two runs at {args.tokens} tokens, CPU time: {cost['plain']:.1f} s plain, ", end="")
    print(f"{cost['calibrated']:.1f} s calibrated: {cost['overhead']:+.0%}")
    for plan in result["planning"]:
        print(
            f"planning {plan['layers']} layers x {plan['steps']} steps x {plan['specs']} specs, "
            f"{plan['measured']:.0%} measured{', errors add up' if plan['correlated'] else ''}: "
            f"{plan['seconds']:.1f} s, gap {plan['gap']:.1e}, "
            f"{plan['rules']} rules"
        )


if __name__ == "__main__":
    main()
