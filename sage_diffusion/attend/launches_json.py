"""The table of launches as JSON text: validation that says what is wrong."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sage_diffusion.attend.launch import Entry, TableError

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
    value: Annotated[float, Field(gt=0, strict=True)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    entries: list[_Entry]


def parse_table(text: str) -> list[Entry]:
    """Entries of a table.

    Raises:
        TableError: the text is no table; the message names the JSON path.
    """
    try:
        read = _File.model_validate_json(text).entries
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise TableError(f"{where}: {first['msg']}") from None
    return [Entry(**entry.model_dump()) for entry in read]


def format_table(entries: list[Entry]) -> str:
    """Text that :func:`parse_table` reads back.

    Raises:
        ValidationError: an entry that could not be read back.
    """
    rows = [_Entry(**asdict(entry)) for entry in entries]
    return _File(version=VERSION, entries=rows).model_dump_json(indent=2) + "\n"
