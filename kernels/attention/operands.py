"""From Q, K, V and a spec to the quantized operands of an attention kernel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..formats import (
    K_SCALE_BLOCK,
    LOG2E,
    MIN_MULTIPLIER,
    Q_BLOCK,
    Q_SCALE_BLOCK,
    Precision,
    QuantizedTensor,
    QuantizedValue,
)
from ..quantize import triton as quantize
from ..rope import Rope
from ..spec import AttentionSpec


class Operands(NamedTuple):
    """What an attention kernel reads.

    Attributes:
        q: balanced; its scales carry ``multiplier`` and are positive.
        k: without its mean, if the spec smooths it.
        v: as it came, where P V runs in the model's half type.
        q_mean: ``[B, H, ceil(Lq / 128), D]`` float32, what smooth_q took out of Q, or None.
        k_mean: ``[B, Hkv, D]`` float32, what smooth_k took out of K, or None.
        sm_scale: the softmax scale.
        multiplier: its magnitude times log2(e).
        q_factor, k_factor: ``[B, Hkv, D]`` float32 that balance their channels, or None.
    """

    q: QuantizedTensor
    k: QuantizedTensor
    v: Tensor | QuantizedValue
    q_mean: Tensor | None
    k_mean: Tensor | None
    sm_scale: float
    multiplier: float
    q_factor: Tensor | None = None
    k_factor: Tensor | None = None


def quantize_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    scale: float | None = None,
    *,
    permuted: bool = False,
    rope_q: Rope | None = None,
    rope_k: Rope | None = None,
    sign_seed: Tensor | None = None,
) -> Operands:
    """Smooth, rotate and quantize on the GPU, as :func:`.reference.attention` does in Torch.

    Args:
        q: ``[B, H, Lq, D]``; k, v: ``[B, Hkv, Lk, D]``, any float dtype but float64.
        scale: softmax scale, ``1 / sqrt(D)`` if None.
        permuted: V's tokens in the order of P's registers (:mod:`..quantize.permute`).
        rope_q, rope_k: rotate q and k as they are loaded, in float32.
        sign_seed: as of :func:`.reference.attention`.
    """
    sm_scale = q.shape[-1] ** -0.5 if scale is None else scale
    multiplier = max(abs(sm_scale) * LOG2E, MIN_MULTIPLIER)
    fast = spec.pv_accumulator == "fp16"
    q_factor = k_factor = v_scale = stats = None
    if spec.balance:
        k_mean, v_mean, q_factor, k_factor, v_scale = quantize.sample(
            q,
            k,
            v,
            spec,
            rope_q=rope_q,
            rope_k=rope_k,
        )
    else:
        k_mean = quantize.token_mean(k, rope_k) if spec.smooth_k else None
        stats = quantize.channel_stats(v) if spec.smooth_v else None
        v_mean = None if stats is None else stats.mean
    rows = q if sm_scale >= 0 else -q  # the scales stay positive
    by_block = spec.granularity == "block"
    q_mean: Tensor | None
    if spec.smooth_q and not by_block:
        q_codes, q_mean = quantize.quantize_smoothed_rows(
            rows,
            spec.qk,
            factor=q_factor,
            rotation=spec.rotate,
            sign_seed=sign_seed,
            clip=spec.clip,
            multiplier=multiplier,
            rope=rope_q,
        )
    else:
        q_mean = quantize.block_mean(rows, Q_BLOCK, rope_q) if spec.smooth_q else None
        q_codes = quantize.quantize_rows(
            rows,
            spec.qk,
            mean=q_mean,
            factor=q_factor,
            rotation=spec.rotate,
            sign_seed=sign_seed,
            clip=spec.clip,
            block=Q_SCALE_BLOCK if by_block else 1,
            multiplier=multiplier,
            rope=rope_q,
        )
    k_codes = quantize.quantize_rows(
        k,
        spec.qk,
        mean=k_mean,
        factor=k_factor,
        rotation=spec.rotate,
        sign_seed=sign_seed,
        clip=spec.clip,
        block=K_SCALE_BLOCK if by_block else 1,
        rope=rope_k,
    )
    values: Tensor | QuantizedValue = v
    if spec.pv is not Precision.FP16:
        values = quantize.quantize_value(
            v,
            spec.pv,
            mean=v_mean,
            scale=v_scale,
            fast=fast,
            clip=spec.clip and spec.pv is Precision.FP4,
            # With V's tokens in its own order a kernel multiplies P's bytes as they are.
            sums=spec.unsigned_p and not permuted,
            permuted=permuted,
            stats=stats,
        )
    return Operands(
        q_codes, k_codes, values, q_mean, k_mean, sm_scale, multiplier, q_factor, k_factor
    )
