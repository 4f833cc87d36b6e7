"""Masks as the plain Triton kernel reads them, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Q_SCALE_BLOCK, TILE_N, padded_length
from .entry import readable


def as_tiles(mask: Tensor, k_len: int) -> tuple[int, Tensor]:
    """Its kind, and the mask as the kernel reads it, with all keys or padded to whole tiles."""
    kind, mask = readable(mask)
    # The kernel's offsets within a tile have 32 bits.
    if mask.ndim > 1 and Q_SCALE_BLOCK * mask.stride(-2) + TILE_N * mask.stride(-1) >= 2**31:
        mask = mask.contiguous()
    if _reads_elements(mask, k_len):
        return kind, torch.nn.functional.pad(mask, (0, padded_length(k_len) - k_len))
    return kind, mask.expand(*mask.shape[:-1], k_len)


def _reads_elements(mask: Tensor, k_len: int) -> bool:
    """Whether the kernel would read a mask element by element, which costs registers it hasn't.

    Of a mask that differs from query to query it reads 16 elements at a time if all rows begin and
    end at multiples of 16.  Others are worth a padded copy, without broadcast dims.
    """
    if mask.ndim < 2 or mask.shape[-2] == 1 or mask.shape[-1] != k_len:
        return False
    steps = (*mask.stride()[:-1], mask.storage_offset(), k_len)
    return mask.stride(-1) != 1 or any(step % 16 for step in steps)
