"""What an attention kernel's host and its twin share: parts of a call that neither quantizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize.limits import finite
from ..rope import Rope, apply_rope

#: An additive mask is clamped to this, so that a row of ``finfo.min`` stays finite in base 2.
MASK_FLOOR = -3.0e38

#: What an INT8 P of a tile is relative to: the tile's own maximum, but not less than 2 to minus
#: this of the row's largest weight, below which its codes don't reach float32's last bit.
LAG = 32.0


def smoothed_lse(q: Tensor, k_mean: Tensor, sm_scale: float, rope_q: Rope | None = None) -> Tensor:
    """The part of the log-sum-exp that smooth_k removed, ``[B, H, Lq]`` float32."""
    group = q.shape[1] // k_mean.shape[1]
    means = k_mean.repeat_interleave(group, 1)[..., None]
    return (apply_rope(finite(q), rope_q) @ means)[..., 0] * sm_scale


def half_value(v: Tensor) -> tuple[Tensor, Tensor]:
    """V in a half type and a power-of-two scale ``[B, H, D]`` float32 per channel.

    fp16 and bf16 are returned as they are with scale 1; float32 becomes FP16, scaled where a
    channel's largest value exceeds FP16's range.
    """
    ones = torch.ones(v.shape[0], v.shape[1], v.shape[3], device=v.device)
    if v.dtype in (torch.float16, torch.bfloat16):
        return v, ones
    amax = v.float().abs().amax(2)
    scale = torch.where(amax > 32768.0, torch.exp2(torch.ceil(torch.log2(amax / 32768.0))), ones)
    return (v.float() / scale.unsqueeze(2)).half(), scale
