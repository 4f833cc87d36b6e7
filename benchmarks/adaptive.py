"""Adaptive plans on three trained models, beside uniform specs and "first and last N steps" rules.

    python -m benchmarks.adaptive [--model digits] [--only-stages] [--out out/adaptive] [--json]

For the bundled emoji model, and for two smaller ones in ``benchmarks/assets`` that
``tools/train_dit.py`` trained on handwritten digits and on crops of photographs: calibrate on some
classes, plan at the predicted time of uniform ``int4/fp8-fast`` + 10 %, and sample other classes
from other seeds.  More questions are answered on the same pictures:

* how well a table is completed from some of its cells, and what plans are worth whose weights come
  from the local error alone, from groups of cells or from gradients (:mod:`benchmarks.stages`);
* how much runs below 8 bit at the quality of uniform ``int8/fp8`` less 1 dB: plans of rising
  budgets are sampled, and of those that reach it the one with most work below 8 bit counts.

``--only-stages`` answers the first of them alone.  Times are predicted bounds relative to FP16
attention on one card, never timings.  Writes a JSON document, the plan, the score tables and a
Pareto plot per model below ``--out``, and goes on from what it finds there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stages import Measured, completions, measure, stages
from sage_diffusion.adapt.calibrate import SPECS
from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.costs import card_costs
from sage_diffusion.adapt.evaluate import UNIFORM, Evaluation, Scored, evaluate
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

#: Pictures of the end-to-end stage by gradients, and of that by groups of cells.
PICTURES, GROUPED = 16, 8

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
        measured: tables and stages.
        plans: by name, the compared one first.
        stages: names of plans at the first budget, by what their weights come from.
        found: these plans and, unless only stages are compared, uniform specs and rules on the
            held-out pictures.
    """

    measured: Measured
    plans: dict[str, PrecisionPlan]
    stages: dict[str, str]
    found: Evaluation

    def scored(self, name: str) -> Scored:
        """A plan or spec on the held-out pictures."""
        return next(s for s in self.found.scored if s.name == name)


def run(
    model: Model,
    pipe: Any,
    folder: Path,
    *,
    steps: int = 20,
    rated: int = PICTURES,
    grouped: int = GROUPED,
    only_stages: bool = False,
) -> Run:
    """Calibrate, plan for every budget and stage, and sample the held-out classes.

    Args:
        model: classes and seeds.
        pipe: its pipeline.
        folder: of what is measured.
        steps: of sampling.
        rated: pictures of the end-to-end stage by gradients, 0 for none.
        grouped: the same by groups.
        only_stages: leave rising budgets, uniform specs and rules out.
    """
    sampler = PipelineSampler(pipe, {"num_inference_steps": steps})
    costs = card_costs(CARD, math.inf)  # of main loops: the models' pictures are tiny
    specs = [spec for spec in SPECS if spec in costs]
    batches = class_batches(pipe, model.batches, model.batch)
    measured = measure(
        sampler, batches, model.seeds, specs=specs, rated=rated, grouped=grouped, folder=folder
    )
    fastest = predicted_time(measured.usual, LOW, costs)

    def plan(table: ScoreTable, budget: float) -> PrecisionPlan:
        return make_plan(table, budget=budget * fastest, costs=costs).plan

    budgets = BUDGETS[:1] if only_stages else BUDGETS
    plans = {f"budget x {budget:g}": plan(measured.usual, budget) for budget in budgets}
    first, names = next(iter(plans)), {}
    for name, table in stages(measured).items():
        made = plan(table, BUDGETS[0])
        names[name] = first if made.rules == plans[first].rules else f"by {name}"
        plans.setdefault(names[name], made)
    others = class_batches(pipe, model.held_out, model.batch, model.batches)
    pairs = [(batch, seed) for batch in others for seed in model.held_out_seeds]
    uniform = () if only_stages else UNIFORM
    found = evaluate(sampler.generate, pairs, plans, uniform=uniform, costs=costs)
    return Run(measured, plans, names, found)


def figures(done: Run) -> dict[str, Any]:
    """Plain data, as :func:`text_of` prints it; no ``against`` where only stages were compared."""
    return {
        "card": CARD,
        "pictures": len(done.found.scored[0].pictures),
        "rows": [_row(scored) for scored in done.found.scored],
        "against": _against(done) if done.found.of_kind("uniform") else None,
        "measured": [
            {
                "asked": share,
                "share": round(float(table.measured.sum() / table.exists.sum()), 4),
                "rank_correlation": rank_correlations(table, done.measured.tables[1.0]),
            }
            for share, table in done.measured.tables.items()
            if share < 1
        ],
        "completions": completions(done.measured.tables[1.0]),
        "stages": {name: _row(done.scored(plan)) for name, plan in done.stages.items()},
        "fit": (done.measured.groups or {}).get("fit"),
    }


