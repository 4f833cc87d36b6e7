"""What a kernel must know of a host's RoPE: its angles, found by looking at what it does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sage_diffusion.kv.method import Rope

#: Powers of two, whose products with a frequency are exact, and others that must agree with them.
_POWERS, _OTHERS = tuple(1 << n for n in range(11)), (3, 77, 1000)

#: Radians that a host's angle may be off.
_OFF = 1e-3


def angles_of(rope: Rope, dim: int, device: torch.device) -> tuple[Tensor, float] | None:
    """Radians a token ``[dim / 2]`` float64, and the gain of cosines and sines.

    None unless the rope turns channel i with channel i + dim / 2, all of a head's, by angles that
    are proportional to the position.
    """
    if dim % 2:
        return None
    half = dim // 2
    at = torch.tensor([_POWERS + _OTHERS], device=device)
    one, none = torch.ones(1, 1, at.shape[1], half), torch.zeros(1, 1, at.shape[1], half)
    first, second = (
        rope.rotate(torch.cat(pair, 3).to(device), at)[0, 0].double().cpu()
        for pair in ((one, none), (none, one))
    )
    cos, sin = first.split(half, 1)
    gain = float(torch.hypot(cos, sin).mean())
    if not torch.allclose(torch.hypot(cos, sin), torch.tensor(gain).double(), rtol=_OFF):
        return None
    if not torch.allclose(second, torch.cat((-sin, cos), 1), atol=_OFF * gain):
        return None
    seen = torch.atan2(sin, cos)
    angles = seen[0]
    for found, power in zip(seen[1 : len(_POWERS)], _POWERS[1:], strict=True):
        turns = ((angles * power - found) / (2 * math.pi)).round()
        angles = (found + 2 * math.pi * turns) / power
    apart = angles * at[0, :, None].cpu() - seen
    if (apart - 2 * math.pi * (apart / (2 * math.pi)).round()).abs().max() > _OFF:
        return None
    return angles.to(device), gain
