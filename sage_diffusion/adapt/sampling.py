"""What calibration asks of a host: to sample with a session attached, and how far it has got."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.plan import PrecisionPlan


@runtime_checkable
class Sampler(Protocol):
    """A host that samples with a session attached.

    ``model`` is the class name of the network that the session's layers belong to.  A sampler may
    also have ``settings``, plain data that decides what is sampled (steps, guidance): a table that
    was made with others is not continued.
    """

    session: AttentionSession
    model: str | None

    def sample(self, prompt: Any, seed: int) -> Tensor:
        """Run the whole sampling loop; returns the final latents (or pictures) ``[B, ...]``."""


@runtime_checkable
class Tracer(Protocol):
    """A :class:`Sampler` that can be differentiated."""

    batch: int  #: pictures that one graph may hold

    def pictures(self, prompt: Any, seed: int) -> list[tuple[Any, int]]:
        """The (prompt, seed) of every picture of a run."""

    def trace(self, pictures: Sequence[tuple[Any, int]]) -> Tensor:
        """Sample at most ``batch`` pictures at once: their final latents ``[B, ...]`` in that
        order, with the graph that leads there.  More than one make one row each."""


@dataclass(frozen=True)
class ModelCall:
    """One call of the network in a sampling run, a break in the run's graph.

    Attributes:
        input: latents that went in, with the graph that leads to them from outputs of other calls.
        output: what came out, a leaf that the graph of what follows begins with.
        again: makes the call anew for such an input, differentiably, seen by the session's
            observers as the call was.
    """

    input: Tensor
    output: Tensor
    again: Callable[[Tensor], Tensor]


@runtime_checkable
class Replayer(Protocol):
    """A :class:`Sampler` that can be differentiated a call of its network at a time: memory holds
    the graph of one call, whatever the number of steps."""

    def pictures(self, prompt: Any, seed: int) -> list[tuple[Any, int]]:
        """The (prompt, seed) of every picture of a run."""

    def replay(
        self, picture: tuple[Any, int], use: Callable[[Tensor, Sequence[ModelCall]], None]
    ) -> None:
        """Sample a picture, and call ``use`` with its final latents ``[1, ...]``, whose graph
        leads to the outputs of the model calls, and these; the graph lives no longer.

        Raises:
            NoGradient: this can't be differentiated, or not in the memory that there is.
        """


class NoGradient(ValueError):
    """A host whose sampling can't be differentiated, or not in its memory."""


@dataclass(frozen=True)
class Progress:
    """Where a calibration stands, given to the progress callback after each run, and where the
    end-to-end stage begins.

    Attributes:
        stage: "measure", "remeasure" or "sensitivity".
        done, total: runs of the stage.
        seconds: since the calibration began.
    """

    stage: str
    done: int
    total: int
    seconds: float


@contextlib.contextmanager
def planned(session: AttentionSession, plan: PrecisionPlan | str) -> Iterator[None]:
    """The session follows another plan inside the block."""
    before = session.plan
    session.plan = plan
    try:
        yield
    finally:
        session.plan = before
