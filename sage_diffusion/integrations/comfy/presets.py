"""Plans as ComfyUI users meet them: presets for this machine, a folder of files, small edits."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.machine import device_arch
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule

#: Calls with fewer keys cost next to nothing and decide much: the text tokens of CLIP, refiners.
MIN_TOKENS = 128

#: Plans that come with the pack.  Those beside this folder name diffusers' layers.
OWN_PLANS = Path(__file__).resolve().parents[2] / "plan" / "shipped" / "comfy"


@dataclass(frozen=True)
class Preset:
    """Specs by preference, the first that this machine runs natively counts.

    Attributes:
        describes: one line for a tooltip.
        body: of most steps.
        edges: of the first tenth of the steps, where the picture is laid out.
    """

    describes: str
    body: tuple[str, ...]
    edges: tuple[str, ...]


PRESETS: Mapping[str, Preset] = {
    "quality": Preset(
        "INT8 scores with FP16 values; the first tenth of the steps stays as it is",
        ("int8/fp16",),
        ("fp16",),
    ),
    "balanced": Preset(
        "INT8 scores with FP8 or INT8 values; the first tenth of the steps has FP16 values",
        ("int8/fp8", "int8/int8", "int8/fp16"),
        ("int8/fp16",),
    ),
    "fast": Preset(
        "4-bit scores where the GPU has them, else INT8; the first tenth of the steps is balanced",
        ("int4/fp8-fast", "int8/fp8-fast", "int8/int8", "int8/fp16"),
        ("int8/fp8", "int8/int8", "int8/fp16"),
    ),
}


@functools.lru_cache(maxsize=16)
def preset(name: str, device: str = "cpu") -> PrecisionPlan:
    """A preset's plan on a device.

    Raises:
        PlanError: no preset has that name.
    """
    if name not in PRESETS:
        raise PlanError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    chosen = PRESETS[name]
    body = _first_native(chosen.body, device)
    edges = _first_native(chosen.edges, device)
    rules = [Rule(edges, "*", 0.0, 0.1, min_tokens=MIN_TOKENS)] if edges.quantized else []
    start = 0.0 if edges.quantized else 0.1
    rules.append(Rule(body, "*", start, min_tokens=MIN_TOKENS))
    return PrecisionPlan(AttentionSpec.parse("fp16"), tuple(rules), name=name)


def _first_native(names: Sequence[str], device: str) -> AttentionSpec:
    """The first spec that ``auto`` would run; the first of all where none is (and says why)."""
    specs = [AttentionSpec.parse(name) for name in names]
    capability, hip_arch = device_arch(torch.device(device))
    kind = torch.device(device).type
    for spec in specs:
        shape = (1, 24, 4096, 128)
        call = AttentionCall(
            shape, shape, torch.bfloat16, kind, capability, hip_arch, None, False, False, spec
        )
        try:
            backends.select(call)
        except backends.BackendUnavailable:
            if spec.quantized:
                continue
        return spec
    return specs[0]


def custom(
    spec: str,
    *,
    start: float = 0.0,
    end: float = 1.0,
    layers: str = "*",
    min_tokens: int = 0,
) -> PrecisionPlan:
    """One spec in a range of steps and layers, FP16 elsewhere.

    Args:
        spec: an :class:`AttentionSpec`'s name.
        start, end: range of progress.
        layers: globs separated by commas, spaces or lines; ``!glob`` leaves layers alone.
        min_tokens: calls with fewer keys are left alone.

    Raises:
        PlanError: a wrong spec, start not below end, or no glob.
    """
    fp16 = AttentionSpec.parse("fp16")
    try:
        parsed = AttentionSpec.parse(spec)
    except ValueError as error:
        raise PlanError(str(error)) from None
    globs = [glob for glob in re.split(r"[,\s]+", layers) if glob]
    kept = [glob[1:] for glob in globs if glob.startswith("!")]
    wanted = [glob for glob in globs if not glob.startswith("!")] or ["*"]
    if not globs or "" in kept:
        raise PlanError(f"layers must be globs such as *, double.* or !single.0*, got {layers!r}")
    rules = [Rule(fp16, glob) for glob in dict.fromkeys(kept)]
    rules += [
        Rule(parsed, glob, start, end, min_tokens=min_tokens) for glob in dict.fromkeys(wanted)
    ]
    return PrecisionPlan(fp16, tuple(rules), name=f"{parsed} (custom)")


# ---------------------------------------------------------------------- files
def plan_files(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> file of every plan in ``folders``, the first folder that has a name counts."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(name, path)
    return found


def save_plan(plan: PrecisionPlan, folder: str | Path, name: str, overwrite: bool) -> Path:
    """Write a plan into a folder.

    Raises:
        PlanError: a name that leaves the folder, or a file that may not be replaced: it exists, or
            it is no plan that this version can read.
    """
    parts = name.strip().removesuffix(".json").split("/")
    if any(not re.fullmatch(r"[\w][\w .+()-]*", part) for part in parts):
        raise PlanError(
            f"name must be made of letters, digits, spaces and _ . + ( ) -, got {name!r}"
        )
    path = Path(folder, *parts[:-1], f"{parts[-1]}.json")
    if path.exists():
        if not overwrite:
            raise PlanError(f"{path} exists: switch overwrite on or choose another name")
        try:
            PrecisionPlan.load(path)
        except PlanError as error:
            raise PlanError(f"not overwritten, it is no plan that can be read: {error}") from None
    plan.save(path)
    return path


# ---------------------------------------------------------------------- edits
def with_rule(plan: PrecisionPlan, rule: Rule, *, first: bool = True) -> PrecisionPlan:
    """``plan`` with a rule of highest or lowest priority; rules it makes pointless go."""
    if first:
        rest = [old for old in plan.rules if not rule.covers(old)]
        return replace(plan, rules=(rule, *rest), calibration=None)
    return replace(plan, rules=(*plan.rules, rule), calibration=None)


def without_rule(plan: PrecisionPlan, index: int) -> PrecisionPlan:
    """``plan`` without one rule.

    Raises:
        PlanError: it has no such rule.
    """
    if not 0 <= index < len(plan.rules):
        raise PlanError(f"rule must be between 0 and {len(plan.rules) - 1}, got {index}")
    rules = (*plan.rules[:index], *plan.rules[index + 1 :])
    return replace(plan, rules=rules, calibration=None)


def with_default(plan: PrecisionPlan, spec: str) -> PrecisionPlan:
    """``plan`` with another spec where no rule applies."""
    return replace(plan, default=AttentionSpec.parse(spec), calibration=None)


def renamed(plan: PrecisionPlan, name: str) -> PrecisionPlan:
    """``plan`` under another name."""
    return replace(plan, name=name.strip() or None)


def describe(plan: PrecisionPlan) -> str:
    """A plan in a few lines."""
    lines = [plan.name or "unnamed plan"]
    if plan.model:
        lines.append(f"made for {plan.model}")
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
