"""Adaptive plans on three trained models, beside uniform specs and "first and last N steps" rules.

    python -m benchmarks.adaptive [--model digits] [--grouped 8] [--out out/adaptive] [--json]

For the bundled emoji model, and for two smaller ones in ``benchmarks/assets`` that
``tools/train_dit.py`` trained on handwritten digits and on crops of photographs: calibrate on some
classes, plan at the predicted time of uniform ``int4/fp8-fast`` + 10 %, and sample other classes
from other seeds.  More questions are answered on the same pictures:

* how much runs below 8 bit at the quality of uniform ``int8/fp8`` less 1 dB: plans of rising
  budgets are sampled, and of those that reach it the one with most work below 8 bit counts;
* what measuring a quarter of the cells loses: a second calibration measures all of them;
* how well a table is completed from some of its cells, and what plans are worth whose weights come
  from the local error alone, from groups of cells or from gradients (:mod:`benchmarks.stages`).

Times are predicted bounds relative to FP16 attention on one card, never timings; only the
calibration is timed.  Writes a JSON document, the plan, the score table and a Pareto plot per
model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stages import completions, stages
from sage_diffusion.adapt.calibrate import SPECS, calibrate
from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.costs import card_costs
from sage_diffusion.adapt.evaluate import Evaluation, Scored, evaluate
from sage_diffusion.adapt.planner import make_plan, predicted_time
from sage_diffusion.adapt.plots import pareto
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.files import write_text
from sage_diffusion.integrations.diffusers.pipelines import load_pipeline
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler, class_batches
from sage_diffusion.plan import PrecisionPlan

ASSETS = Path(__file__).resolve().parent / "assets"
CARD = "rtx4090"
LOW, EIGHT_BIT = "int4/fp8-fast", "int8/fp8"

#: Budgets of the plans relative to the time of uniform ``LOW``; the first one's is compared.
BUDGETS = (1.1, 1.2, 1.3, 1.4, 1.55, 1.75, 2.0)

#: The plan made from a table of all cells, at the first budget.
ALL_CELLS = "all cells measured"

#: Pictures of the end-to-end stage.
PICTURES = 16

#: Pictures of the stage by groups of cells that it is compared with.
GROUPED = 8

#: Quality that a plan may lose against uniform ``EIGHT_BIT``, dB.
LOSS_DB = 1.0


@dataclass(frozen=True)
class Model:
    """A trained model, and the classes and seeds of calibration and evaluation.

    Attributes:
        source: what ``load_pipeline`` takes.
        batch: pictures per call.
        batches, seeds: of the calibration; every batch of classes is sampled with every seed.
        held_out, held_out_seeds: of the evaluation, the same; these classes are others.
    """

    source: str
    batch: int
    batches: int
    seeds: tuple[int, ...]
    held_out: int
    held_out_seeds: tuple[int, ...]


MODELS = {
    "emoji": Model("bundled", 4, 4, (0,), 3, (1000, 2000)),
    "digits": Model(str(ASSETS / "digits_dit"), 2, 2, (0, 100), 3, (1000, 2000, 3000)),
    "crops": Model(str(ASSETS / "crops_dit"), 3, 2, (0, 100), 2, (1000, 2000, 3000)),
}


@dataclass(frozen=True)
class Run:
    """What was calibrated, planned and sampled.

    Attributes:
        quarter, whole: score tables of a quarter of the cells and of all.
        seconds: of the first calibration.
        plans: by name, the compared one first.
        stages: names of plans at the first budget, by what their weights come from.
        found: these plans, uniform specs and rules on the held-out pictures.
    """

    quarter: ScoreTable
    whole: ScoreTable
    seconds: float
    plans: dict[str, PrecisionPlan]
    stages: dict[str, str]
    found: Evaluation

    def scored(self, name: str) -> Scored:
        """A plan or spec on the held-out pictures."""
        return next(s for s in self.found.scored if s.name == name)


def run(
    model: Model,
    pipe: Any,
    *,
    steps: int = 20,
    sensitivity: int = PICTURES,
    grouped: int = GROUPED,
) -> Run:
    """Calibrate twice, plan for every budget and sample the held-out classes.

    Args:
        model: classes and seeds.
        pipe: its pipeline.
        steps: of sampling.
        sensitivity: pictures of the end-to-end stage.
        grouped: pictures of the stage by groups, 0 for none.
    """
    sampler = PipelineSampler(pipe, {"num_inference_steps": steps})
    costs = card_costs(CARD)
    options: dict[str, Any] = {
        "specs": [spec for spec in SPECS if spec in costs],
        "sensitivity": sensitivity,
    }
    batches = class_batches(pipe, model.batches, model.batch)
    began = time.monotonic()
    quarter = calibrate(sampler, batches, model.seeds, share=0.25, **options)
    seconds = time.monotonic() - began
    whole = calibrate(sampler, batches, model.seeds, share=1.0, **options)
    fastest = predicted_time(quarter, LOW, costs)
    plans = {
        f"budget x {budget:g}": make_plan(quarter, budget=budget * fastest, costs=CARD).plan
        for budget in BUDGETS
    }
    plans[ALL_CELLS] = make_plan(whole, budget=BUDGETS[0] * fastest, costs=CARD).plan
    names = {}
    if grouped:
        runs = [(batch, seed) for seed in model.seeds for batch in batches]
        for name, table in stages(sampler, quarter, runs[: -(-grouped // model.batch)]).items():
            names[name] = f"by {name}"
            plans[f"by {name}"] = make_plan(table, budget=BUDGETS[0] * fastest, costs=CARD).plan
    others = class_batches(pipe, model.held_out, model.batch, model.batches)
    pairs = [(batch, seed) for batch in others for seed in model.held_out_seeds]
    found = evaluate(sampler.generate, pairs, plans, costs=CARD)
    return Run(quarter, whole, seconds, plans, names, found)


def figures(done: Run) -> dict[str, Any]:
    """All figures of a run as plain data."""
    adaptive, *_ = done.found.of_kind("adaptive")
    rules = done.found.of_kind("first_last")
    low, high = done.scored(LOW), done.scored(EIGHT_BIT)
    best_rule = max(rules, key=lambda s: s.psnr)
    rising = [s for s in done.found.of_kind("adaptive") if s.name not in done.stages.values()]
    reached = [s for s in rising if s.psnr >= high.psnr - LOSS_DB]
    coarse = max(reached, key=lambda s: s.below_8_bit, default=None)
    return {
        "card": CARD,
        "pictures": len(adaptive.pictures),
        "rows": [_row(s) for s in done.found.scored],
        "above_uniform_db": round(adaptive.psnr - low.psnr, 2),
        "above_first_last_db": round(adaptive.psnr - best_rule.psnr, 2),
        "at_8_bit_quality": {
            "psnr_wanted": round(high.psnr - LOSS_DB, 2),
            "plan": None if coarse is None else _row(coarse),
        },
        "quarter_measured": {
            "share": round(float(done.quarter.measured.sum() / done.quarter.exists.sum()), 4),
            "rank_correlation": rank_correlations(done.quarter, done.whole),
            "psnr_difference": round(adaptive.psnr - done.scored(ALL_CELLS).psnr, 2),
        },
        "completions": completions(done.whole),
        "stages": {name: _row(done.scored(plan)) for name, plan in done.stages.items()},
        "calibration_seconds": round(done.seconds, 1),
    }


def rank_correlations(quarter: ScoreTable, whole: ScoreTable) -> dict[str, float]:
    """Spearman's, of the cells' squared errors by spec, and of all specs' together."""
    from scipy.stats import spearmanr

    cells = whole.exists
    mine, true = complete(quarter).error[cells], complete(whole).error[cells]
    found = {
        spec: float(spearmanr(mine[:, k], true[:, k]).statistic)
        for k, spec in enumerate(whole.specs)
    }
    found["all specs"] = float(spearmanr(mine.ravel(), true.ravel()).statistic)
    return {name: round(value, 4) for name, value in found.items()}


