"""What the commands share: the ``--json`` flag, output, errors and progress.

A command is a function that ``typer`` reads.  It takes ``as_json: AsJson = False`` and ends with
:func:`emit`; whatever a library prints meanwhile goes to standard error (:func:`quiet_stdout`).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")
]


class CommandError(Exception):
    """What the user must change; printed as one line, exit code 1."""


def emit(as_json: bool, document: dict[str, Any], *parts: RenderableType) -> None:
    """Print a command's result: the document, or the text and tables for people."""
    if as_json:
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    from rich.console import Console

    # Rich reads a pipe's width as 80 columns and folds tables; files take them as they are.
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160)
    for part in parts:
        console.print(part)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Libraries that print do so on standard error inside the block."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on standard error, drawn on terminals only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Standard output is not redirected: a command's own result must not land on stderr.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=False
    ) as bar:
        yield bar


def fraction(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{part / whole:.0%}" if whole else "-"
