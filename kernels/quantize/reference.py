"""The quantizers in Torch: smoothing, signed Hadamard rotation, clipping, scaling, packing.

Every function here is the twin of a kernel and bit-exact with it: the same float32 operations in
the same order wherever order matters.  None of them changes its input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import (
    FP4_GROUP,
    MAX_SCALE,
    MIN_SCALE,
    Q_BLOCK,
    TILE_N,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    Sample,
    decode_fp4,
    encode_fp4,
    pack_nibbles,
    padded_dim,
    padded_length,
    unpack_fp4,
    unpack_int4,
)
from ..spec import AttentionSpec
from .limits import (
    CLIP_CANDIDATES,
    CLIP_LIMIT,
    CLIP_RESOLUTION,
    FP4_MAX,
    FP8_FAST_VALUE_MAX,
    FP8_MAX,
    FP8_TINY,
    LARGEST_SHIFT,
    LARGEST_TILE,
    SAMPLE_BLOCK,
    SMALLEST_POWER,
    SMALLEST_TILE,
    V_SMALLEST_SHARE,
    code_top,
    finite,
    sample_block,
    sampled_top,
)
from .permute import group_tokens, ungroup_tokens


def token_mean(x: Tensor) -> Tensor:
    """Mean over the tokens of ``[B, H, L, D]`` -> ``[B, H, D]`` float32."""
    return finite(x).mean(2)


def block_mean(x: Tensor, block: int) -> Tensor:
    """Means of ``block`` tokens of ``[B, H, L, D]`` -> ``[B, H, ceil(L / block), D]`` float32."""
    length = x.shape[2]
    blocks = -(-length // block)
    padded = F.pad(finite(x), (0, 0, 0, blocks * block - length))
    sums = padded.unflatten(2, (blocks, block)).sum(3)
    counts = torch.full((blocks,), float(block), device=x.device)
    counts[-1] = length - (blocks - 1) * block
    return sums / counts[:, None]


def sampled_tokens(length: int, device: torch.device) -> Tensor:
    """One token of every 16 (:func:`..limits.sample_block`), at offsets of the golden ratio.

    A plain stride would meet the same column of every row of a picture.

    Returns:
        ``[ceil(length / 16)]`` int64.
    """
    block = sample_block(length)
    i = torch.arange(-(-length // block), device=device)
    offset = ((i * 0x9E3779B1 & 0xFFFFFFFF) >> 28) * block // SAMPLE_BLOCK
    return (i * block + offset).clamp(max=length - 1)


def sample(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Sample:
    """Means of K and V, V's scales, and what balances Q's and K's channels, from some tokens.

    A scale per row wastes bits where few channels are large.  Channel c of K is divided by s_c and
    Q's multiplied, which leaves Q K^T as it is: s_c is the root of the ratio of their root mean
    squares (as SmoothQuant, 2211.10438, migrates between activations and weights), relative to
    the head's geometric mean and rounded to a power of two, so that nothing else is rounded.

    Args:
        q: ``[B, H, Lq, D]``; k, v: ``[B, Hkv, Lk, D]``, any float dtype.
        spec: whether Q's squares are about the mean of every 128 rows, K's about its mean, which is
            returned, and V's largest values about its, and whether they make scales.
    """
    group = q.shape[1] // k.shape[1]
    tokens = sampled_tokens(k.shape[2], k.device)
    keys, k_mean = finite(k[:, :, tokens]), None
    if spec.smooth_k:
        k_mean = keys.mean(2)
        keys = keys - k_mean[:, :, None]
    queries = finite(q[:, :, sampled_tokens(q.shape[2], q.device)])
    if spec.smooth_q:
        some = Q_BLOCK // sample_block(q.shape[2])
        spread = block_mean(queries, some).repeat_interleave(some, 2)
        queries = queries - spread[:, :, : queries.shape[2]]
    k_power = keys.square().mean(2)
    q_power = queries.square().mean(2).unflatten(1, (-1, group)).mean(2)
    known = (k_power > SMALLEST_POWER) & (q_power > SMALLEST_POWER)
    share = 0.25 * (k_power.where(known, 1.0).log2() - q_power.where(known, 1.0).log2())
    share = share - share.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    shift = share.clamp(-LARGEST_SHIFT, LARGEST_SHIFT).round().where(known, 0.0)
    v_mean = v_scale = None
    if spec.smooth_v or spec.sample_v:
        values = finite(v[:, :, tokens])
        v_mean = values.mean(2) if spec.smooth_v else None
        if spec.sample_v:
            v_scale = _sampled_scale(values, v_mean, sampled_top(spec))
    return Sample(k_mean, v_mean, torch.exp2(shift), torch.exp2(-shift), v_scale)


def _sampled_scale(values: Tensor, mean: Tensor | None, top: float) -> Tensor:
    """Scales of V's channels that make ``top`` of the largest of these values."""
    amax = (values if mean is None else values - mean[:, :, None]).abs().amax(2)
    return _scale(torch.maximum(amax, amax.amax(-1, keepdim=True) * V_SMALLEST_SHARE), top)