def _row(scored: Scored) -> dict[str, Any]:
    return {
        "name": scored.name,
        "kind": scored.kind,
        "psnr": round(scored.psnr, 2),
        "mean_psnr": round(scored.mean_psnr, 2),
        "ssim": None if scored.ssim is None else round(scored.ssim, 4),
        "predicted_time": round(scored.predicted_time, 4),
        "below_8_bit": round(scored.below_8_bit, 4),
    }


def text_of(name: str, data: dict[str, Any]) -> str:
    """A model's figures for people."""
    lines = [
        f"{name}: {data['pictures']} held-out pictures; times are predicted bounds on a "
        f"{data['card']}, FP16 attention = 1",
        f"{'plan':48} {'PSNR':>6} {'mean PSNR':>9} {'SSIM':>7} {'time':>6} {'< 8 bit':>7}",
    ]
    for row in data["rows"]:
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.4f}"
        label = f"adaptive, {row['name']}" if row["kind"] == "adaptive" else row["name"]
        lines.append(
            f"{label:48} {row['psnr']:6.2f} {row['mean_psnr']:9.2f} {ssim:>7} "
            f"{row['predicted_time']:6.3f} {row['below_8_bit']:7.0%}"
        )
    wanted, plan = data["at_8_bit_quality"]["psnr_wanted"], data["at_8_bit_quality"]["plan"]
    part = data["quarter_measured"]
    ranks = part["rank_correlation"]
    lines += [
        f"adaptive at {LOW} + {BUDGETS[0] - 1:.0%}: {data['above_uniform_db']:+.2f} dB against "
        f"uniform {LOW}, {data['above_first_last_db']:+.2f} dB against the best first/last rule",
        f"at the PSNR of uniform {EIGHT_BIT} - {LOSS_DB:g} dB ({wanted:.2f} dB): "
        + (
            "reached by none of these plans"
            if plan is None
            else f"{plan['below_8_bit']:.0%} of the cells below 8 bit, time "
            f"{plan['predicted_time']:.3f} ({plan['name']})"
        ),
        f"{part['share']:.0%} of the cells measured: rank correlation {ranks['all specs']:.3f}, "
        f"within one spec at least {min(ranks.values()):.3f}; PSNR {part['psnr_difference']:+.2f} "
        "dB against the plan from all cells",
        *(
            f"completed from {row['share']:.0%} by {row['method']}: {row['rms_db']:.2f} dB RMS, "
            f"rank correlation {row['rank_correlation']:.3f}, {row['coverage']:.0%} within the "
            "95 % bars"
            for row in data["completions"]
        ),
        *(
            f"weights from {name}: {row['psnr']:.2f} dB pooled, {row['mean_psnr']:.2f} mean"
            for name, row in data["stages"].items()
        ),
        f"calibration: {data['calibration_seconds']:.0f} s",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable [all]")
    parser.add_argument("--sensitivity", type=int, default=PICTURES, help="pictures rated [16]")
    parser.add_argument("--grouped", type=int, default=GROUPED, help="pictures by groups [8]")
    parser.add_argument("--out", type=Path, default=Path("out/adaptive"))
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args(arguments)
    document = {}
    for name in args.model or MODELS:
        print(f"{name} ..", file=sys.stderr)
        model = MODELS[name]
        pipe = load_pipeline(model.source)
        done = run(model, pipe, sensitivity=args.sensitivity, grouped=args.grouped)
        document[name] = figures(done)
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        done.quarter.save(folder / "scores.json")
        next(iter(done.plans.values())).save(folder / "plan.json")
        write_text(folder / "figures.json", json.dumps(document[name], indent=1) + "\n")
        pareto(done.found, folder / "pareto.png")
        if not args.json:
            print(text_of(name, document[name]) + "\n", flush=True)
    if args.json:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
