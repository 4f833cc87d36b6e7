"""Plans from JSON text: validation that names the JSON path of what is wrong."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sage_diffusion.json_files import json_path, shown
from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.spec import SAMPLED, AttentionSpec
from sage_diffusion.plan.rules import EDITIONS, VERSION, PlanError, Rule

Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
SpecText = str | dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Rule(_Strict):
    spec: SpecText
    layers: Annotated[str, Field(min_length=1)] = "*"
    start: Share = 0.0
    end: Share = 1.0
    branch: str | None = None
    min_tokens: Annotated[int, Field(ge=0, strict=True)] = 0


class _Fingerprint(BaseModel):
    model_config = ConfigDict(extra="allow")
    layers: list[str] | None = None
    model: str | None = None
    head_dims: dict[str, Annotated[int, Field(gt=0, strict=True)]] | None = None


class _Plan(_Strict):
    version: Annotated[int, Field(strict=True)]
    default: SpecText
    rules: list[_Rule] = []
    name: str | None = None
    model: str | None = None
    schedule: list[Number] | None = None
    schedule_unit: str | None = None
    fingerprint: _Fingerprint | None = None
    calibration: dict[str, Any] | None = None
    sign_seed: Any = 0  # the plan checks it


def plan_fields(data: Any) -> dict[str, Any]:
    """The arguments of a ``PrecisionPlan`` from JSON data; raises as its ``from_json`` says."""
    if not isinstance(data, dict):
        raise PlanError(f"a plan must be a JSON object, got {type(data).__name__}")
    version = data.get("version")
    # Checked first: what else a later version may hold is not ours to judge.
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise PlanError(
            f"version: this plan has version {shown(version)}, "
            f"this program reads up to {VERSION}: update sage-diffusion"
        )
    try:
        parsed = _Plan.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise PlanError(f"{error_path(first['loc'])}: {error_message(first)}") from None
    if parsed.version not in EDITIONS:
        raise PlanError(f"version: must be 1 to {VERSION}, got {shown(parsed.version)}")
    edition = EDITIONS[parsed.version]
    if parsed.version == 1 and "sign_seed" in data:
        raise PlanError("sign_seed: plans of version 1 have none")
    plain = AttentionSpec.parse("int8/fp16", edition)  # of fields that "default" doesn't name
    default = _spec(parsed.default, plain, "default", edition)
    rules = []
    for i, rule in enumerate(parsed.rules):
        spec = _spec(rule.spec, default, f"rules[{i}].spec", edition)
        try:
            rules.append(
                Rule(spec, rule.layers, rule.start, rule.end, rule.branch, rule.min_tokens)
            )
        except PlanError as error:
            raise PlanError(f"rules[{i}]: {error}") from None
    return {
        "default": default,
        "rules": tuple(rules),
        "model": parsed.model,
        "name": parsed.name,
        "schedule": None if parsed.schedule is None else tuple(parsed.schedule),
        "schedule_unit": parsed.schedule_unit,
        "fingerprint": data.get("fingerprint"),
        "calibration": parsed.calibration,
        "sign_seed": None if parsed.version == 1 else parsed.sign_seed,
    }


def _spec(value: SpecText, default: AttentionSpec, path: str, edition: int) -> AttentionSpec:
    try:
        if isinstance(value, str):
            return AttentionSpec.parse(value, edition)
        fields = dict(value)
        if edition > 2 and "pv" in fields and default.pv not in SAMPLED:
            fields.setdefault("sample_v", True)  # of which another V's spec says nothing
        if edition > 4 and "pv" in fields and default.pv is not Precision.INT8:
            fields.setdefault("tile_v", True)
        return AttentionSpec.from_dict(fields, default)
    except (ValueError, TypeError) as error:
        # Errors of a single field begin with its name: `qk must be one of ..`.
        field = str(error).split(" ", 1)[0]
        where = f"{path}.{field}" if isinstance(value, dict) and field in value else path
        raise PlanError(f"{where}: {error}") from None


def error_path(location: tuple[int | str, ...]) -> str:
    """``rules[1].spec`` of a validation error's location."""
    members = ("str", "dict[str,any]")  # pydantic's names of a union's members
    return json_path([part for part in location if part not in members], "plan")


def error_message(error: Any) -> str:
    """What must hold and what came, of a validation error's details."""
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "is missing"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {shown(error['input'])}"
