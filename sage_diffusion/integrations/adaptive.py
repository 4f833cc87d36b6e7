"""Calibrate and evaluate any diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sage_diffusion.accuracy.compare import Generation
from sage_diffusion.integrations.diffusers import _denoisers
from sage_diffusion.integrations.pipelines import PipelineRun
from sage_diffusion.session import AttentionSession


class PipelineSampler:
    """A :class:`sage_diffusion.adapt.calibrate.Sampler` over a diffusers pipeline.

    Args:
        pipe: any pipeline with a scheduler; left as it was after every run.
        arguments: of every call, without prompt and generator.
        argument: the call's argument that takes a prompt; ``prompt`` or ``class_labels`` if None.

    Raises:
        ValueError: the pipeline's call takes neither.
    """

    def __init__(
        self, pipe: Any, arguments: Mapping[str, Any] | None = None, argument: str | None = None
    ):
        self.pipe = pipe
        self.arguments = dict(arguments or {})
        self.argument = argument or prompt_argument(pipe)
        self.session = AttentionSession("fp16")
        self.model: str | None = " + ".join(
            type(module).__name__ for module in _denoisers(pipe).values()
        )

    def generate(self, session: AttentionSession, prompt: Any, seed: int) -> Generation:
        """One call of the pipeline with a session attached."""
        run = PipelineRun(self.pipe, (seed,), self.arguments | {self.argument: prompt})
        return run(session)

    def sample(self, prompt: Any, seed: int) -> Tensor:
        """The final latents of one call, ``[B, ...]``."""
        found = self.generate(self.session, prompt, seed)
        if found.latents:
            return found.latents[-1]
        if found.images is None:
            raise ValueError(f"{type(self.pipe).__name__} shows neither latents nor pictures")
        return found.images


def prompt_argument(pipe: Any) -> str:
    """Which argument of a pipeline's call takes a prompt.

    Raises:
        ValueError: none does.
    """
    import inspect

    parameters = inspect.signature(pipe.__call__).parameters
    for name in ("class_labels", "prompt"):
        if name in parameters:
            return name
    raise ValueError(
        f"{type(pipe).__name__} takes neither prompt nor class_labels: name the argument"
    )


def class_batches(pipe: Any, count: int, size: int, first: int = 0) -> Sequence[list[int]]:
    """``count`` lists of ``size`` class indices, spread over all classes.

    It is one endless list cut into pieces: lists of a ``first`` beyond the last one of another call
    hold other classes, until all have been used.
    """
    classes = len(pipe.classes)
    order = [(i * 7) % classes if classes % 7 else i for i in range(classes)]
    return [[order[((first + n) * size + i) % classes] for i in range(size)] for n in range(count)]
