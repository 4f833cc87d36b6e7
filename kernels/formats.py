"""Number formats, packing, and the containers that carry quantized tensors.

Numerics contract (shared by every kernel and its twin):

* integer codes are symmetric: INT8 in [-127, 127], INT4 in [-7, 7];
* rounding is to nearest, ties to even, everywhere;
* ``scale`` is always the *dequantization* scale (``x ~= data * scale``), float32, and a group of
  zeros has scale 1;
* an INT4 or FP4 byte holds two codes, the lower index in the low nibble;
* quantized Q and K have their head dim padded with zeros to 64, 128 or 256 (``padded_dim``).
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)

#: Keys per step of the online softmax.  Part of the numerics, not of the tuning: an FP16
#: accumulator lives inside one tile, and an INT8 P has one scale per row and tile.
TILE_N = 64

#: Query rows that share one mean when Q is smoothed (SageAttention2, 2411.10958 section 3.1).
Q_BLOCK = 128

#: Tokens per scale of Q and of K where a spec asks for one scale per block.
Q_SCALE_BLOCK, K_SCALE_BLOCK = 128, 64

#: Values that share one E4M3 scale in NVFP4.
FP4_GROUP = 16

#: Largest dequantization scale of a row of Q or K.  |S| then stays below 1e31, so that finite
#: inputs can't overflow float32; rows this large are one-hot after the softmax anyway.
MAX_SCALE = 1e12

#: Smallest softmax scale times log2(e): the kernels multiply the tile's maximum, which may be -inf,
#: by it and a row's scale, so their product must stay positive for a scale of 0 and for
#: :data:`MIN_SCALE`.
MIN_MULTIPLIER = 1e-14

#: Values are clamped to this before they are smoothed or rotated, so that their sums and products
#: stay finite.  Nothing is lost: :data:`MAX_SCALE` saturates INT8 Q and K at 1.27e14.
MAX_VALUE = 1e15

#: Smaller dequantization scales become 1: the group is zero for every purpose, and the inverse of
#: a denormal scale would not be finite.
MIN_SCALE = 1e-30


class Precision(str, Enum):
    """A number format of an attention operand."""

    FP16 = "fp16"  # "the model's own half type", fp16 or bf16
    FP8 = "fp8"  # float8_e4m3fn
    INT8 = "int8"
    INT4 = "int4"
    FP4 = "fp4"  # NVFP4: e2m1 with one E4M3 scale per 16 values and one float32 scale per row

    __str__ = str.__str__

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return {"fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "fp4": 4}[self.value]

    @property
    def qmax(self) -> float:
        """Largest magnitude that the format represents (65504 for fp16)."""
        return {"fp16": 65504.0, "fp8": 448.0, "int8": 127.0, "int4": 7.0, "fp4": 6.0}[self.value]


class QuantizedTensor(NamedTuple):
    """Q or K, quantized along the head dim: ``x ~= data * scale``.

    Attributes:
        data: ``[B, H, L, Dp]`` int8 or float8_e4m3fn, or ``[B, H, L, Dp / 2]`` uint8 (two 4-bit
            codes a byte).  Dp is :func:`padded_dim` of the head dim.
        scale: ``[B, H, ceil(L / block)]`` float32.
        precision: the format of ``data``.
        block: tokens per scale; it travels with the data, so kernels cannot disagree with it.
        micro: FP4 only, ``[B, H, L, Dp / 16]`` float8_e4m3fn, the scales of 16 neighbouring values.
        columns: K's scales as its attention kernel reads them, if it does
            (``attention.gluon_columns.key_scales``).
    """

    data: Tensor
    scale: Tensor
    precision: Precision
    block: int
    micro: Tensor | None = None
    columns: Tensor | None = None


class QuantizedValue(NamedTuple):
    """V per channel and transposed: ``v[l, d] ~= data[d, l] * scale[d] + mean[d]``.

    An INT8 V may have scales of its own for every 64 tokens, ``scale[l // 64, d]``.

    Attributes:
        data: ``[B, H, D, Lp]`` int8 or float8_e4m3fn, or ``[B, H, D, Lp / 2]`` uint8 for FP4; Lp is
            L rounded up to a multiple of 64, the padding is zero.
        scale: ``[B, H, D]`` float32.  Of 64 tokens each: ``[B, H, Lp / 64, D]`` float32 whose last
            16 bits are 0 (``quantize.permute.permute_scales`` for the kernels that permute V).
        precision: the format of ``data``.
        length: L, the tokens that are not padding.
        mean: ``[B, H, D]`` float32 that was subtracted from V (smooth_v), or None.
        micro: FP4 only, ``[B, H, D, Lp / 16]`` float8_e4m3fn, the scales of 16 tokens
            (``quantize.permute.group_tokens``).
        sums: ``[B, H, Lp / 64, D]`` int16, the sums of every 64 tokens' INT8 codes, or None: what
            an unsigned P costs where products take signed codes only.
        tiles: ``[B, H, Lp / 64 + 2, 2]`` float32, or None: a factor of every 64 tokens beside the
            channels' scales, and its inverse.  The last two are 1 and of nothing: kernels that take
            tiles by twos may read them.
    """

    data: Tensor
    scale: Tensor
    precision: Precision
    length: int
    mean: Tensor | None = None
    micro: Tensor | None = None
    sums: Tensor | None = None
    tiles: Tensor | None = None

    @property
    def tile_scales(self) -> bool:
        """Whether every 64 tokens have scales of their own."""
        return self.scale.ndim == 4


class Sample(NamedTuple):
    """What is taken out of K and V, and what balances Q's and K's channels.

    Attributes:
        k_mean, v_mean: ``[B, Hkv, D]`` float32 over the tokens, or over one of sixteen; None where
            nothing is taken out.
        q_factor, k_factor: ``[B, Hkv, D]`` float32, by which Q's and K's channels are multiplied:
            powers of two, inverses of each other, so that Q K^T is what it was.  None: not at all.
        v_scale: ``[B, Hkv, D]`` float32, of V's channels, or None.
        v_extremes: ``[2, B, Hkv, parts, D]`` float32, minima and maxima of V's channels over parts
            of all of its tokens, or None.
    """

    k_mean: Tensor | None
    v_mean: Tensor | None
    q_factor: Tensor | None = None
    k_factor: Tensor | None = None
    v_scale: Tensor | None = None
    v_extremes: Tensor | None = None


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``; ``triton.cdiv``, which kernels call as well, takes a host microseconds."""
    return -(-a // b)


def padded_dim(head_dim: int) -> int:
    """Columns of a quantized Q or K: 64, 128 or 256.

    Raises:
        ValueError: head_dim is outside 1 .. 256.
    """
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim must be between 1 and 256, got {head_dim}")
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def padded_length(length: int) -> int:
    """Tokens of a transposed 8-bit V: a multiple of 64, so that rows start aligned."""
    return -(-length // TILE_N) * TILE_N


def columns_length(k_len: int) -> int:
    """Length of a list of columns: the kernel may read the tile after the last pair of tiles."""
    return padded_length(k_len) + 2 * TILE_N


def pack_nibbles(codes: Tensor) -> Tensor:
    """Integer codes ``[..., N]`` (N even, only the low 4 bits count) -> uint8 ``[..., N / 2]``."""
    low, high = codes[..., 0::2].to(torch.int32) & 15, codes[..., 1::2].to(torch.int32) & 15
    return (low | (high << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 ``[..., N / 2]`` -> int8 ``[..., N]`` in [-8, 7]."""
    low, high = packed & 15, packed >> 4
    codes = torch.stack([low, high], -1).flatten(-2).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)


#: Magnitudes of the eight E2M1 codes (OCP Microscaling Formats v1.0, table 5).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_fp4(x: Tensor) -> Tensor:
    """float32 -> E2M1 codes 0 .. 15 (uint8), to nearest, ties to even, saturating at 6."""
    magnitude = x.abs()
    # Midpoints between neighbours; a tie goes to the even code, so `>` and `>=` alternate.
    midpoints = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    code = torch.zeros_like(x, dtype=torch.uint8)
    for i, mid in enumerate(midpoints):
        code += (magnitude >= mid) if i % 2 else (magnitude > mid)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_fp4(codes: Tensor) -> Tensor:
    """E2M1 codes 0 .. 15 -> float32."""
    table = torch.tensor(FP4_VALUES + tuple(-v for v in FP4_VALUES), device=codes.device)
    return table[codes.long()]


def unpack_fp4(packed: Tensor) -> Tensor:
    """uint8 ``[..., N / 2]`` -> float32 ``[..., N]``."""
    return decode_fp4(torch.stack([packed & 15, packed >> 4], -1).flatten(-2))
