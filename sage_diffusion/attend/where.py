"""``Where``: the place in a sampling run at which attention calls happen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sage_diffusion.plan import PrecisionPlan, step_progress


@dataclass(frozen=True)
class Where:
    """Where sampling stands; a new value for every step.

    Attributes:
        step: index of the sampling step, -1 outside sampling.
        steps: of the run, 0 before the first.
        progress: position in the schedule (the plan's own where it stores one), 0 .. 1.
        sigma: of the step, where the host told it.
        schedule: sigma of every step, where the host knows them beforehand.
        branch: "cond" or "uncond" where whole calls belong to one, else None.
        chunks: where both share a batch, the branches of its equal parts in their order.
    """

    step: int = -1
    steps: int = 0
    progress: float = 0.0
    sigma: float | None = None
    schedule: tuple[float, ...] = ()
    branch: str | None = None
    chunks: tuple[str, ...] = ()

    def started(self, steps: int, schedule: Sequence[float]) -> Where:
        """A run of so many steps begins.

        Raises:
            ValueError: no steps, or a schedule of another length.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if schedule and len(schedule) != steps:
            raise ValueError(f"schedule must have one sigma a step ({steps}), got {len(schedule)}")
        return replace(self, steps=steps, schedule=tuple(schedule))

    def at_step(self, step: int, sigma: float | None, plan: PrecisionPlan) -> Where:
        """The run is at ``step``; progress is by sigma in a plan that stores its own schedule."""
        if sigma is not None and plan.schedule is not None:
            progress = plan.remap(sigma)
        else:
            progress = step_progress(step, self.steps)
        return replace(self, step=step, sigma=sigma, progress=progress)

    def finished(self) -> Where:
        """Outside sampling; how many steps the last run had stays known."""
        return replace(self, step=-1, progress=0.0, branch=None, chunks=())

    @property
    def parts(self) -> tuple[str, ...]:
        """The branches of a batch's parts; none where whole calls belong to one branch."""
        return self.chunks if self.branch is None else ()
