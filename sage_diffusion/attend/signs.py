"""The seed of the rotation's signs where kernels read it: in the memory of each device."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_diffusion.attend.calls import Call
from sage_diffusion.plan import PrecisionPlan


class SignSeed:
    """One number, the same on every device that asked for it.

    Kernels are handed its address.  So another number compiles nothing, and a CUDA graph that was
    captured with it replays with the number of the moment.
    """

    def __init__(self) -> None:
        self._value = 0
        self._on: dict[torch.device, Tensor] = {}

    def tell(self, value: int) -> None:
        """The number from now on, in the order of each device's current stream."""
        if value != self._value:
            self._value = value
            for seed in self._on.values():
                seed.fill_(value)

    def captured(self, plan: PrecisionPlan, layer: str, call: Call) -> str | None:
        """Why replays of a graph that is captured would not do what the plan says; None if so."""
        if not plan.steady(layer, call.k.shape[2]):
            return "a CUDA graph is captured, which would repeat this step's precision"
        if plan.sign_seed is not None and call.q.device not in self._on:  # can't be put there now
            return "a CUDA graph is captured before any call was made: warm up first"
        return None

    def on(self, device: torch.device) -> Tensor:
        """One int32 on the device; read it, don't keep its value."""
        found = self._on.get(device)
        if found is None:
            with torch.inference_mode(False):  # others change it outside of one, too
                found = torch.full((1,), self._value, dtype=torch.int32, device=device)
            self._on[device] = found
        return found
