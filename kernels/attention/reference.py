"""Quantized attention in Torch, block by block as the kernels do it, for every spec of the ladder.

It runs on any device and is what a kernel's result is compared with.  It is no oracle: the exact
attention is ``torch.nn.functional.scaled_dot_product_attention`` in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import (
    K_SCALE_BLOCK,
    LOG2E,
    Q_BLOCK,
    Q_SCALE_BLOCK,
    TILE_N,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    Sample,
    decode_fp4,
    encode_fp4,
)
from ..quantize import reference as quantize
from ..quantize.limits import FP4_MAX, FP8_MAX, FP8_TINY, finite, score_gain, value_options
from ..quantize.permute import group_tokens, ungroup_tokens
from ..rope import Rope, apply_rope
from ..spec import AttentionSpec
from .terms import MASK_FLOOR, half_value, smoothed_lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rope_q: Rope | None = None,
    rope_k: Rope | None = None,
    sign_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Smooth, rotate, quantize and attend.

    Args:
        q: ``[B, H, Lq, D]`` float; k, v: ``[B, Hkv, Lk, D]`` of the same dtype, Hkv divides H.
        spec: any spec of the ladder; ``fp16`` is computed exactly, in float32.
        mask: boolean (True: attend) or additive float, broadcastable to ``[B, H, Lq, Lk]``.
        is_causal: query i sees keys 0 .. i, combined with ``mask``.
        scale: softmax scale, ``1 / sqrt(D)`` if None.
        rope_q, rope_k: rotate q and k first, in float32.
        sign_seed: one int32 on q's device, from which the signs of the spec's Hadamard rotation
            come (:func:`..quantize.reference.hadamard_signs`); other signs round other errors.

    Returns:
        Output ``[B, H, Lq, D]`` in q's dtype, and the natural log-sum-exp ``[B, H, Lq]`` float32
        of the scaled scores (-inf for a fully masked row, whose output is 0).
    """
    sm_scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    q = q if rope_q is None else apply_rope(finite(q), rope_q)
    k = k if rope_k is None else apply_rope(finite(k), rope_k)
    if not spec.quantized:
        out, lse = _exact(q, k, v, mask, is_causal, sm_scale)
        return out.to(dtype), lse
    q_mean = quantize.block_mean(q, Q_BLOCK) if spec.smooth_q else None
    k_mean, v_mean, q_factor, k_factor, v_scale, _ = means_and_factors(q, k, v, spec)
    by_block = spec.granularity == "block"
    options: dict[str, Any] = {
        "rotation": spec.rotate,
        "sign_seed": sign_seed,
        "clip": spec.clip,
    }
    q_codes = quantize.quantize_rows(
        q,
        spec.qk,
        mean=q_mean,
        factor=q_factor,
        block=Q_SCALE_BLOCK if by_block else 1,
        multiplier=sm_scale * LOG2E * score_gain(spec, q.shape[-1]),
        **options,
    )
    k_codes = quantize.quantize_rows(
        k,
        spec.qk,
        mean=k_mean,
        factor=k_factor,
        block=K_SCALE_BLOCK if by_block else 1,
        **options,
    )
    values: Tensor | QuantizedValue = v
    if spec.pv is not Precision.FP16:
        values = quantize.quantize_value(
            v,
            spec.pv,
            mean=v_mean,
            scale=v_scale,
            by_tile=spec.tile_v,
            **value_options(spec),
        )
    out, lse = attend_quantized(
        q_codes,
        k_codes,
        values,
        delta_s=None if q_mean is None else delta_s(q_mean, k, k_mean, sm_scale * LOG2E),
        mask=mask,
        is_causal=is_causal,
        fp16_accumulator=spec.pv_accumulator == "fp16",
        unsigned_p=spec.unsigned_p,
    )
    if k_mean is not None:  # the softmax does not see what smooth_k takes away, its sum does
        lse = lse + smoothed_lse(q, k_mean, sm_scale)
    return to_output(out, dtype), lse


