"""Calibrate and evaluate any diffusers pipeline."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.accuracy.compare import Generation
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers.control import apply
from sage_diffusion.integrations.diffusers.patch import denoisers, model_name
from sage_diffusion.integrations.diffusers.pipelines import PipelineRun

#: Arguments of these types are kept with a score table.
_PLAIN = (bool, int, float, str)


class PipelineSampler:
    """A :class:`sage_diffusion.adapt.sampling.Sampler` over a diffusers pipeline.

    Args:
        pipe: any pipeline with a scheduler; left as it was after every run.
        arguments: of every call, without prompt and generator.
        argument: the call's argument that takes a prompt; ``prompt`` or ``class_labels`` if None.
        batch: pictures that one call of :meth:`trace` may hold; its memory grows with them.

    Raises:
        ValueError: the pipeline's call takes neither, or the pipeline has no attention that can be
            routed.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any] | None = None,
        argument: str | None = None,
        batch: int = 1,
    ):
        self.pipe = pipe
        self.arguments = dict(arguments or {})
        self.argument = argument or prompt_argument(pipe)
        self.batch = batch
        self.session = AttentionSession("fp16")
        self.model: str | None = model_name(pipe)
        with apply(pipe, self.session):
            pass  # from now on the session knows the layers: a table of others is refused at once
        self.settings = {
            name: value for name, value in self.arguments.items() if isinstance(value, _PLAIN)
        }

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

    def pictures(self, prompt: Any, seed: int) -> list[tuple[Any, int]]:
        """A run's pictures one by one: a list of prompts makes one each."""
        each = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        return [(one, seed + i) for i, one in enumerate(each)]

    def trace(self, pictures: Sequence[tuple[Any, int]]) -> Tensor:
        """The final latents of these pictures with the graph that leads to them.

        The pipeline's call is run without the ``torch.no_grad`` around it.
        """
        prompts: Any = [prompt for prompt, _ in pictures]
        noise: Any = [torch.Generator().manual_seed(seed) for _, seed in pictures]
        prompt, generator = (prompts, noise) if len(pictures) > 1 else (prompts[0], noise[0])
        arguments = self.arguments | {self.argument: prompt}
        parameters = inspect.signature(self.pipe.__call__).parameters
        arguments |= {"output_type": "latent"} if "output_type" in parameters else {}
        arguments |= {"generator": generator}
        call = inspect.unwrap(type(self.pipe).__call__)
        models = denoisers(self.pipe).values()
        with apply(self.pipe, self.session), _differentiable(models), torch.enable_grad():
            found = call(self.pipe, **arguments)
        return found[0] if isinstance(found, tuple) else found.images


@contextlib.contextmanager
def _differentiable(models: Iterable[nn.Module]) -> Iterator[None]:
    """Gradients flow inside the block.

    Only vectors (biases, norms) ask for theirs: that starts a graph in every layer and keeps none
    of the activations that the gradient of a matrix would need.
    """
    parameters = [p for model in models for p in model.parameters()]
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(p.ndim == 1)
        yield
    finally:
        for p, asked in zip(parameters, before, strict=True):
            p.requires_grad_(asked)


def prompt_argument(pipe: Any) -> str:
    """Which argument of a pipeline's call takes a prompt.

    Raises:
        ValueError: none does.
    """
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
