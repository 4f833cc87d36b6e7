"""Masks that differ from query to query, as the Gluon attention kernel reads them.

The kernel gives a lane 32 scores of a tile: 16 query rows and 64 keys belong to a warp.  A boolean
mask becomes one 32-bit word per lane and tile, an additive one the lane's 32 values side by side.
Heads and batches that share a mask share its packed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import LOG2E, Q_BLOCK, TILE_N, cdiv
from ..start import start_kernel
from .terms import MASK_FLOOR

#: Query rows of a warp.
ROWS = 16

#: Scores of a warp's tile, and of a lane's.
_SCORES, _LANE_SCORES = tl.constexpr(ROWS * TILE_N), tl.constexpr(ROWS * TILE_N // 32)
_TILE_N, _ROWS = tl.constexpr(TILE_N), tl.constexpr(ROWS)

#: What a finite value may be, so that it stays finite in log2 units too.
LIMIT = -MASK_FLOOR / LOG2E

_KINDS = {
    torch.bool: "bool",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


class PackedMask(NamedTuple):
    """A mask in the order of the kernel's registers.

    Attributes:
        kind: "bool", "fp16", "bf16" or "fp32".
        words: ``[b, h, groups, tiles, words of a tile]`` int32; b is 1 or B, h is 1 or H, a group
            is 16 query rows; the number of groups is a multiple of 8, that of tiles even.
        span: ``[b, h, groups, 2]`` int32, the first tile of keys that a row of the group sees and
            the one after the last; the number of tiles and 0 where it sees none.
    """

    kind: str
    words: Tensor
    span: Tensor

    @property
    def strides(self) -> tuple[int, int]:
        """From one batch and head to the next, in heads of ``words``."""
        batch, heads = self.words.shape[:2]
        return (heads if batch > 1 else 0, 1 if heads > 1 else 0)


@triton.jit
def _pack_kernel(
    p_mask,  # uint8 or float
    p_out,  # int32, or the mask's type
    p_span,
    heads,
    groups,
    tiles,
    q_len,
    k_len,
    stride_b,
    stride_h,
    stride_m,
    stride_n,
    BOOL: tl.constexpr,
    VECTOR: tl.constexpr,  # neighbours of a lane in the output
    LIMIT: tl.constexpr,  # of a finite value
):
    """16 query rows against all keys."""
    i_group, i_bh = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    position = tl.arange(0, _SCORES)
    if BOOL:
        lane, own = position // _LANE_SCORES, position % _LANE_SCORES
    else:
        lane = position // VECTOR % 32
        own = position // (VECTOR * 32) * VECTOR + position % VECTOR
    # A lane's scores, by tile of 8 keys, row of two, key of two.
    o_m = i_group * _ROWS + lane // 4 + (own & 2) * 4
    o_n = own // 4 * 8 + lane % 4 * 2 + (own & 1)
    p_mask += (i_bh // heads) * stride_b + (i_bh % heads) * stride_h
    p_row = p_mask + o_m.to(tl.int64) * stride_m
    p_out += (i_bh * groups + i_group) * tiles * (32 if BOOL else _SCORES)
    first, stop = tiles, 0
    for i in range(tiles):
        key = i * _TILE_N + o_n
        inside = (o_m < q_len) & (key < k_len)
        p_seen = p_row + key.to(tl.int64) * stride_n
        if BOOL:
            bits = (tl.load(p_seen, mask=inside, other=0) != 0).to(tl.int32) << own
            words = tl.sum(tl.reshape(bits, [32, _LANE_SCORES]), 1)
            tl.store(p_out + i * 32 + tl.arange(0, 32), words)
            seen = tl.max((words != 0).to(tl.int32), 0)
        else:
            x = tl.load(p_seen, mask=inside, other=-float("inf")).to(tl.float32)
            limited = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
            hidden = x == -float("inf")
            packed = tl.where(hidden, x, limited).to(p_mask.dtype.element_ty)
            tl.store(p_out + i * _SCORES + position, packed)
            seen = tl.max((~hidden).to(tl.int32), 0)
        first = tl.where(seen != 0, tl.minimum(first, i), first)
        stop = tl.where(seen != 0, i + 1, stop)
    p_span += (i_bh * groups + i_group) * 2
    tl.store(p_span, first)
    tl.store(p_span + 1, stop)


def pack_mask(mask: Tensor, q_len: int, k_len: int) -> PackedMask:
    """Bring a mask into the order in which the kernel's lanes hold their scores.

    Args:
        mask: boolean (True: attend) or float, broadcastable to ``[B, H, Lq, Lk]``, any strides.
            float64 and 8-bit floats are packed as float32.

    Returns:
        Additive values keep their type and unit; finite ones are limited to what stays finite in
        log2 units.
    """
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    if mask.dtype == torch.float64:  # whose finite values are infinite in float32
        top = torch.finfo(torch.float32).max
        mask = mask.clamp(-top, top).masked_fill(mask.isneginf(), -torch.inf)
    if mask.dtype not in _KINDS:
        mask = mask.float()
    kind = _KINDS[mask.dtype]
    batch, heads = mask.shape[:2]
    mask = mask.expand(batch, heads, q_len, k_len)
    tiles = cdiv(k_len, 2 * TILE_N) * 2
    groups = cdiv(q_len, Q_BLOCK) * (Q_BLOCK // ROWS)
    size = 32 if kind == "bool" else ROWS * TILE_N * mask.element_size() // 4
    words = torch.empty(batch, heads, groups, tiles, size, dtype=torch.int32, device=mask.device)
    span = torch.empty(batch, heads, groups, 2, dtype=torch.int32, device=mask.device)
    with torch.cuda.device_of(mask):
        start_kernel(
            _pack_kernel,
            (groups * batch * heads,),
            mask.view(torch.uint8) if kind == "bool" else mask,
            words if kind == "bool" else words.view(mask.dtype),
            span,
            heads,
            groups,
            tiles,
            q_len,
            k_len,
            *mask.stride(),
            BOOL=kind == "bool",
            VECTOR=16 // mask.element_size(),
            LIMIT=65504.0 if kind == "fp16" else LIMIT,
            num_warps=4,
        )
    return PackedMask(kind, words, span)
