"""Packing, unpacking, merging, and a decode kernel for every card that Triton compiles for.

``.gluon`` is the fast decode kernel, for NVIDIA cards.  This one unpacks by a gather: each channel
reads its word from the cache and shifts it.  It also takes keys that were stored before RoPE:
R_j = R_tile R_offset, so q is turned back by a tile's position once for all its tokens, and a key
forward by its offset within the tile, whose cosines and sines are the same for all tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import tuning as cards
from ..formats import LOG2E
from ..vq.tuning import processors
from .layout import BLOCK, Width, bits, planes, row_words
from .quantize import decode as decode_steps
from .sides import Side, Turn, expanded, of_heads
from .tuning import portable_tile, portable_warps, splits, tiles

_LOG2E = tl.constexpr(LOG2E)

#: Tokens of a program of packing or unpacking.
_ROWS = 16


@triton.jit
def _slot(s, SLOTS: tl.constexpr):
    """Channel of the low half of a slot."""
    return s % SLOTS * 16 + s // SLOTS * 2


@triton.jit
def _place(c, P: tl.constexpr, SLOTS: tl.constexpr):
    """Word and shift of a channel in a plane."""
    s = c % 16 // 2 * SLOTS + c // 16
    if P == 1:
        word, shift = s // 16, s % 8 * 2 + s // 8 % 2
    else:
        word, shift = s // (16 // P), s % (16 // P) * P
    return word, shift + c % 2 * 16


@triton.jit
def _pack_kernel(
    p_codes,  # [N, D] uint8
    p_words,  # [N, W] int32
    rows,
    dim,
    P: tl.constexpr,
    LOW: tl.constexpr,  # lowest bit of the plane
    FIRST: tl.constexpr,  # word of the plane in a row
    W: tl.constexpr,
    COUNT: tl.constexpr,  # words of the plane in a row
    SLOTS: tl.constexpr,  # D / 16, D rounded up to a multiple of 32
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_w = tl.arange(0, COLUMNS)
    inside = (o_n < rows)[:, None] & (o_w < COUNT)[None, :]
    word = tl.zeros((BLOCK, COLUMNS), tl.int32)
    for i in tl.static_range(16 // P):
        s = (2 * o_w + i % 2) * 8 + i // 2 if P == 1 else o_w * (16 // P) + i
        for h in tl.static_range(2):
            c = _slot(s, SLOTS) + h
            at = p_codes + o_n[:, None] * dim + c[None, :]
            code = tl.load(at, mask=inside & (c < dim)[None, :], other=0).to(tl.int32)
            word |= ((code >> LOW) & ((1 << P) - 1)) << (P * i + 16 * h)
    tl.store(p_words + o_n[:, None] * W + (FIRST + o_w)[None, :], word, mask=inside)


@triton.jit
def _codes(
    p, token, c, seen, P: tl.constexpr, Q: tl.constexpr, ROW: tl.constexpr, SLOTS: tl.constexpr
):
    """Codes of tokens and channels, which broadcast against each other; Q: the second plane."""
    word, shift = _place(c, P, SLOTS)
    code = (tl.load(p + (token * ROW + word), mask=seen, other=0) >> shift) & ((1 << P) - 1)
    if Q > 0:
        word, shift = _place(c, Q, SLOTS)
        more = tl.load(p + (token * ROW + word + 2 * SLOTS * P // 4), mask=seen, other=0)
        code |= ((more >> shift) & ((1 << Q) - 1)) << P
    return code


@triton.jit
def _unpack_kernel(
    p_words,  # [N, W] int32
    p_codes,  # [N, D] uint8
    rows,
    dim,
    P: tl.constexpr,
    Q: tl.constexpr,
    W: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    o_c = tl.arange(0, COLUMNS)[None, :]
    inside = (o_n < rows) & (o_c < dim)
    code = _codes(p_words, o_n, o_c, inside, P, Q, W, SLOTS)
    tl.store(p_codes + o_n * dim + o_c, code.to(tl.uint8), mask=inside)


def pack(codes: Tensor, width: Width) -> Tensor:
    """As :func:`.layout.pack_checked`, bit for bit."""
    codes = codes.contiguous()
    dim, count = codes.shape[-1], row_words(codes.shape[-1], width)
    words = torch.empty(*codes.shape[:-1], count, dtype=torch.int32, device=codes.device)
    rows = words.numel() // max(1, count)
    blocks = -(-dim // BLOCK)
    first = low = 0
    with torch.cuda.device_of(codes):
        for p in planes(width) if rows else ():
            _pack_kernel[(triton.cdiv(rows, _ROWS),)](
                codes,
                words,
                rows,
                dim,
                P=p,
                LOW=low,
                FIRST=first,
                W=count,
                COUNT=blocks * p,
                SLOTS=2 * blocks,
                BLOCK=_ROWS,
                COLUMNS=triton.next_power_of_2(blocks * p),
            )
            first, low = first + blocks * p, low + p
    return words


def unpack(words: Tensor, width: Width, dim: int) -> Tensor:
    """As :func:`.layout.unpack`, bit for bit."""
    words = words.contiguous()
    codes = torch.empty(*words.shape[:-1], dim, dtype=torch.uint8, device=words.device)
    rows = codes.numel() // dim
    low, high = (*planes(width), 0)[:2]
    with torch.cuda.device_of(words):
        if rows:
            _unpack_kernel[(triton.cdiv(rows, _ROWS),)](
                words,
                codes,
                rows,
                dim,
                P=low,
                Q=high,
                W=words.shape[-1],
                SLOTS=2 * -(-dim // BLOCK),
                BLOCK=_ROWS,
                COLUMNS=triton.next_power_of_2(dim),
            )
    return codes


@triton.jit
def _keys(
    p_k, p_step, p_zero, at_step, token, c, first, kept, P: tl.constexpr, Q: tl.constexpr,
    ROW: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Keys [channels, tokens] of one half of the channels, from ``first`` on."""
    code = _codes(p_k, token[None, :], (c + first)[:, None], kept, P, Q, ROW, SLOTS)
    inside = kept.to(tl.int1)
    step = tl.load(p_step + (at_step + first)[:, None], mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(p_zero + (at_step + first)[:, None], mask=inside, other=0.0).to(tl.float32)
    return code.to(tl.float32) * step + zero


@triton.jit
def _decode_kernel(
    p_q,  # [B, H, rows, D]; with ROPE [splits, ..], each turned back by its first tile's position
    p_turn,  # [TILE + 1, D / 2, 2] float32: cosine and sine of offsets 0 .. TILE - 1, of a tile
    p_k,  # [B, H, >= tokens, D * bits / 32] int32
    p_k_step,  # [B, H, groups, D] float16
    p_k_zero,
    p_v,
    p_v_step,  # [B, H, >= tokens, GAINS] float16
    p_v_zero,
    p_mask,  # [B, heads of Q, queries, tokens], by strides, or None
    p_out,  # [splits, B, H, rows, D] float32
    p_lse,  # [splits, B, H, rows] float32, log2 units
    scale,  # times log2(e)
    heads,
    rows,
    queries,
    tokens,
    tiles,
    span,  # tiles of a split
    stride_k,  # of a head
    stride_k_step,
    stride_v,
    stride_v_step,
    stride_mask_b,
    stride_mask_h,
    stride_mask_q,
    stride_mask_t,
    D: tl.constexpr,
    DP: tl.constexpr,  # a power of two
    SLOTS: tl.constexpr,
    K0: tl.constexpr,  # bits of the planes
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GAINS: tl.constexpr,
    ROWS: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool" or "additive"
    ROPE: tl.constexpr,
):
    i_s, i_bh, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // heads, i_bh % heads
    head = i_bh.to(tl.int64)
    p_k += head * stride_k
    p_v += head * stride_v
    p_k_step += head * stride_k_step
    p_k_zero += head * stride_k_step
    p_v_step += head * stride_v_step
    p_v_zero += head * stride_v_step
    o_m, o_d, o_t = i_r * ROWS + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, TILE)
    at = (head * rows + o_m[:, None]) * D + o_d[None, :]
    real = (o_m < rows)[:, None] & (o_d < D)[None, :]
    HALF: tl.constexpr = D // 2
    o_h = tl.arange(0, DP // 2)
    if ROPE:
        p_q += i_s.to(tl.int64) * tl.num_programs(1) * rows * D
        at_h = (head * rows + o_m[:, None]) * D + o_h[None, :]
        real_h = (o_m < rows)[:, None] & (o_h < HALF)[None, :]
        q_a = tl.load(p_q + at_h, mask=real_h, other=0.0) * scale
        q_b = tl.load(p_q + at_h + HALF, mask=real_h, other=0.0) * scale
        at_turn = p_turn + (o_t[None, :] * HALF + o_h[:, None]) * 2
        cos = tl.load(at_turn, mask=(o_h < HALF)[:, None], other=0.0)
        sin = tl.load(at_turn + 1, mask=(o_h < HALF)[:, None], other=0.0)
        at_turn = p_turn + (TILE * HALF + o_h) * 2
        tile_cos = tl.load(at_turn, mask=o_h < HALF, other=0.0)
        tile_sin = tl.load(at_turn + 1, mask=o_h < HALF, other=0.0)
    else:
        q = tl.load(p_q + at, mask=real, other=0.0).to(tl.float32) * scale
    i_q = i_h * (rows // queries) + o_m // queries
    if MASK != "none":
        p_mask += i_b.to(tl.int64) * stride_mask_b
        masked = i_q.to(tl.int64) * stride_mask_h + (o_m % queries) * stride_mask_q
    acc = tl.zeros((ROWS, DP), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -1.0e30, tl.float32)
    PER: tl.constexpr = (GROUP + TILE - 1) // TILE
    for tile in range(i_s * span, tl.minimum(i_s * span + span, tiles)):
        group = tile // PER
        first = tile % PER * TILE
        token = (group.to(tl.int64) * GROUP + first) + o_t
        seen = (first + o_t < GROUP) & (token < tokens)
        if ROPE:
            at_step = group.to(tl.int64) * D + o_h
            kept = seen[None, :] & (o_h < HALF)[:, None]
            k_a = _keys(p_k, p_k_step, p_k_zero, at_step, token, o_h, 0, kept, K0, K1, K_ROW, SLOTS)
            k_b = _keys(
                p_k, p_k_step, p_k_zero, at_step, token, o_h, HALF, kept, K0, K1, K_ROW, SLOTS
            )
            s = tl.dot(q_a.to(tl.float16), (k_a * cos - k_b * sin).to(tl.float16))
            s = tl.dot(q_b.to(tl.float16), (k_b * cos + k_a * sin).to(tl.float16), s)
            back = q_a * tile_cos[None, :] + q_b * tile_sin[None, :]
            q_b = q_b * tile_cos[None, :] - q_a * tile_sin[None, :]
            q_a = back
        else:
            at_step = group.to(tl.int64) * D + o_d
            step = tl.load(p_k_step + at_step, mask=o_d < D, other=0.0).to(tl.float32)
            low = tl.load(p_k_zero + at_step, mask=o_d < D, other=0.0).to(tl.float32)
            kept = seen[None, :] & (o_d < D)[:, None]
            k = _codes(p_k, token[None, :], o_d[:, None], kept, K0, K1, K_ROW, SLOTS)
            s = tl.dot((q * step[None, :]).to(tl.float16), k.to(tl.float16))
            s += tl.sum(q * low[None, :], 1)[:, None]
        if MASK == "bool":
            at_mask = p_mask + masked[:, None] + (token * stride_mask_t)[None, :]
            shown = (o_m < rows)[:, None] & seen[None, :]
            shown = tl.load(at_mask, mask=shown, other=0) != 0
            s = tl.where(shown, s, float("-inf"))
        else:
            if MASK == "additive":
                at_mask = p_mask + masked[:, None] + (token * stride_mask_t)[None, :]
                shown = (o_m < rows)[:, None] & seen[None, :]
                s += tl.load(at_mask, mask=shown, other=0.0).to(tl.float32) * _LOG2E
            s = tl.where(seen[None, :], s, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - highest[:, None])
        shrink = tl.exp2(top - highest)
        norm = norm * shrink + tl.sum(p, 1)
        kept = seen[:, None] & (o_d < D)[None, :]
        v = _codes(p_v, token[:, None], o_d[None, :], kept, V0, V1, V_ROW, SLOTS).to(tl.float32)
        at_gain = (token * GAINS)[:, None] + (o_d // (D // GAINS))[None, :]
        gain = tl.load(p_v_step + at_gain, mask=kept, other=0.0).to(tl.float32)
        v = v * gain + tl.load(p_v_zero + at_gain, mask=kept, other=0.0).to(tl.float32)
        acc = tl.dot(p.to(tl.float16), v.to(tl.float16), acc * shrink[:, None])
        top = highest
    lse = tl.where(norm > 0.0, top + tl.log2(norm), float("-inf"))
    acc = acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
    place = (i_s * tl.num_programs(1) + i_bh).to(tl.int64) * rows + o_m
    tl.store(p_out + place[:, None] * D + o_d[None, :], acc, mask=real)
    tl.store(p_lse + place, lse, mask=o_m < rows)


def decode(
    q: Tensor,
    k: Side,
    v: Side,
    scale: float,
    mask: Tensor | None = None,
    turn: Turn | None = None,
    *,
    split: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`.gluon.decode`, for any D up to 256 and any number of groups of a token.

    Args:
        turn: RoPE of k, which was stored before it; see :func:`.tuning.refuse_turn`.
    """
    batch, q_heads, queries, dim = q.shape
    heads = k.words.shape[1]
    rows = q_heads // heads * queries
    block = max(16, min(64, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block)
    tile = portable_tile(cards.architecture(q.device))
    count = tiles(k.tokens, k.group, tile)
    split = split or splits(count, batch * heads * blocks, processors(q.device), 1)
    span = triton.cdiv(count, split)
    split = triton.cdiv(count, span)
    out = torch.empty(split, batch, q_heads, queries, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(split, batch, q_heads, queries, dtype=torch.float32, device=q.device)
    mask, kind, strides = expanded(mask, (batch, q_heads, queries, k.tokens))
    k_words, v_words = of_heads(k.words), of_heads(v.words)
    k_step, k_zero, v_step, v_zero = (
        x.half().contiguous()
        for side in (k, v)
        for x in decode_steps(side.step, side.zero, side.width)
    )
    k_planes, v_planes = ((*planes(side.width), 0)[:2] for side in (k, v))
    offsets = None
    if turn is not None:
        apart = min(k.group, tile)  # tokens from tile to tile
        starts = torch.arange(split, device=q.device) * (span * apart)
        q, offsets = turn.queries(q, starts), _offsets(turn, tile, apart)
    with torch.cuda.device_of(q):
        _decode_kernel[(split, batch * heads, blocks)](
            q.contiguous(),
            offsets,
            k_words,
            k_step,
            k_zero,
            v_words,
            v_step,
            v_zero,
            mask,
            out,
            lse,
            scale * LOG2E,
            heads,
            rows,
            queries,
            k.tokens,
            count,
            span,
            k_words.stride(1),
            k_step.stride(1),
            v_words.stride(1),
            v_step.stride(1),
            *strides,
            D=dim,
            DP=max(16, triton.next_power_of_2(dim)),
            SLOTS=2 * -(-dim // BLOCK),
            K0=k_planes[0],
            K1=k_planes[1],
            V0=v_planes[0],
            V1=v_planes[1],
            K_ROW=-(-dim // BLOCK) * bits(k.width),
            V_ROW=-(-dim // BLOCK) * bits(v.width),
            TILE=tile,
            GROUP=k.group,
            GAINS=dim // v.group,
            ROWS=block,
            MASK=kind,
            ROPE=turn is not None,
            num_warps=portable_warps(cards.architecture(q.device), turn is not None),
            num_stages=1,
        )
    return out, lse


def _offsets(turn: Turn, tile: int, apart: int) -> Tensor:
    """``[tile + 1, D / 2, 2]`` float32: of tokens 0 .. tile - 1, then of the next tile's first."""
    at = torch.arange(tile + 1, device=turn.angles.device)
    at[tile] = apart
    angle = at[:, None] * turn.angles
    return torch.stack((angle.cos(), angle.sin()), -1).float()


@triton.jit
def _merge_kernel(
    p_parts,  # [S, N, D] float32
    p_parts_lse,  # [S, N] float32, log2 units
    p_out,  # [N, D]
    p_lse,  # [N] float32, natural
    splits,
    rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,  # splits, a power of two
):
    i_n = tl.program_id(0).to(tl.int64)
    o_s, o_d = tl.arange(0, S), tl.arange(0, DP)
    lse = tl.load(p_parts_lse + o_s * rows + i_n, mask=o_s < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - base), 0)
    acc = tl.zeros((DP,), tl.float32)
    for i in range(splits):
        weight = tl.exp2(tl.load(p_parts_lse + i * rows + i_n) - base)
        acc += weight * tl.load(p_parts + i_n * D + o_d, mask=o_d < D, other=0.0)
        p_parts += rows * D
    acc = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(p_out + i_n * D + o_d, acc, mask=o_d < D)
    lse = tl.where(total > 0.0, (base + tl.log2(total)) / _LOG2E, float("-inf"))
    tl.store(p_lse + i_n, lse)


def merge(parts: Tensor, parts_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Splits of :func:`decode` to its result.

    Args:
        parts, parts_lse: ``[S, B, Hq, L, D]`` and ``[S, B, Hq, L]``, base 2.

    Returns:
        ``[B, Hq, L, D]`` and the natural log-sum-exp ``[B, Hq, L]``, float32.
    """
    count, dim = parts.shape[0], parts.shape[-1]
    out, lse = torch.empty_like(parts[0]), torch.empty_like(parts_lse[0])
    with torch.cuda.device_of(parts):
        _merge_kernel[(lse.numel(),)](
            parts,
            parts_lse,
            out,
            lse,
            count,
            lse.numel(),
            D=dim,
            DP=triton.next_power_of_2(dim),
            S=triton.next_power_of_2(count),
            num_warps=1 if dim <= 128 else 2,
        )
    return out, lse
