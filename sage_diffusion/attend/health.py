"""What a session learns of its calls a step late, and what follows from it for those to come."""

from __future__ import annotations

import logging

from torch import Tensor

from sage_diffusion.attend import finite
from sage_diffusion.attend.finite import FiniteWatch
from sage_diffusion.attend.guard import Guard, GuardState

log = logging.getLogger("sage_diffusion")

#: More verdicts than this do not wait for the next step: a host that never steps has them read by
#: count.
POLL_EVERY = 256

#: On a GPU one call in so many of a layer has its inputs looked at.
LOOK_EVERY = 8


class NonFiniteOutput(RuntimeError):
    """A strict session found NaN or infinity in a layer's output, or in what came into a layer."""


class Verdicts:
    """NaN, infinity and drift of the calls that were, each read without waiting for a device.

    Args:
        guard: drift checks and stepping up.

    Attributes:
        outputs, inputs: the watched calls' flags.
        guard: what the guard has seen and done.
        non_finite: layer -> steps whose quantized output had NaN or infinity.
        came_in: layer -> steps in which NaN or infinity came in.
    """

    def __init__(self, guard: Guard):
        self.outputs, self.inputs = FiniteWatch(), FiniteWatch()
        self.guard = GuardState(guard)
        self.non_finite: dict[str, list[int]] = {}
        self.came_in: dict[str, list[int]] = {}
        self._native: set[str] = set()
        self._looks: dict[str, int] = {}

    def runs_natively(self, layer: str) -> bool:
        """Has NaN come into the layer in this run?  Its own attention passes it on."""
        return layer in self._native

    def not_finite(self, layer: str, index: int, step: int, *inputs: Tensor) -> bool:
        """Is it known at once that NaN or infinity comes into the call?

        Quantized it may vanish: the largest number of a block with a NaN is a number.  On a GPU
        nobody waits, and each layer has one call in eight looked at, not all in the same one: the
        passes over Q, K and V cost three times what the one over the output does.
        """
        at_once = finite.reads_at_once(inputs[0])
        looks = self._looks[layer] = self._looks.get(layer, 0) + 1
        if not at_once and (looks + index) % LOOK_EVERY:
            return False
        found = [self.inputs.look(layer, step, x) for x in inputs]
        return at_once and False in found

    def full(self) -> bool:
        """Are there so many verdicts that they can't wait for a step?"""
        return len(self.outputs) + len(self.inputs) + len(self.guard) >= POLL_EVERY

    def begin_run(self) -> None:
        """Drop the verdicts of a run that was broken off; layers keep what they were stepped up."""
        for name, step in dict.fromkeys(self.outputs.poll()):
            log.warning("%s was not finite at step %d of a run that was broken off", name, step)
        self.outputs.forget()
        self.inputs.forget()
        self.guard.begin_run()
        self._native.clear()

    def wait(self) -> None:
        """Wait for every verdict in flight (at the end of a run)."""
        self.outputs.wait()
        self.inputs.wait()
        self.guard.wait()

    def read(self, now: int, strict: bool) -> bool:
        """Book what is known by step ``now``; never waits.

        Returns:
            Whether specs may have changed.

        Raises:
            NonFiniteOutput: strict, and a layer was not finite for the first time.
        """
        came_in = self.inputs.poll()
        fresh = [name for name, step in came_in if _first(self.came_in, name, step)]
        self._native.update(name for name, _ in came_in)
        made = [found for found in self.outputs.poll() if found not in came_in]
        worse = [(name, step) for name, step in made if _first(self.non_finite, name, step)]
        for name, step in worse:
            # Another rung may fail the same way: straight to the host's own attention.
            self.guard.raise_layer(name, now, f"non-finite output at step {step}", rungs=3)
        done = self.guard.poll(now)
        for words in done:
            log.warning("%s", words)
        for what, names in (
            ("non-finite attention output in", [name for name, _ in worse]),
            ("NaN or infinity came into the attention of", fresh),
        ):
            if names:
                message = f"{what} {', '.join(names[:4])}"
                if strict:
                    raise NonFiniteOutput(message)
                log.warning("%s", message)
        return bool(came_in or made or done)

    def reset(self) -> None:
        """Forget everything: a new count."""
        self.non_finite.clear()
        self.came_in.clear()
        self._native.clear()
        self.guard.reset()


def _first(seen: dict[str, list[int]], name: str, step: int) -> bool:
    """Book a layer's step; True for the first of that layer."""
    steps = seen.setdefault(name, [])
    fresh = not steps
    if step not in steps:
        steps.append(step)
    return fresh