def hadamard_signs(dim: int, seed: Tensor | None, device: torch.device) -> Tensor:
    """The +-1 diagonal in front of the Hadamard matrix, ``[dim]`` float32, from a 32-bit hash.

    Without it a constant row would keep all of its energy in one channel.

    Args:
        dim: channels.
        seed: one int32 on ``device``; None is the same as 0.  Read there, never by the host.
        device: of the result.
    """
    low = 0xFFFFFFFF
    h = torch.arange(1, dim + 1, device=device) * 0x9E3779B1
    if seed is not None:
        h = h + seed.reshape(())
    h = h & low
    h = (h ^ (h >> 15)) * 0x85EBCA77 & low
    return ((h ^ (h >> 13)) & 1).float() * 2 - 1


def rotate(x: Tensor, seed: Tensor | None = None) -> Tensor:
    """``x @ diag(signs) @ H / sqrt(Dp)`` for float32 ``[..., Dp]``, Dp a power of two.

    A butterfly in float32: stage h adds and subtracts channels h apart, h = 1, 2, 4 ..; the
    normalization is one multiplication at the end.  Orthogonal, so Q K^T keeps its value.

    Args:
        x: rows.
        seed: of the signs, see :func:`hadamard_signs`.
    """
    dim = x.shape[-1]
    if dim & (dim - 1):
        raise ValueError(f"the rotated dim must be a power of two, got {dim}")
    x = x * hadamard_signs(dim, seed, x.device)
    h = 1
    while h < dim:
        pairs = x.unflatten(-1, (dim // (2 * h), 2, h))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        both = torch.empty_like(pairs, memory_format=torch.contiguous_format)
        torch.add(a, b, out=both[..., 0, :])
        torch.sub(a, b, out=both[..., 1, :])
        x = both.flatten(-3)
        h *= 2
    return x * (1.0 / math.sqrt(dim))


def prepare(
    x: Tensor,
    mean: Tensor | None,
    rotation: bool,
    sign_seed: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Smoothed, balanced, padded and rotated rows in float32: what the quantizer then scales.

    Args:
        x: ``[B, H, L, D]`` of any float dtype.
        mean: ``[B, H, D]`` (one mean) or ``[B, H, n, D]`` (one per ``ceil(L / n)`` rows), float32.
        rotation: apply :func:`rotate`, with the signs of ``sign_seed``.
        factor: of the channels, ``[B, Hkv, D]`` float32, shared by the heads of a group.

    Returns:
        ``[B, H, L, padded_dim(D)]`` float32.
    """
    rows = finite(x)
    if mean is not None:
        rows = rows - expand_block_mean(mean, x.shape[2])
    if factor is not None:
        rows = rows * factor.repeat_interleave(x.shape[1] // factor.shape[1], 1)[:, :, None]
    rows = F.pad(rows, (0, padded_dim(x.shape[-1]) - x.shape[-1]))
    return rotate(rows, sign_seed) if rotation else rows


def expand_block_mean(mean: Tensor, length: int) -> Tensor:
    """``[B, H, D]`` -> ``[B, H, 1, D]``; a mean per 128 rows -> ``[B, H, length, D]``."""

    if mean.ndim == 3:
        return mean[:, :, None]
    return mean.repeat_interleave(Q_BLOCK, 2)[:, :, :length]


def quantize_rows(
    x: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None = None,
    factor: Tensor | None = None,
    rotation: bool = False,
    sign_seed: Tensor | None = None,
    clip: bool = False,
    block: int = 1,
    multiplier: float = 1.0,
) -> QuantizedTensor:
    """Quantize Q or K along the head dim.

    Args:
        x: ``[B, H, L, D]``, any float dtype and strides.
        precision: INT8, INT4, FP8 or FP4.
        mean: subtracted first; ``[B, H, D]``, or ``[B, H, ceil(L / 128), D]`` for a mean per
            128 rows.
        factor: multiplies the channels then; ``[B, Hkv, D]`` of :class:`..formats.Sample`, Hkv
            divides H.
        rotation: signed Hadamard rotation along the padded head dim.
        sign_seed: of its signs, see :func:`hadamard_signs`.
        clip: 4 bit only, search the scale (:data:`CLIP_CANDIDATES`).
        block: tokens per scale.
        multiplier: folded into the scale after rounding, e.g. ``sm_scale * log2(e)`` for Q.
    """
    rows = prepare(x, mean, rotation, sign_seed, factor)
    if precision is Precision.FP4:
        return _quantize_fp4(rows, clip, multiplier)
    length = rows.shape[2]
    groups = -(-length // block)
    grouped = F.pad(rows, (0, 0, 0, groups * block - length)).unflatten(2, (groups, block))
    amax = grouped.abs().amax((3, 4))  # [B, H, groups]
    scale = _scale(amax, precision.qmax)
    if clip and precision is Precision.INT4:
        scale = _clipped_scale(rows, scale)
    codes = _encode(grouped, scale[..., None, None], precision).flatten(2, 3)[:, :, :length]
    if precision is Precision.INT4:
        codes = pack_nibbles(codes)
    return QuantizedTensor(codes, scale * multiplier, precision, block)


def quantize_value(
    v: Tensor,
    precision: Precision,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    fast: bool = False,
    clip: bool = False,
    sums: bool = False,
    by_tile: bool = False,
) -> QuantizedValue:
    """Quantize V per channel and transpose it.

    Args:
        v: ``[B, H, L, D]``, any float dtype and strides.
        precision: INT8, FP8 or FP4 (a micro scale for each of :func:`.permute.group_tokens`).
        mean: ``[B, H, D]`` float32 to subtract (smooth_v).
        scale: ``[B, H, D]`` float32 of a sample; None: of the largest values of all tokens.
        fast: FP8 codes stay within 2.25, so that P V may accumulate in FP16.  If ``scale`` is
            given, by a factor of every 64 tokens.
        clip: FP4 only, search the micro scales as :func:`quantize_rows` does.
        sums: INT8 only, add up the codes of every 64 tokens.
        by_tile: INT8 only, scales of every 64 tokens, rounded up to bfloat16.
    """
    length = v.shape[2]
    rows = finite(v) if mean is None else finite(v) - mean[:, :, None]
    channels = F.pad(rows.transpose(2, 3), (0, padded_length(length) - length))  # [B, H, D, Lp]
    top = FP8_FAST_VALUE_MAX if fast else code_top(precision)
    sampled = scale is not None
    if by_tile:
        scale = _round_up(_scale(channels.unflatten(-1, (-1, TILE_N)).abs().amax(-1), top))
        codes = _encode(channels, scale.repeat_interleave(TILE_N, -1), precision)
        added = value_sums(codes) if sums else None
        scale = scale.transpose(2, 3).contiguous()
        return QuantizedValue(codes, scale, precision, length, mean, sums=added)
    if scale is None:
        scale = _scale(channels.abs().amax(-1), top)
    if precision is Precision.FP4:
        groups = group_tokens(channels * (1.0 / scale)[..., None])
        codes, micro = _encode_fp4_groups(groups, clip)
        return QuantizedValue(
            pack_nibbles(ungroup_tokens(codes)), scale, precision, length, mean, micro
        )
    tiles = None
    if sampled and fast:
        channels, tiles = _fit_tiles(channels * (1.0 / scale)[..., None], top)
        codes = channels.clamp(-top, top).to(torch.float8_e4m3fn)
    else:
        codes = _encode(channels, scale[..., None], precision, top)
    added = value_sums(codes) if sums else None
    return QuantizedValue(codes, scale, precision, length, mean, sums=added, tiles=tiles)


def _fit_tiles(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """``[B, H, D, Lp]``, every 64 tokens as large as ``top``, and ``QuantizedValue.tiles``."""
    by_tile = x.unflatten(-1, (-1, TILE_N))
    factor = by_tile.abs().amax((2, 4)) * (1.0 / top)
    factor = factor.clamp(SMALLEST_TILE, LARGEST_TILE)
    inverse = 1.0 / factor
    fitted = (by_tile * inverse[:, :, None, :, None]).flatten(-2)
    return fitted, F.pad(torch.stack([factor, inverse], -1), (0, 0, 0, 2), value=1.0)


def value_sums(codes: Tensor) -> Tensor:
    """Sums of every 64 tokens' codes of V, ``[B, H, D, Lp]`` -> ``[B, H, Lp / 64, D]`` int16."""
    return codes.unflatten(-1, (-1, TILE_N)).sum(-1, dtype=torch.int16).transpose(2, 3).contiguous()


def dequantize_rows(x: QuantizedTensor) -> Tensor:
    """``[B, H, L, Dp]`` float32, still smoothed, padded and rotated."""
    if x.precision is Precision.FP4:
        assert x.micro is not None
        codes = unpack_fp4(x.data) * x.micro.float().repeat_interleave(FP4_GROUP, -1)
    elif x.precision is Precision.INT4:
        codes = unpack_int4(x.data).float()
    else:
        codes = x.data.float()
    scale = x.scale.repeat_interleave(x.block, 2)[:, :, : codes.shape[2], None]
    return codes * scale


def dequantize_value(v: QuantizedValue) -> Tensor:
    """``[B, H, L, D]`` float32, the subtracted mean added back."""
    scale = v.scale[..., None]
    if v.tile_scales:
        scale = v.scale.transpose(2, 3).repeat_interleave(TILE_N, -1)
    rows = (value_codes(v) * scale)[..., : v.length].transpose(2, 3)
    return rows if v.mean is None else rows + v.mean[:, :, None]


def value_codes(v: QuantizedValue) -> Tensor:
    """V without its scale and mean per channel: ``[B, H, D, Lp]`` float32."""
    if v.precision is not Precision.FP4:
        codes = v.data.float()
        if v.tiles is None:
            return codes
        return codes * v.tiles[:, :, None, :-2, 0].repeat_interleave(TILE_N, -1)
    assert v.micro is not None
    return ungroup_tokens(group_tokens(unpack_fp4(v.data)) * v.micro.float()[..., None])


def _scale(amax: Tensor, top: float) -> Tensor:
    """Dequantization scale of groups with these largest magnitudes; 1 for a group of zeros."""
    scale = amax * (1.0 / top)
    return torch.where(scale < MIN_SCALE, 1.0, scale.clamp(max=MAX_SCALE))


def _round_up(scale: Tensor) -> Tensor:
    """The next bfloat16 that is not below a positive float32."""
    return ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _encode(x: Tensor, scale: Tensor, precision: Precision, top: float | None = None) -> Tensor:
    scaled = x * (1.0 / scale)
    limit = precision.qmax if top is None else top
    if precision is Precision.FP8:
        return scaled.clamp(-limit, limit).to(torch.float8_e4m3fn)
    return scaled.clamp(-limit, limit).round().to(torch.int8)


def _clipped_scale(rows: Tensor, scale: Tensor) -> Tensor:
    """INT4 scale of every row that minimizes its squared error; the first of equals wins."""
    best = torch.full_like(scale, math.inf)
    chosen = scale
    error, code = torch.empty_like(rows), torch.empty_like(rows)  # calibration waits for this loop
    for share in CLIP_CANDIDATES:
        step = scale * share
        torch.mul(rows, (1.0 / step)[..., None], out=error).clamp_(-CLIP_LIMIT, CLIP_LIMIT)
        error -= torch.round(error, out=code).clamp_(-7, 7)
        error *= error
        error.mul_(CLIP_RESOLUTION).round_()
        total = error.to(torch.int32).sum(-1, dtype=torch.int32)
        cost = total.float() * (share * share)
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, step, chosen)
    return chosen


def _quantize_fp4(rows: Tensor, clip: bool, multiplier: float) -> QuantizedTensor:
    """NVFP4 behind a float32 scale per row, so that the E4M3 scales use their whole range."""
    scale = _scale(rows.abs().amax(-1), code_top(Precision.FP4))
    groups = (rows * (1.0 / scale)[..., None]).unflatten(-1, (-1, FP4_GROUP))
    codes, micro = _encode_fp4_groups(groups, clip)
    data = pack_nibbles(codes.flatten(-2))
    return QuantizedTensor(data, scale * multiplier, Precision.FP4, 1, micro)


def _encode_fp4_groups(groups: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """E2M1 codes (uint8) of ``[.., 16]`` values and their E4M3 scales ``[..]``.

    With ``clip`` the scale of least squared error, the first of equals.
    """
    amax = groups.abs().amax(-1)
    best = torch.full_like(amax, math.inf)
    chosen = torch.ones_like(amax)
    for share in CLIP_CANDIDATES if clip else (1.0,):
        step = (amax * (share / FP4_MAX)).clamp(FP8_TINY, FP8_MAX)
        step = step.to(torch.float8_e4m3fn).float()
        scaled = (groups * (1.0 / step)[..., None]).clamp(-CLIP_LIMIT, CLIP_LIMIT)
        error = scaled - decode_fp4(encode_fp4(scaled))
        total = (error * error * CLIP_RESOLUTION).round().to(torch.int32).sum(-1, dtype=torch.int32)
        cost = total.float() * (step * step)
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, step, chosen)
    return encode_fp4(groups * (1.0 / chosen)[..., None]), chosen.to(torch.float8_e4m3fn)