def means_and_factors(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Sample:
    """What a spec takes out of K and V, and balances: from a sample, or means of all tokens."""
    if spec.balance:
        return quantize.sample(q, k, v, spec)
    k_mean = quantize.token_mean(k) if spec.smooth_k else None
    return Sample(k_mean, quantize.token_mean(v) if spec.smooth_v else None)


def to_output(out: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 in the output's type: :func:`..tiles.to_output`."""
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        out = out.clamp(-top, top)
    return out.to(dtype)


def delta_s(q_mean: Tensor, k: Tensor, k_mean: Tensor | None, multiplier: float) -> Tensor:
    """What smooth_q takes out of S: ``mean(Q_i) (K - mean(K))^T`` of every 128 query rows.

    In log2 units if ``multiplier`` is ``sm_scale * log2(e)``.

    Returns:
        ``[B, H, ceil(Lq / 128), Lk]`` float32 (SageAttention2, 2411.10958 equation 5).
    """
    rows = finite(k) if k_mean is None else finite(k) - k_mean[:, :, None]
    group = q_mean.shape[1] // k.shape[1]
    return (q_mean * multiplier) @ rows.repeat_interleave(group, 1).transpose(2, 3)


def attend_quantized(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: Tensor | QuantizedValue,
    *,
    delta_s: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    fp16_accumulator: bool = False,
    unsigned_p: bool = False,
    tile: int = TILE_N,
) -> tuple[Tensor, Tensor]:
    """Online softmax over tiles of keys on quantized operands.

    Args:
        q: codes ``[B, H, Lq, Dp]``; its scale carries ``sm_scale * log2(e)``.
        k: codes ``[B, Hkv, Lk, Dp]``.
        v: ``[B, Hkv, Lk, D]`` in the model's dtype, or quantized.
        delta_s: ``[B, H, ceil(Lq / 128), Lk]`` float32 of :func:`delta_s`.
        mask: boolean or additive, broadcastable to ``[B, H, Lq, Lk]``.
        is_causal: query i sees keys 0 .. i.
        fp16_accumulator: P V of one tile accumulates in FP16, 32 keys at a time (FP8 only).
        unsigned_p: P's codes are 0 .. 255 (INT8 only).
        tile: keys of a tile: P is rounded relative to the maximum of the tiles so far.

    Returns:
        Output ``[B, H, Lq, D]`` float32 and log-sum-exp ``[B, H, Lq]`` float32 of the scores as
        quantized (without what smooth_k removed).
    """
    batch, heads, q_len = q.data.shape[:3]
    kv_heads, k_len = k.data.shape[1:3]
    group = heads // kv_heads
    device = q.data.device
    # Integer codes are exact in float32, and so are their sums: |S| <= 127 * 127 * 256 < 2^24.
    q_rows = quantize.dequantize_rows(q._replace(scale=torch.ones_like(q.scale)))
    k_rows = quantize.dequantize_rows(k._replace(scale=torch.ones_like(k.scale)))
    q_scale = q.scale.repeat_interleave(q.block, 2)[:, :, :q_len, None]
    k_scale = k.scale.repeat_interleave(k.block, 2)[:, :, None, :k_len]
    k_rows, k_scale = k_rows.repeat_interleave(group, 1), k_scale.repeat_interleave(group, 1)
    values = _ValueTiles(
        v, group, fp16_accumulator, 255.0 if unsigned_p else 127.0, q.precision is Precision.INT4
    )

    top = torch.full((batch, heads, q_len, 1), -math.inf, device=device)
    total = torch.zeros_like(top)
    out = torch.zeros(batch, heads, q_len, values.head_dim, device=device)
    query = torch.arange(q_len, device=device)[:, None]
    for start in range(0, k_len, tile):
        stop = min(start + tile, k_len)
        s = (q_rows @ k_rows[:, :, start:stop].transpose(2, 3)) * q_scale * k_scale[..., start:stop]
        if delta_s is not None:
            s = s + delta_s[..., start:stop].repeat_interleave(Q_BLOCK, 2)[:, :, :q_len]
        if mask is not None:
            s = _apply_mask(s, mask, start, stop, k_len)
        if is_causal:
            key = torch.arange(start, stop, device=device)
            s = torch.where(key <= query, s, -math.inf)
        tile_top = s.amax(-1, keepdim=True)
        new_top = torch.maximum(top, tile_top)
        safe_top = _finite(new_top)
        alpha = torch.exp2(top - safe_top)  # exp2(-inf) = 0 before the first visible key
        tile_top = torch.where(torch.isneginf(tile_top), safe_top, tile_top)
        tile_total, product = values.product(s, safe_top, tile_top, start, stop)
        total = total * alpha + tile_total
        out = out * alpha + product
        top = new_top
    out = torch.where(total > 0, out / torch.where(total > 0, total, 1.0), 0.0)
    out = values.finish(out, total > 0)
    lse = (top + torch.log2(total)) / LOG2E
    return out, lse[..., 0]


def _finite(top: Tensor) -> Tensor:
    """0 in place of -inf, the maximum of a row that saw no key yet: exponents stay defined."""
    return torch.where(torch.isneginf(top), 0.0, top)


def _apply_mask(s: Tensor, mask: Tensor, start: int, stop: int, k_len: int) -> Tensor:
    tile = mask if mask.shape[-1] == 1 and k_len != 1 else mask[..., start:stop]
    if mask.dtype == torch.bool:
        return torch.where(tile, s, -math.inf)
    bias = (tile.float() * LOG2E).clamp_(MASK_FLOOR, -MASK_FLOOR)
    return s + bias.masked_fill_(torch.isneginf(tile), -math.inf)


class _ValueTiles:
    """P and V of one tile in the format of ``v``.

    ``p_top``: the largest code of an INT8 P.

    ``rounded_sums``: the row sums of an INT8 P add its codes.  The weights that V is multiplied
    with then sum to one, and a lane of the kernel needs 8 dp4a a tile instead of 32 additions.
    It is for INT4 Q and K, whose relative L1 error falls a little; that of INT8 Q and K would rise,
    so they add P before it is rounded.
    """

    def __init__(
        self,
        v: Tensor | QuantizedValue,
        group: int,
        fp16_accumulator: bool,
        p_top: float,
        rounded_sums: bool,
    ):
        self.fast, self.p_top, self.rounded_sums = fp16_accumulator, p_top, rounded_sums
        self.precision = v.precision if isinstance(v, QuantizedValue) else Precision.FP16
        if isinstance(v, QuantizedValue):
            self.head_dim = v.data.shape[2]
            codes = quantize.value_codes(v._replace(tiles=None))
            self.tiles = None if v.tiles is None else v.tiles.repeat_interleave(group, 1)
            self.rows = codes.transpose(2, 3).repeat_interleave(group, 1)
            self.tile_scales = v.tile_scales
            scale = v.scale.repeat_interleave(group, 1)
            self.scale = scale if v.tile_scales else scale[:, :, None]
            self.mean = None if v.mean is None else v.mean.repeat_interleave(group, 1)[:, :, None]
        else:
            self.head_dim = v.shape[-1]
            # float32 models have no half type of their own; their V is rounded to FP16 with a
            # power-of-two scale per channel where it would overflow.
            self.half = torch.float16 if v.dtype in (torch.float32, torch.float64) else v.dtype
            self.tile_scales = False
            values, self.scale = half_value(v)
            self.rows = values.float().repeat_interleave(group, 1)
            self.scale = self.scale.repeat_interleave(group, 1)[:, :, None]
            self.mean = None

    def product(
        self, s: Tensor, top: Tensor, tile_top: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """P's row sums and P V of the tile, relative to the running maximum ``top``, in float32."""
        rows = self.rows[:, :, start:stop]
        if self.precision is Precision.INT8:
            # One scale per row and tile: P relative to the tile's own maximum fills its codes
            # (the online softmax gives it for free), rescaled to the running maximum afterwards.
            codes = (torch.exp2(s - tile_top) * self.p_top).round()
            back = torch.exp2(tile_top - top) * (1.0 / self.p_top)
            product = (codes @ rows) * back
            if self.tile_scales:
                product = product * self.scale[:, :, start // TILE_N, None]
            if self.rounded_sums:
                return codes.sum(-1, keepdim=True) * back, product
            return torch.exp2(s - top).sum(-1, keepdim=True), product
        p = torch.exp2(s - top)
        total = p.sum(-1, keepdim=True)
        if self.precision is Precision.FP16:
            return total, p.to(self.half).float() @ rows
        if self.precision is Precision.FP8:
            codes = (p * 448.0).to(torch.float8_e4m3fn).float()
            return total, self._fp8_product(codes, rows, start) * (1.0 / 448.0)
        return total, self._fp4_product(s, top, tile_top, start)

    def _fp8_product(self, codes: Tensor, rows: Tensor, start: int) -> Tensor:
        if not self.fast:
            return codes @ rows
        total = torch.zeros(1, device=codes.device)
        for k in range(0, codes.shape[-1], 32):  # one m16n8k32 step rounds once
            total = (total + codes[..., k : k + 32] @ rows[:, :, k : k + 32]).half().float()
        return total if self.tiles is None else total * self.tiles[:, :, start // TILE_N, None, :1]

    def _fp4_product(self, s: Tensor, top: Tensor, tile_top: Tensor, start: int) -> Tensor:
        """Two-level P (SageAttention3, 2505.11594 section 3.3): a row scale in front of NVFP4.

        The row's scale is that of the tile's own maximum, as for INT8.
        """
        whole = FP4_MAX * FP8_MAX
        local = F.pad(torch.exp2(s - tile_top) * whole, (0, TILE_N - s.shape[-1]))
        groups = group_tokens(local)
        micro = (groups.amax(-1, keepdim=True) / FP4_MAX).clamp(min=FP8_TINY)
        micro = micro.to(torch.float8_e4m3fn).float()
        codes = ungroup_tokens(decode_fp4(encode_fp4(groups / micro)) * micro)
        back = torch.exp2(tile_top - top) * (1.0 / whole)
        return (codes @ self.rows[:, :, start : start + TILE_N]) * back

    def finish(self, out: Tensor, seen: Tensor) -> Tensor:
        """V's scale and mean, applied once at the end; rows that saw no key stay 0."""
        if not self.tile_scales:
            out = out * self.scale
        if self.mean is not None:
            out = torch.where(seen, out + self.mean, 0.0)
        return out


def _exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in float32 with the same treatment of masks as the quantized specs."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    s = (q.float() * (sm_scale * LOG2E)) @ keys.transpose(2, 3)
    if mask is not None:
        s = _apply_mask(s, mask, 0, s.shape[-1], s.shape[-1])
    if is_causal:
        visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = torch.where(visible, s, -math.inf)
    top = _finite(s.amax(-1, keepdim=True))
    p = torch.exp2(s - top)
    total = p.sum(-1, keepdim=True)
    out = torch.where(total > 0, (p @ values) / torch.where(total > 0, total, 1.0), 0.0)
    return out, ((top + torch.log2(total)) / LOG2E)[..., 0]
