"""The command ``sage-diffusion``, also ``python -m sage_diffusion``.

Exit codes: 0 done, 1 it could not be done (one line on standard error says why), 2 wrong usage.
With ``--json`` standard output holds one document in every case: ``{"error": "..."}`` on failure.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import typer

from sage_diffusion.commands.common import CommandError

#: Each is a module of ``sage_diffusion.commands`` with a function of its name, or with a Typer
#: ``app`` of sub-commands.  The one line that a new command adds.
COMMANDS = (
    *("demo", "compare", "calibrate", "evaluate", "plan"),
    *("doctor", "verify", "cost", "bench", "tune", "vq", "kv"),
)


def build(names: Sequence[str] = COMMANDS) -> typer.Typer:
    """The application with these commands; only their modules are imported."""
    app = typer.Typer(
        name="sage-diffusion",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()  # keeps the command's name in the usage also where there is one command only
    def sage_diffusion() -> None:
        """Quantized attention whose precision adapts per layer and timestep."""

    for name in names:
        module = importlib.import_module(f"sage_diffusion.commands.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, name))
    return app


# Typer carries its own copy of click in some versions and uses click's in others.
_ClickException: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    app = build(arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS)
    try:
        result = app(arguments, standalone_mode=False)
    except _ClickException as error:
        if not getattr(error, "message", ""):  # no command was given: the help was printed
            return 0 if arguments == [] else 2
        return _fail(str(error.format_message()), as_json, 2)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", as_json, 130)
    except (CommandError, ValueError, OSError, ImportError, RuntimeError) as error:
        # Wrong plans, specs and models, missing files and extras, refused calls: all of ours and
        # diffusers' are of these kinds and say what is wrong.
        return _fail(" ".join(str(error).split()) or type(error).__name__, as_json, 1)
    if result == 130:  # how Typer reports Ctrl-C
        return _fail("interrupted", as_json, 130)
    return result if isinstance(result, int) else 0


def _fail(message: str, as_json: bool, code: int) -> int:
    typer.echo(f"sage-diffusion: {message}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": message}))
    return code


if __name__ == "__main__":
    sys.exit(main())
