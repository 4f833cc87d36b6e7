"""A plan for people: as text, as rows of a table, and as a picture of layers and steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.plan.plan import PrecisionPlan
from sage_diffusion.plan.rules import PlanError, step_progress

if TYPE_CHECKING:
    from PIL import Image

#: From "as it was" to "fastest"; readable for colour-blind people, light on both themes.
_COLOURS = {
    "fp16": (224, 224, 224),
    "int8/fp16": (198, 219, 239),
    "int8/int8": (158, 202, 225),
    "int8/fp8": (107, 174, 214),
    "int8/fp8-fast": (49, 130, 189),
    "int4/int8": (253, 208, 162),
    "int4/fp8-fast": (253, 141, 60),
    "fp4/fp8-fast": (230, 85, 13),
    "fp4/fp4": (166, 54, 3),
}

_OTHER = (188, 189, 220)  # formats that are not on the ladder

_ROW, _PAD = 14, 8  # pixels

_LONGEST = 100  # letters of what a plan's file says of its calibration


def describe(plan: PrecisionPlan) -> str:
    """A plan in a few lines."""
    lines = [plan.name or "unnamed plan"]
    if plan.model:
        lines.append(f"made for {plan.model}")
    stage = (plan.calibration or {}).get("stage")
    if isinstance(stage, str):
        lines.append(f"calibrated on {stage[:_LONGEST]}")
    for i, rule in enumerate(plan.rules):
        where = [f"{i}: {rule.layers}"]
        if (rule.start, rule.end) != (0.0, 1.0):
            where.append(f"steps {rule.start:.0%}-{rule.end:.0%}")
        if rule.branch:
            where.append(f"{rule.branch} only")
        if rule.min_tokens:
            where.append(f"from {rule.min_tokens} tokens")
        lines.append(f"{', '.join(where)} -> {rule.spec}")
    lines.append(f"else -> {plan.default}")
    return "\n".join(lines)


def table_of(plan: PrecisionPlan) -> list[tuple[str, ...]]:
    """Rows of a table: number, layers, steps' share, other conditions, spec; the default last."""
    rows: list[tuple[str, ...]] = []
    for i, rule in enumerate(plan.rules):
        where = [f"{rule.branch} only"] if rule.branch else []
        where += [f"from {rule.min_tokens} tokens"] if rule.min_tokens else []
        span = f"{rule.start:.0%} to {rule.end:.0%}"
        rows.append((str(i), rule.layers, span, ", ".join(where), str(rule.spec)))
    rows.append(("default", "everything else" if rows else "*", "", "", str(plan.default)))
    return rows


def plan_layers(plan: PrecisionPlan) -> list[str]:
    """Rows for a plan without a model: its own globs, and one line for everything else."""
    globs = dict.fromkeys(rule.layers for rule in plan.rules if rule.layers.strip("*"))
    return [*globs, "(other layers)"]


def grid(
    plan: PrecisionPlan, layers: Sequence[str], steps: int, branch: str | None, tokens: int
) -> list[list[AttentionSpec]]:
    """The spec of every layer (row) at every step (column)."""
    return [
        [
            plan.resolve(layer, step_progress(step, steps), branch=branch, tokens=tokens)
            for step in range(steps)
        ]
        for layer in layers
    ]


def spec_shares(cells: Sequence[Sequence[AttentionSpec]]) -> dict[str, float]:
    """Share of each spec over all cells, largest first."""
    names = [str(spec) for row in cells for spec in row]
    counts = {name: names.count(name) / len(names) for name in dict.fromkeys(names)}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def matching(layers: Sequence[str], patterns: str) -> list[str]:
    """Layers that one of the globs (separated by commas or spaces) names; all for no glob.

    Raises:
        PlanError: no layer is named.
    """
    globs = [glob for glob in re.split(r"[,\s]+", patterns) if glob] or ["*"]
    found = [name for name in layers if any(fnmatchcase(name, glob) for glob in globs)]
    if layers and not found:
        known = ", ".join(layers[:4]) + (" .." if len(layers) > 4 else "")
        raise PlanError(f"layers: {patterns!r} matches none of {known}")
    return found


def draw(
    cells: Sequence[Sequence[AttentionSpec]], layers: Sequence[str], title: str
) -> Image.Image:
    """The picture, with a legend of the specs that occur."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    steps = len(cells[0]) if cells else 0
    left = _PAD * 2 + int(max([font.getlength(name) for name in layers] or [0]))
    column = max(10, min(28, 560 // max(steps, 1)))
    named = sorted(
        {str(spec) for row in cells for spec in row},
        key=lambda name: (LADDER.index(name) if name in LADDER else len(LADDER), name),
    )
    top = _PAD * 2 + _ROW
    bottom = top + _ROW * len(layers)
    width = int(max(left + column * steps + _PAD, font.getlength(title) + 2 * _PAD, 320))
    image = Image.new("RGB", (width, bottom + 2 * _ROW + _PAD + _ROW * len(named)), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((_PAD, _PAD), title, "black", font)
    for i, (name, row) in enumerate(zip(layers, cells, strict=True)):
        y = top + i * _ROW
        canvas.text((_PAD, y), name, "black", font)
        for step, spec in enumerate(row):
            x = left + step * column
            colour = _COLOURS.get(spec.formats, _OTHER)
            canvas.rectangle((x, y, x + column - 2, y + _ROW - 2), colour)
    every = max(1, -(-24 // column))
    for step in range(0, steps, every):
        canvas.text((left + step * column, bottom), str(step), "black", font)
    parts = spec_shares(cells) if cells else {}
    for i, name in enumerate(named):
        y = bottom + 2 * _ROW + i * _ROW
        colour = _COLOURS.get(AttentionSpec.parse(name).formats, _OTHER)
        canvas.rectangle((_PAD, y, _PAD + 18, y + _ROW - 3), colour)
        canvas.text((_PAD + 26, y), f"{name}  {parts[name]:.0%}", "black", font)
    return image
