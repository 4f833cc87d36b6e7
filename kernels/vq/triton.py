"""Nearest code on a GPU; the score of a code is an accumulator plus a bias, and is never stored.

A picture has few latents and many codes, so the codes are split over programs as keys are in
flash-decoding.  An id beside every maximum would cost more than the tensor cores' product at small
dims: the main loop keeps the number of the best *tile* per latent, and a second kernel joins the
splits and looks for the id in one tile, in float32.  Comparisons are strict and go upwards, so the
lowest of equal codes wins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import tuning as cards
from ..formats import cdiv
from ..start import start_kernel
from ..versions import fence_copies
from .terms import Terms
from .tuning import Launch, launch, padded_dim, precision, processors, splits

__all__ = ["nearest_code"]


@triton.jit
def _tile_maxima_kernel(
    p_z,  # [N, D]
    p_c,  # [K, D]
    p_scale,  # [K], or None
    p_bias,  # [K]
    p_value,  # [S, N] float32: the best score of a split
    p_tile,  # [S, N] int32: first code of the tile that has it
    latents,
    codes,
    span,  # codes of a split, a multiple of BLOCK_K
    stride_z,
    stride_c,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,  # of a product of float32, as tl.dot names it
):
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n = o_n < latents
    p_z += o_n.to(tl.int64)[:, None] * stride_z + o_d[None, :]
    if D <= BLOCK_D:
        b_z = tl.load(p_z, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    tile = tl.zeros((BLOCK_N,), tl.int32)
    first = i_s * span
    for start in range(first, tl.minimum(first + span, codes), BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < codes
        rows = p_c + o_k.to(tl.int64)[None, :] * stride_c + o_d[:, None]
        if D <= BLOCK_D:
            b_c = tl.load(rows, mask=m_k[None, :] & (o_d < D)[:, None], other=0.0)
            fence_copies()
            score = tl.dot(b_z, b_c, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
        else:
            score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for d in range(0, D, BLOCK_D):
                m_d = d + o_d < D
                b_z = tl.load(p_z + d, mask=m_n[:, None] & m_d[None, :], other=0.0)
                b_c = tl.load(rows + d, mask=m_k[None, :] & m_d[:, None], other=0.0)
                fence_copies()
                score = tl.dot(b_z, b_c, score, input_precision=PRECISION)
        if p_scale is not None:
            score *= tl.load(p_scale + o_k, mask=m_k, other=0.0)[None, :]
        score += tl.load(p_bias + o_k, mask=m_k, other=float("-inf"))[None, :]
        maximum = tl.max(score, 1)
        better = maximum > best
        best = tl.where(better, maximum, best)
        tile = tl.where(better, start, tile)
    at = i_s.to(tl.int64) * latents + o_n
    tl.store(p_value + at, best, mask=m_n)
    tl.store(p_tile + at, tile, mask=m_n)


@triton.jit
def _best_in_tile(
    p_z,
    p_c,
    p_scale,
    p_bias,
    start,
    codes,
    stride_c,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best score of one latent in a tile, in float32, and the code that has it."""
    o_k, o_d = start + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_k = o_k < codes
    rows = p_c + o_k.to(tl.int64)[:, None] * stride_c + o_d[None, :]
    score = tl.zeros((BLOCK_K,), tl.float32)
    for d in range(0, D, BLOCK_D):
        m_d = d + o_d < D
        b_z = tl.load(p_z + d + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_c = tl.load(rows + d, mask=m_k[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        score += tl.sum(b_c * b_z[None, :], 1)
    if p_scale is not None:
        score *= tl.load(p_scale + o_k, mask=m_k, other=0.0)
    score += tl.load(p_bias + o_k, mask=m_k, other=float("-inf"))
    return tl.max(score, 0), start + tl.argmax(score, 0, tie_break_left=True)


@triton.jit
def _find_code_kernel(
    p_z,  # [N, D]
    p_c,
    p_scale,
    p_bias,
    p_value,  # [S, N]
    p_tile,
    p_out,  # [N] int64
    latents,
    codes,
    splits,
    stride_z,
    stride_c,
    D: tl.constexpr,
    S: tl.constexpr,  # splits, padded to a power of two
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDED: tl.constexpr,  # tiles were chosen with rounded operands: look into every split's
):
    i_n = tl.program_id(0).to(tl.int64)
    p_z += i_n * stride_z
    p_value += i_n
    p_tile += i_n
    if ROUNDED:
        best, code = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.int32)
        for _ in range(splits):
            start = tl.load(p_tile)
            p_tile += latents
            value, found = _best_in_tile(
                p_z, p_c, p_scale, p_bias, start, codes, stride_c, D, BLOCK_K, BLOCK_D
            )
            code = tl.where(value > best, found, code)
            best = tl.maximum(value, best)
    else:
        o_s = tl.arange(0, S)
        at = o_s.to(tl.int64) * latents
        value = tl.load(p_value + at, mask=o_s < splits, other=float("-inf"))
        i_s = tl.argmax(value, 0, tie_break_left=True)
        start = tl.load(p_tile + i_s.to(tl.int64) * latents)
        _, code = _best_in_tile(
            p_z, p_c, p_scale, p_bias, start, codes, stride_c, D, BLOCK_K, BLOCK_D
        )
    tl.store(p_out + i_n, code.to(tl.int64))


def nearest_code(
    z: Tensor,
    table: Tensor,
    terms: Terms,
    *,
    rounded: bool = False,
    config: Launch | None = None,
    split: int | None = None,
) -> Tensor:
    """As :func:`.reference.nearest_code`.

    Args:
        z: ``[N, D]``, N at least 1; where its type is not the table's, both are read as float32.
        table: ``[K, D]``.
        terms: scale and bias of the codes.
        rounded: score tiles in BF16 on the tensor cores, then score each split's best tile exactly.
        config, split: instead of the built-in choice.
    """
    if z.dtype != table.dtype or z.dtype == torch.float64:
        z, table = z.float(), table.float()
    z, table = (x if x.stride(1) == 1 else x.contiguous() for x in (z, table))
    left, right = (z.bfloat16(), table.bfloat16()) if rounded else (z, table)
    (latents, dim), codes = z.shape, len(table)
    arch = cards.architecture(z.device)
    config = config or launch(arch, left.dtype)
    width = min(padded_dim(dim), config.block_d)
    split = split or splits(latents, codes, processors(z.device), config)
    span = cdiv(cdiv(codes, split), config.block_k) * config.block_k
    split = cdiv(codes, span)
    bias = terms.bias
    if bias is None:
        bias = torch.zeros(codes, dtype=torch.float32, device=z.device)
    value = torch.empty(split, latents, dtype=torch.float32, device=z.device)
    tile = torch.empty(split, latents, dtype=torch.int32, device=z.device)
    ids = torch.empty(latents, dtype=torch.int64, device=z.device)
    with torch.cuda.device_of(z):
        start_kernel(
            _tile_maxima_kernel,
            (cdiv(latents, config.block_n), split),
            left,
            right,
            terms.scale,
            bias,
            value,
            tile,
            latents,
            codes,
            span,
            left.stride(0),
            right.stride(0),
            D=dim,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_D=width,
            PRECISION=precision(arch),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        start_kernel(
            _find_code_kernel,
            (latents,),
            z,
            table,
            terms.scale,
            bias,
            value,
            tile,
            ids,
            latents,
            codes,
            split,
            z.stride(0),
            table.stride(0),
            D=dim,
            S=triton.next_power_of_2(split),
            BLOCK_K=config.block_k,
            BLOCK_D=min(width, 64),
            ROUNDED=rounded,
            num_warps=4,
        )
    return ids
