"""Rows of Q and K as the Triton kernels load them: in float32, and rotated if tables are given."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..formats import MAX_VALUE
from ..rope import Rope

_MAX_VALUE = tl.constexpr(MAX_VALUE)


class Tables(NamedTuple):
    """A rotation as a kernel's functions hand it on."""

    cos: Any  # [B, L, ROPE], or None
    sin: Any
    stride_b: Any
    stride_l: Any
    stride_d: Any


@triton.jit
def load_rows(p_x, o_l, o_d, length, stride_l, stride_d, D: tl.constexpr):
    """Rows as float32 [BLOCK, BLOCK_D], 0 outside, and which elements are inside."""
    inside = (o_l[:, None] < length) & (o_d[None, :] < D)
    offsets = o_l[:, None].to(tl.int64) * stride_l + o_d[None, :].to(tl.int64) * stride_d
    x = tl.load(p_x + offsets, mask=inside, other=0.0).to(tl.float32)
    if p_x.dtype.element_ty != tl.float16:
        x = tl.minimum(tl.maximum(x, -_MAX_VALUE), _MAX_VALUE)
    return x, inside


@triton.jit
def _load_table(p_table, rope, o_l, column, length, ROPE: tl.constexpr):
    inside = (o_l[:, None] < length) & (column[None, :] < ROPE)
    offsets = o_l[:, None].to(tl.int64) * rope.stride_l
    offsets += column[None, :].to(tl.int64) * rope.stride_d
    return tl.load(p_table + offsets, mask=inside, other=0.0)


@triton.jit
def _rotate_neighbours(
    x,  # [BLOCK, COLUMNS]
    p_cos,
    p_sin,
    rope,
    o_l,
    length,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    ROPE: tl.constexpr,
):
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, [ROWS, COLUMNS // 2, 2]))
    if ROPE == D:
        o_d = FIRST + tl.arange(0, COLUMNS)
        cos = _load_table(p_cos, rope, o_l, o_d, length, ROPE)
        sin = _load_table(p_sin, rope, o_l, o_d, length, ROPE)
        cos_a, cos_b = tl.split(tl.reshape(cos, [ROWS, COLUMNS // 2, 2]))
        sin_a, sin_b = tl.split(tl.reshape(sin, [ROWS, COLUMNS // 2, 2]))
    else:
        o_pair = FIRST // 2 + tl.arange(0, COLUMNS // 2)
        cos_a = _load_table(p_cos, rope, o_l, o_pair, length, ROPE)
        sin_a = _load_table(p_sin, rope, o_l, o_pair, length, ROPE)
        cos_b, sin_b = cos_a, sin_a
    return tl.reshape(tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b), [ROWS, COLUMNS])


@triton.jit
def load_rotated_rows(
    p_x,
    o_l,
    length,
    stride_l,
    stride_d,
    i_b,
    rope,  # Tables
    D: tl.constexpr,
    FIRST: tl.constexpr,  # channel, even
    COLUMNS: tl.constexpr,  # how many channels
    ROPE: tl.constexpr,  # columns of the tables, D or D / 2; 0 without
    INTERLEAVED: tl.constexpr,
):
    """:func:`load_rows` of some channels, rotated as :func:`..rope.apply_rope` does.

    Neighbouring channels meet in a thread's registers.  Those D / 2 apart are loaded twice, the
    second time from the cache.
    """
    o_d = FIRST + tl.arange(0, COLUMNS)
    x, inside = load_rows(p_x, o_l, o_d, length, stride_l, stride_d, D)
    if ROPE != 0:
        p_cos = rope.cos + i_b * rope.stride_b
        p_sin = rope.sin + i_b * rope.stride_b
        if INTERLEAVED:
            x = _rotate_neighbours(x, p_cos, p_sin, rope, o_l, length, D, FIRST, ROPE)
        else:
            HALF: tl.constexpr = D // 2
            first = o_d < HALF
            partner = tl.where(first, o_d + HALF, o_d - HALF)
            column = o_d if ROPE == D else tl.where(first, o_d, partner)
            if HALF % 8 == 0:  # eight neighbours stay neighbours: loads of 16 bytes
                partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
                column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
            turned, _ = load_rows(p_x, o_l, partner, length, stride_l, stride_d, D)
            turned = tl.where(first[None, :], -turned, turned)
            cos = _load_table(p_cos, rope, o_l, column, length, ROPE)
            sin = _load_table(p_sin, rope, o_l, column, length, ROPE)
            x = tl.where(inside, x * cos + turned * sin, 0.0)
        x = tl.minimum(tl.maximum(x, -_MAX_VALUE), _MAX_VALUE)
    return x, inside


#: Arguments that hold the tables of :func:`rope_arguments`, as of :class:`Tables`.
TABLES = ("p_cos", "p_sin", "rope_b", "rope_l", "rope_d")


def rope_arguments(rope: Rope | None, x: Tensor) -> dict[str, Any]:
    """What a kernel is handed beside ``x`` ``[B, H, L, D]``; without tables no argument at all."""
    if rope is None:
        return {**dict.fromkeys(TABLES), "ROPE": 0, "INTERLEAVED": False}
    cos, sin = rope.cos, rope.sin
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    shared = cos.ndim == 2 or cos.shape[0] == 1
    return {
        "p_cos": cos,
        "p_sin": sin,
        "rope_b": 0 if shared else cos.stride(0),
        "rope_l": cos.stride(-2),
        "rope_d": cos.stride(-1),
        "ROPE": cos.shape[-1],
        "INTERLEAVED": rope.interleaved,
    }