def _against(done: Run) -> dict[str, Any]:
    """The first plan beside uniform specs and rules."""
    adaptive = done.scored(next(iter(done.plans)))
    low, high = done.scored(LOW), done.scored(EIGHT_BIT)
    best_rule = max(done.found.of_kind("first_last"), key=lambda s: s.psnr)
    rising = [s for s in done.found.of_kind("adaptive") if s.name.startswith("budget")]
    reached = [s for s in rising if s.psnr >= high.psnr - LOSS_DB]
    coarse = max(reached, key=lambda s: s.below_8_bit, default=None)
    return {
        "above_uniform_db": round(adaptive.psnr - low.psnr, 2),
        "above_first_last_db": round(adaptive.psnr - best_rule.psnr, 2),
        "at_8_bit_quality": {
            "psnr_wanted": round(high.psnr - LOSS_DB, 2),
            "plan": None if coarse is None else _row(coarse),
        },
    }


def rank_correlations(part: ScoreTable, whole: ScoreTable) -> dict[str, float]:
    """Spearman's, of the cells' squared errors by spec, and of all specs' together."""
    from scipy.stats import spearmanr

    cells = whole.exists
    mine, true = complete(part).error[cells], complete(whole).error[cells]
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
    if data["against"] is not None:
        lines += _against_lines(data["against"])
    lines += [
        f"weights from {stage}: {row['psnr']:.2f} dB pooled, {row['mean_psnr']:.2f} mean"
        for stage, row in data["stages"].items()
    ]
    if data["fit"] is not None:
        fit = data["fit"]
        lines.append(
            f"groups' fit, ridge {fit['ridge']}: {fit['left_out_db']:.2f} dB off runs left out, "
            f"{fit['checked_db']:.2f} off mixed ones; local error {fit['local_left_out_db']:.2f} "
            f"and {fit['local_checked_db']:.2f}"
        )
    for row in data["measured"]:
        ranks = row["rank_correlation"]
        lines.append(
            f"{row['share']:.1%} of the cells measured, {row['asked']:.0%} asked for: rank "
            f"correlation {ranks['all specs']:.3f}, within one spec at least "
            f"{min(ranks.values()):.3f}"
        )
    lines += [
        f"completed from {row['share']:.0%} by {row['method']}: {row['rms_db']:.2f} dB RMS, "
        f"rank correlation {row['rank_correlation']:.3f}, {row['coverage']:.0%} within the "
        "95 % bars"
        for row in data["completions"]
    ]
    return "\n".join(lines)


def _against_lines(data: dict[str, Any]) -> list[str]:
    wanted, plan = data["at_8_bit_quality"]["psnr_wanted"], data["at_8_bit_quality"]["plan"]
    return [
        f"adaptive at {LOW} + {BUDGETS[0] - 1:.0%}: {data['above_uniform_db']:+.2f} dB against "
        f"uniform {LOW}, {data['above_first_last_db']:+.2f} dB against the best first/last rule",
        f"at the PSNR of uniform {EIGHT_BIT} - {LOSS_DB:g} dB ({wanted:.2f} dB): "
        + (
            "reached by none of these plans"
            if plan is None
            else f"{plan['below_8_bit']:.0%} of the cells below 8 bit, time "
            f"{plan['predicted_time']:.3f} ({plan['name']})"
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable [all]")
    parser.add_argument("--rated", type=int, default=PICTURES, help="pictures by gradients [16]")
    parser.add_argument("--grouped", type=int, default=GROUPED, help="pictures by groups [8]")
    parser.add_argument("--only-stages", action="store_true", help="no budgets, specs and rules")
    parser.add_argument("--out", type=Path, default=Path("out/adaptive"))
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args(arguments)
    options = {"rated": args.rated, "grouped": args.grouped, "only_stages": args.only_stages}
    document = {}
    for name in args.model or MODELS:
        print(f"{name} ..", file=sys.stderr)
        model, folder = MODELS[name], args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        done = run(model, load_pipeline(model.source), folder, **options)
        document[name] = figures(done)
        next(iter(done.plans.values())).save(folder / "plan.json")
        write_text(folder / "figures.json", json.dumps(document[name], indent=1) + "\n")
        pareto(done.found, folder / "pareto.png")
        if not args.json:
            print(text_of(name, document[name]) + "\n", flush=True)
    if args.json:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
