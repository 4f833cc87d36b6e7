"""Reports as versioned JSON text."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sage_diffusion.accuracy.findings import Findings, ReportError
from sage_diffusion.accuracy.metrics import json_number, number_from_json
from sage_diffusion.accuracy.records import EndToEnd, Row, Variant
from sage_diffusion.json_files import JSONError, parse_json, shown
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PlanError, PrecisionPlan
from sage_diffusion.plan.plan_json import error_message, error_path, plan_fields

#: And edition of the names of specs (``kernels.spec.EDITION``), which are read as what they meant.
VERSION = 5

#: Columns of a row, in this order: a large model has many thousand rows.
COLUMNS = (
    "layer",
    "step",
    "progress",
    "branch",
    "spec",
    "cosine",
    "rel_l1",
    "rmse",
    "max_abs",
)

Number = Annotated[float, Field(strict=True)] | Literal["inf", "-inf", "nan"]
#: What pydantic calls the members of the union.
_MEMBERS = ("float", "constrained-float", "literal['inf','-inf','nan']")

Whole = Annotated[int, Field(strict=True, ge=0)]
Progress = Annotated[float, Field(strict=True)]
RowTuple = tuple[str, Whole, Progress, str | None, str, Number, Number, Number, Number]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _EndToEnd(_Strict):
    labels: list[str]
    psnr: list[Number]
    ssim: list[Number | None]
    latent_cosine: list[Number]
    # Derived; written for readers that are no Python.
    mean_psnr: Number | None = None
    mean_ssim: Number | None = None


class _Variant(_Strict):
    name: str
    psnr: Number | None
    ssim: Number | None
    latent_cosine: Number | None
    rel_l1: Number | None
    specs: dict[str, Whole]
    predicted_time: Annotated[float, Field(strict=True)] | None = None


class _Report(_Strict):
    version: Annotated[int, Field(strict=True)]
    name: str
    columns: list[str]
    rows: list[RowTuple]
    end_to_end: _EndToEnd | None = None
    environment: dict[str, str] = {}
    summary: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    variants: list[_Variant] = []


def to_dict(report: Findings) -> dict[str, Any]:
    """Plain data; infinity and NaN as strings, see :mod:`sage_diffusion.accuracy.metrics`."""
    end = report.end_to_end
    return {
        "version": VERSION,
        "name": report.name,
        "environment": dict(report.environment),
        "end_to_end": None
        if end is None
        else {
            "mean_psnr": json_number(end.mean_psnr),
            "mean_ssim": json_number(end.mean_ssim),
            "labels": list(end.labels),
            "psnr": [json_number(x) for x in end.psnr],
            "ssim": [json_number(x) for x in end.ssim],
            "latent_cosine": [json_number(x) for x in end.latent_cosine],
        },
        "variants": [variant_to_dict(variant) for variant in report.variants],
        "summary": None if report.summary is None else dict(report.summary),
        "plan": None if report.plan is None else report.plan.to_dict(),
        "columns": list(COLUMNS),
        "rows": [_row_to_list(row) for row in report.rows],
    }


def variant_to_dict(variant: Variant) -> dict[str, Any]:
    """Plain data of one line of a side-by-side table."""
    numbers = ("psnr", "ssim", "latent_cosine", "rel_l1", "predicted_time")
    return {
        "name": variant.name,
        **{key: json_number(getattr(variant, key)) for key in numbers},
        "specs": dict(variant.specs),
    }


def dump(report: Findings) -> str:
    """JSON text, one line per row."""
    data = to_dict(report)
    rows = data.pop("rows")
    head = json.dumps(data, indent=2, allow_nan=False)
    lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    listed = f"[\n{lines}\n  ]" if rows else "[]"
    return f'{head[:-2]},\n  "rows": {listed}\n}}\n'


def parse(text: str) -> dict[str, Any]:
    """The fields of a report; raises as :meth:`.AccuracyReport.from_json` says."""
    try:
        data = parse_json(text)
    except JSONError as error:
        raise ReportError(str(error)) from None
    if not isinstance(data, dict):
        raise ReportError(f"a report must be a JSON object, got {type(data).__name__}")
    version = data.get("version")
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise ReportError(
            f"version: this report has version {shown(version)}, this program reads up to {VERSION}"
        )
    try:
        parsed = _Report.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = error_path(tuple(part for part in first["loc"] if part not in _MEMBERS))
        raise ReportError(f"{path}: {error_message(first)}") from None
    if not 1 <= parsed.version <= VERSION:
        raise ReportError(f"version: must be 1 to {VERSION}, got {shown(parsed.version)}")
    if tuple(parsed.columns) != COLUMNS:
        raise ReportError(f"columns: must be {', '.join(COLUMNS)}, got {shown(parsed.columns)}")
    end = parsed.end_to_end
    return {
        "name": parsed.name,
        "rows": tuple(_row(row, i, parsed.version) for i, row in enumerate(parsed.rows)),
        "end_to_end": None
        if end is None
        else EndToEnd(
            tuple(end.labels),
            tuple(float(x) for x in end.psnr),
            tuple(number_from_json(x) for x in end.ssim),
            tuple(float(x) for x in end.latent_cosine),
        ),
        "environment": parsed.environment,
        "summary": parsed.summary,
        "plan": _plan(parsed.plan),
        "variants": tuple(
            Variant(
                x.name,
                number_from_json(x.psnr),
                number_from_json(x.ssim),
                number_from_json(x.latent_cosine),
                number_from_json(x.rel_l1),
                {_today(name, parsed.version): count for name, count in x.specs.items()},
                x.predicted_time,
            )
            for x in parsed.variants
        ),
    }


def _row_to_list(row: Row) -> list[Any]:
    where = [row.layer, row.step, row.progress, row.branch, str(row.spec)]
    return where + [json_number(x) for x in (row.cosine, row.rel_l1, row.rmse, row.max_abs)]


def _today(name: str, edition: int) -> str:
    """Today's name of a spec; what is none stays as it is."""
    if edition == VERSION:
        return name
    try:
        return str(AttentionSpec.parse(name, edition))
    except ValueError:
        return name


def _row(data: RowTuple, index: int, edition: int) -> Row:
    layer, step, progress, branch, spec, *numbers = data
    try:
        parsed = AttentionSpec.parse(spec, edition)
    except ValueError as error:
        raise ReportError(f"rows[{index}][4]: {error}") from None
    return Row(layer, step, progress, branch, parsed, *(float(x) for x in numbers))


def _plan(data: dict[str, Any] | None) -> PrecisionPlan | None:
    if data is None:
        return None
    try:
        return PrecisionPlan(**plan_fields(data))
    except PlanError as error:
        raise ReportError(f"plan.{error}") from None
