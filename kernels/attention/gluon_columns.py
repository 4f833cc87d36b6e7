"""What the Gluon attention kernel reads per key: K's scales, and a bias added to S.

Both are lists in ``quantize.permute.column_order``, two tiles longer than V, so that a thread reads
its 16 columns of a tile 16 bytes at a time and never asks whether they exist.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import LOG2E, Q_BLOCK, TILE_N, QuantizedTensor, cdiv, columns_length, padded_dim
from ..quantize.permute import column_order
from ..quantize.rope import Tables, load_rotated_rows, rope_arguments
from ..rope import Rope
from ..start import start_kernel
from .terms import MASK_FLOOR

_TILE_N, _Q_BLOCK = tl.constexpr(TILE_N), tl.constexpr(Q_BLOCK)
#: What an integer sum of the kernel starts from, as a float (``gluon_asm.MAGIC_BITS``).
_MAGIC = tl.constexpr(-12582912.0)
_LOG2E, _MASK_FLOOR = tl.constexpr(LOG2E), tl.constexpr(MASK_FLOOR)

#: Query blocks of one program of the bias kernel: the m of a tensor-core product.
_BLOCKS = 16
#: Channels of K that it holds at a time: three parts of a float32 tile are in shared memory.
_CHANNELS = tl.constexpr(64)


@triton.jit
def _column(position):
    """Token at a position of a tile's list (``column_order``)."""
    return ((position & 14) << 2) | ((position >> 3) & 6) | (position & 1)


