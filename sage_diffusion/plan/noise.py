"""What the numbers of a schedule mean, and how schedules of two kinds are compared.

Schedulers count in different units, so a plan that was made under one of them stands at other
numbers under the next.  All of them say the same thing, how much of the picture is noise: the
*share* ``s`` of a flow, ``x = (1 - s) x0 + s n``, is between 0 and 1 in every unit.

    flow-sigmas   s itself (flow matching)
    sigmas        noise over signal, s / (1 - s) (EDM; Karras et al. 2022, arXiv 2206.00364)
    log-snr       2 log((1 - s) / s) (Kingma et al. 2021, arXiv 2107.00630)
    timesteps     of training: of a flow s times their number; else the model's ``alphas_cumprod``
                  a give sqrt((1 - a) / a), in the unit of sigmas
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sage_diffusion.plan.rules import progress

#: A schedule without a unit whose first value is above this counts timesteps ..
_TIMESTEPS_ABOVE = 30.0
#: .. unless half of its steps fall below this part of the first: sigmas fall like that, and
#: timesteps, which are whole numbers besides, are about evenly spaced.
_STEEP = 1 / 8


def _counts_timesteps(schedule: Sequence[float]) -> bool:
    high = max(schedule, default=0.0)
    if high <= _TIMESTEPS_ABOVE:
        return False
    whole = all(float(value).is_integer() for value in schedule)
    return whole or sorted(schedule)[(len(schedule) - 1) // 2] > _STEEP * high


@dataclass(frozen=True, eq=False)
class NoiseScale:
    """How a host counts noise.

    Attributes:
        unit: one of :data:`.rules.UNITS`; None for sigmas of a kind that the host
            does not tell.
        alphas_cumprod: share of the signal's power at each of the model's training timesteps;
            None where it has none (flows) or the host does not know.
        timesteps: number of training timesteps of a flow; None of any other model.
    """

    unit: str | None = None
    alphas_cumprod: Sequence[float] | None = None
    timesteps: int | None = None

    @classmethod
    def guess(cls, schedule: Sequence[float]) -> NoiseScale:
        """Of a host that tells nothing but its schedule."""
        return cls("timesteps" if _counts_timesteps(schedule) else None)

    def share(self, value: float, unit: str) -> float | None:
        """Share of noise, 0 .. 1, of a value in some unit, None if this host can't convert it."""
        if unit == "flow-sigmas":
            return min(max(value, 0.0), 1.0)
        if unit == "sigmas":
            return max(value, 0.0) / (1 + max(value, 0.0))
        if unit == "log-snr":
            return 1 / (1 + math.exp(min(max(value / 2, -300.0), 300.0)))
        if self.timesteps is not None:
            return min(max(value / self.timesteps, 0.0), 1.0)
        if not self.alphas_cumprod:
            return None
        sigma = self.sigma(value)
        return sigma / (1 + sigma)

    def sigma(self, timestep: float) -> float:
        """Noise over signal at a training timestep of a model with ``alphas_cumprod``."""
        assert self.alphas_cumprod
        last = len(self.alphas_cumprod) - 1
        at = min(max(timestep, 0.0), float(last))
        below = min(int(at), max(last - 1, 0))
        low, high = self.alphas_cumprod[below], self.alphas_cumprod[min(below + 1, last)]
        signal = min(max(low + (at - below) * (high - low), 1e-12), 1.0)
        return math.sqrt((1 - signal) / signal)

    def unit_of(self, schedule: Sequence[float], unit: str | None) -> str | None:
        """The unit of a plan's schedule; of old plans that store none, None if it can't be told."""
        if unit is not None:
            return unit
        if _counts_timesteps(schedule):
            return "timesteps"
        high = max(schedule)
        if high > 1:
            return "sigmas"  # no flow has so much noise
        return None if self.unit == "timesteps" else self.unit or "sigmas"

    def places(
        self, schedule: Sequence[float], unit: str | None
    ) -> Callable[[float], float] | None:
        """Where this host's numbers stand in a plan's schedule.

        Args:
            schedule: of the plan.
            unit: of the schedule, None in old plans.

        Returns:
            A function from this host's values to progress in the plan's schedule; None if the two
            can't be compared.
        """
        theirs, mine = self.unit_of(schedule, unit), self.unit
        if theirs is None or (mine is None and theirs == "timesteps"):
            return None
        if theirs == mine or mine is None:
            sign = -1.0 if theirs == "log-snr" else 1.0
            values = [sign * value for value in schedule]
            return lambda value: progress(sign * value, values)
        shares = [self.share(value, theirs) for value in schedule]
        known = [share for share in shares if share is not None]
        if len(known) < len(shares) or self.share(0.0, mine) is None:
            return None

        def place(value: float) -> float:
            share = self.share(value, mine)
            assert share is not None
            return progress(share, known)

        return place
