"""The table of launches as JSON text: validation that says what is wrong."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sage_diffusion.attend.launch import Entry, TableError
from sage_diffusion.plan.plan_json import error_message, error_path

VERSION: Literal[1] = 1

Small = Annotated[int, Field(ge=1, le=1024, strict=True)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    gpu: Annotated[str, Field(min_length=1)]
    triton: str
    arch: str
    backend: str
    formats: str
    head_dim: Literal[64, 128, 256]
    launch: dict[str, Small]
    source: Literal["measured", "predicted bound"]
    value: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    entries: list[_Entry]


def parse_table(data: Any) -> list[Entry]:
    """Entries of a table.

    Raises:
        TableError: the data are no table; the message names the JSON path.
    """
    if isinstance(data, dict) and isinstance(data.get("version"), bool):
        raise TableError(f"version: must be 1, got {data['version']}")  # Python: True == 1
    try:
        read = _File.model_validate(data).entries
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TableError(f"{error_path(first['loc'])}: {error_message(first)}") from None
    return [Entry(**entry.model_dump()) for entry in read]


def format_table(entries: list[Entry]) -> str:
    """Text whose data :func:`parse_table` reads back.

    Raises:
        ValidationError: an entry that could not be read back.
    """
    rows = [_Entry(**asdict(entry)) for entry in entries]
    return _File(version=VERSION, entries=rows).model_dump_json(indent=2) + "\n"