@triton.jit
def _scales_kernel(p_scale, p_out, k_len, groups, tiles, BLOCK: tl.constexpr, FACTOR: tl.constexpr):
    i_tile, i_bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    position = tl.arange(0, _TILE_N)
    o_n = i_tile * _TILE_N + _column(position)
    scale = tl.load(p_scale + i_bh * groups + o_n // BLOCK, mask=o_n < k_len, other=1.0)
    # With two mantissa bits free 1.5 * 2^23 * scale is exact; scores move by 2^-22 of themselves.
    scale = (scale.to(tl.int32, bitcast=True) & -4).to(tl.float32, bitcast=True)
    scale *= FACTOR
    p_out += (i_bh * tiles + i_tile) * (2 * _TILE_N) + position
    tl.store(p_out, scale)
    tl.store(p_out + _TILE_N, scale * -_MAGIC)


def key_scales(k: QuantizedTensor, factor: float = 1.0) -> Tensor:
    """K's scales in column order, 1 outside, and the offsets that take the magic number out.

    Args:
        factor: a power of two or its negative, by which both are multiplied.

    Returns:
        ``[B, Hkv, columns_length(Lk) / 64, 2, 64]`` float32: scales and offsets of every tile.
    """
    batch, heads, k_len = k.data.shape[:3]
    width = columns_length(k_len)
    shape = (batch, heads, width // TILE_N, 2, TILE_N)
    out = torch.empty(shape, dtype=torch.float32, device=k.scale.device)
    with torch.cuda.device_of(k.scale):
        start_kernel(
            _scales_kernel,
            (width // TILE_N * batch * heads,),
            k.scale.contiguous(),
            out,
            k_len,
            k.scale.shape[2],
            width // TILE_N,
            BLOCK=k.block,
            FACTOR=factor,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _bias_kernel(
    p_q_mean,  # [B, H, q_blocks, D], or None
    p_k,
    p_k_mean,  # [B, Hkv, D], or None
    p_mask,  # of the keys: uint8 or float, or None
    p_out,  # [B, H, blocks, columns]
    multiplier,
    heads,
    group,
    k_len,
    tiles,
    q_blocks,
    first_block,
    blocks,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_mn,
    p_cos,  # tables of RoPE, or None
    p_sin,
    rope_b,
    rope_l,
    rope_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 boolean, 2 additive
    BLOCKS: tl.constexpr,
    ROPE: tl.constexpr,  # columns of the tables, 0 without
    INTERLEAVED: tl.constexpr,
):
    i_tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    chunks = tl.cdiv(blocks, BLOCKS)
    i_chunk, i_bh = rest % chunks, (rest // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_bkv = i_b * (heads // group) + i_h // group
    position = tl.arange(0, _TILE_N)
    o_n = i_tile * _TILE_N + _column(position)
    o_m = i_chunk * BLOCKS + tl.arange(0, BLOCKS)
    bias = tl.zeros([BLOCKS, _TILE_N], tl.float32)
    if p_q_mean is not None:
        p_k += i_b * stride_kb + (i_h // group) * stride_kh
        rope = Tables(p_cos, p_sin, rope_b, rope_l, rope_d)
        for first in tl.static_range(0, DP, _CHANNELS):
            o_d = first + tl.arange(0, _CHANNELS)
            k, inside = load_rotated_rows(
                p_k,
                o_n,
                k_len,
                stride_kl,
                stride_kd,
                i_b,
                rope,
                D,
                first,
                _CHANNELS,
                ROPE,
                INTERLEAVED,
            )
            if p_k_mean is not None:
                mean = tl.load(p_k_mean + i_bkv * D + o_d, mask=o_d < D, other=0.0)
                k = tl.where(inside, k - mean[None, :], 0.0)
            at = (i_bh * q_blocks + first_block + o_m[:, None]) * D + o_d[None, :]
            in_q = (o_m[:, None] < blocks) & (o_d[None, :] < D)
            q_mean = tl.load(p_q_mean + at, mask=in_q, other=0.0) * multiplier
            bias = tl.dot(q_mean, tl.trans(k), bias, input_precision="tf32x3")
    if MASK:
        p_mask += i_b * stride_mb + i_h * stride_mh
        seen = tl.load(p_mask + o_n.to(tl.int64) * stride_mn, mask=o_n < k_len, other=0)
        if MASK == 1:
            added = tl.where(seen != 0, 0.0, -float("inf"))
        else:
            seen = seen.to(tl.float32)
            added = tl.minimum(tl.maximum(seen * _LOG2E, _MASK_FLOOR), -_MASK_FLOOR)
            added = tl.where(seen == -float("inf"), seen, added)
        bias += added[None, :]
    at = ((i_bh * blocks + o_m[:, None]) * tiles + i_tile) * _TILE_N + position[None, :]
    tl.store(p_out + at, bias, mask=o_m[:, None] < blocks)


def key_bias(
    heads: int,
    k: Tensor,
    *,
    q_mean: Tensor | None = None,
    k_mean: Tensor | None = None,
    multiplier: float = 1.0,
    mask: Tensor | None = None,
    first_block: int = 0,
    blocks: int = 1,
    rope: Rope | None = None,
) -> Tensor:
    """Delta-S of smoothed Q plus a mask of the keys, for some blocks of 128 query rows.

    Args:
        heads: of Q.
        k: ``[B, Hkv, Lk, D]``, any float dtype and strides.
        q_mean: ``[B, H, ceil(Lq / 128), D]`` float32, or None.
        k_mean: ``[B, Hkv, D]`` float32, or None.
        multiplier: as of :func:`.reference.delta_s`.
        mask: ``[B, H, 1, Lk]`` boolean or float of any strides, or None.
        first_block, blocks: the blocks of Q, in units of 128 rows.
        rope: rotates ``k``.

    Returns:
        ``[B, H, blocks, columns_length(Lk)]`` float32 in column order, log2 units.
    """
    batch, kv_heads, k_len, head_dim = k.shape
    width = columns_length(k_len)
    out = torch.empty(batch, heads, blocks, width, dtype=torch.float32, device=k.device)
    kind, strides = 0, (0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
        strides = (mask.stride(0), mask.stride(1), mask.stride(3))
    tiles, chunks = width // TILE_N, cdiv(blocks, _BLOCKS)
    with torch.cuda.device_of(k):
        start_kernel(
            _bias_kernel,
            (tiles * chunks * batch * heads,),
            None if q_mean is None else q_mean.contiguous(),
            k,
            None if k_mean is None else k_mean.contiguous(),
            mask,
            out,
            multiplier,
            heads,
            heads // kv_heads,
            k_len,
            tiles,
            0 if q_mean is None else q_mean.shape[2],
            first_block,
            blocks,
            *k.stride(),
            *strides,
            **rope_arguments(rope, k),
            D=head_dim,
            DP=padded_dim(head_dim),
            MASK=kind,
            BLOCKS=_BLOCKS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def as_columns(x: Tensor) -> Tensor:
    """``[.., Lk]`` float32 in token order -> ``[.., columns_length(Lk)]`` in column order."""
    k_len = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, columns_length(k_len) - k_len))
    order = column_order().to(x.device)
    return padded.unflatten(-1, (-1, TILE_N))[..., order].flatten(-2)
