"""What several commands read from their options: prompts, classes and a pipeline's arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sage_diffusion.commands.common import CommandError
from sage_diffusion.json_files import JSONError, NotJSON, parse_json

if TYPE_CHECKING:
    from sage_diffusion.plan import PrecisionPlan

# ruff: noqa: UP045 (typer reads Optional on Python 3.10)

#: Pictures per call of a class-conditional model.
_BATCH = 4

#: Pictures of the bundled model whose gradients share a graph: larger calls, 3 GB instead of 1.5.
PICTURES_PER_GRAPH = 4


#: Option of commands that predict times.
Tokens = Annotated[
    Optional[float],
    typer.Option(
        help="Times of calls of so many tokens, 4608 for a picture of 1024 x 1024: short ones gain "
        "less, as they are quantized and launched, too. inf: of the main loop alone. "
        "[default: of the calls as they are; inf for the bundled model, whose pictures are tiny]"
    ),
]


#: How the help says what :func:`read_plan` takes.
PLAN_HELP = "a JSON file, or a name of `plan list`"


def read_plan(source: Path) -> PrecisionPlan:
    """A plan's file, or one that comes with the package by its name.

    Raises:
        PlanError: it can't be read, or is no plan.
    """
    from sage_diffusion.plan import PrecisionPlan
    from sage_diffusion.plan.catalog import shipped
    from sage_diffusion.plan.library import shipped_plan

    named = str(source) in shipped()
    return shipped_plan(str(source)) if named else PrecisionPlan.load(source)


def default_tokens(model: str, tokens: float | None) -> float | None:
    """Tokens that times are predicted for; the bundled model stands for one of long sequences."""
    return math.inf if tokens is None and model == "bundled" else tokens


def call_arguments(pipe: Any, prompts: list[str], steps: int) -> tuple[dict[str, Any], list[str]]:
    """Arguments of a pipeline's call, and labels of its pictures.

    Raises:
        CommandError: the pipeline takes neither prompts nor classes, but some were given, or it
            needs some.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {}
    if "num_inference_steps" in parameters:
        arguments["num_inference_steps"] = steps
    if "class_labels" in parameters:
        known = getattr(pipe, "classes", None)
        chosen = prompts or list(known or ())[:4]
        if not chosen:
            raise CommandError("this model is class-conditional: name classes with --prompt")
        labels = [int(name) if name.isdigit() else name for name in chosen]
        return arguments | {"class_labels": labels}, chosen
    if "prompt" in parameters:
        if not prompts:
            raise CommandError("this model needs at least one --prompt")
        return arguments | {"prompt": prompts if len(prompts) > 1 else prompts[0]}, prompts
    if prompts:
        raise CommandError(f"{type(pipe).__name__} takes no prompt")
    return arguments, []


def check_names(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse ``--set`` of arguments that the pipeline's call does not have."""
    parameters = inspect.signature(pipe.__call__).parameters
    for name in arguments:
        if name not in parameters:
            raise CommandError(f"{type(pipe).__name__} has no argument {name!r} to --set")


def parse_option(text: str) -> tuple[str, Any]:
    """``NAME=JSON`` of ``--set``; what is no JSON is a string."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise CommandError(f"--set needs NAME=VALUE, got {text!r}")
    try:
        return name, parse_json(value)
    except NotJSON:
        return name, value
    except JSONError as error:
        raise CommandError(f"--set {name}: {error}") from None


def prompts_of(sampler: Any, given: list[str] | None, count: int = 4, first: int = 0) -> list[Any]:
    """What calibration samples: prompts as given, or lists of classes.

    Args:
        sampler: a ``PipelineSampler``.
        given: by the user; for class-conditional models commas part the classes of one call.
        count: default batches.
        first: skip this many default batches, so that evaluation sees others.

    Raises:
        CommandError: the model needs prompts and none were given.
    """
    if sampler.argument != "class_labels":
        if not given:
            raise CommandError("this model needs prompts: give --prompt at least twice")
        return list(given)
    if given:
        return [
            [int(name) if name.strip().isdigit() else name.strip() for name in text.split(",")]
            for text in given
        ]
    from sage_diffusion.integrations.diffusers.sampler import class_batches

    if not getattr(sampler.pipe, "classes", None):
        raise CommandError("this model is class-conditional: name classes with --prompt")
    return list(class_batches(sampler.pipe, count, _BATCH, first))
