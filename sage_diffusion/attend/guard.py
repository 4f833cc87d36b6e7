"""The guard of a running session: drift checks on a few rows, and stepping a layer up.

Nothing here waits for the device: a verdict on a step is read when a later step begins.  Without
drift checks the guard costs nothing beyond the finite check that every session makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sage_diffusion.attend.calls import Call
from sage_diffusion.attend.finite import DeferredValues, capturing
from sage_diffusion.attend.rows import RowCall, compare_rows
from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.spec import FP16, AttentionSpec


@dataclass(frozen=True)
class Guard:
    """What a session watches and what it does about it.

    Attributes:
        every: check each layer's drift every so many steps (all layers at step 0, then a share of
            them at each step, and again those that were just stepped up); 0 never checks.
        limit: largest relative L1 distance from exact attention that a layer may have.  INT4 is at
            0.09 in the mean over a real model's layers.
        rows: query rows per check.  The check costs ``rows / Lq`` of exact attention.
        step_up: give a layer that misbehaves a more accurate spec from the next step on.
    """

    every: int = 0
    limit: float = 0.2
    rows: int = 32
    step_up: bool = True

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must not be negative, got {self.every}")
        if not 0 < self.limit < float("inf"):
            raise ValueError(f"limit must be positive and finite, got {self.limit}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")


def next_up(spec: AttentionSpec) -> AttentionSpec:
    """The next rung up: 4-bit QK -> INT8 QK -> FP16 PV -> FP16."""
    if not spec.quantized:
        return spec
    if spec.qk in (Precision.INT4, Precision.FP4):
        pv = Precision.FP8 if spec.pv is Precision.FP4 else spec.pv
        return replace(spec, qk=Precision.INT8, pv=pv, smooth_q=False, clip=False)
    if spec.pv is not Precision.FP16:
        return replace(
            spec,
            qk=Precision.INT8,
            pv=Precision.FP16,
            pv_accumulator="fp32",
            smooth_v=False,
            unsigned_p=False,
        )
    return FP16


@dataclass
class GuardState:
    """What the guard of one session has seen and done.

    Attributes:
        guard: the settings.
        rungs: layer -> rungs that it was stepped up.
        reasons: layer -> why, in words, one per step up.
        drift: layer -> largest relative L1 found.
    """

    guard: Guard
    rungs: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)
    _checks: DeferredValues = field(default_factory=DeferredValues)
    _raised_at: dict[str, int] = field(default_factory=dict)  # first step with the new spec

    def __len__(self) -> int:
        """Verdicts that were gathered since the last poll."""
        return len(self._checks)

    def spec(self, layer: str, spec: AttentionSpec) -> AttentionSpec:
        """The plan's spec, stepped up as far as the layer was."""
        for _ in range(self.rungs.get(layer, 0)):
            spec = next_up(spec)
        return spec

    def begin_run(self) -> None:
        """Steps count from 0 again; layers keep the rungs that they were stepped up."""
        self._raised_at.clear()
        self._checks = DeferredValues()  # of a run that was broken off

    def due(self, layer: str, index: int, step: int) -> bool:
        """Is this layer checked at this step?"""
        every = self.guard.every
        if every < 1 or step < 0:
            return False
        return step == 0 or (step + index) % every == 0 or self._raised_at.get(layer) == step

    def check(self, layer: str, step: int, call: Call, out: Tensor) -> None:
        """Compare a few rows of ``out`` with exact attention; the verdict is read later.

        Args:
            layer, step: where the call happened.
            call: q and k rotated.
            out: ``[B, H, Lq, D]``, what came of it.
        """
        if capturing(out):
            return
        q_len = call.q.shape[2]
        count = min(self.guard.rows, q_len)
        # Evenly spaced, shifted from step to step: no generator, no copy from the host.
        index = torch.arange(count, device=out.device) * q_len // count
        index = (index + step % max(1, q_len // count)).clamp(max=q_len - 1)
        l1 = compare_rows(out[:, :, index], RowCall.of(call, index).exact())[1]
        self._checks.put(layer, step, l1)

    def poll(self, now: int) -> list[str]:
        """Read the verdicts that are known at step ``now``; returns what was done, in words."""
        done = []
        for layer, step, l1 in self._checks.poll():
            self.drift[layer] = max(l1, self.drift.get(layer, 0.0))
            if l1 > self.guard.limit and step >= self._raised_at.get(layer, 0):
                done += self.raise_layer(layer, now, f"relative L1 {l1:.2f} at step {step}")
        return done

    def wait(self) -> None:
        """Wait for every verdict in flight (at the end of a run)."""
        self._checks.wait()

    def raise_layer(self, layer: str, now: int, reason: str, rungs: int = 1) -> list[str]:
        """Step a layer up from step ``now`` on; returns what was done, in words."""
        if not self.guard.step_up:
            return [f"{layer}: {reason}"]
        self.rungs[layer] = self.rungs.get(layer, 0) + rungs
        self.reasons.setdefault(layer, []).append(reason)
        self._raised_at[layer] = now  # a verdict that comes late is on the old spec
        return [f"{layer} is stepped up: {reason}"]

    def reset(self) -> None:
        """Forget everything: another plan, or a new count."""
        for seen in (self.rungs, self.reasons, self.drift, self._raised_at):
            seen.clear()
        self._checks = DeferredValues()
