"""From Q, K, V and a spec to the quantized operands of an attention kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    Sample,
)
from ..quantize import triton as quantize
from ..quantize.limits import score_gain
from ..quantize.stats import joined
from ..quantize.triton_value import kernel_options
from ..rope import Rope
from ..spec import AttentionSpec


class Operands(NamedTuple):
    """What an attention kernel reads.

    Attributes:
        q: balanced; its scales carry ``multiplier`` and the spec's gain (:func:`.score_gain`), and
            are positive.
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
    column_factor: float | None = None,
    rope_q: Rope | None = None,
    rope_k: Rope | None = None,
    sign_seed: Tensor | None = None,
) -> Operands:
    """Smooth, rotate and quantize on the GPU, as :func:`.reference.attention` does in Torch.

    Args:
        q: ``[B, H, Lq, D]``; k, v: ``[B, Hkv, Lk, D]``, any float dtype but float64.
        scale: softmax scale, ``1 / sqrt(D)`` if None.
        permuted: V's tokens in the order of P's registers (:mod:`..quantize.permute`).
        column_factor: as of :func:`..quantize.together.quantize_together`; the kernel makes those
            lists itself where a spec has a scale per block, or balances nothing.
        rope_q, rope_k: rotate q and k as they are loaded, in float32.
        sign_seed: as of :func:`.reference.attention`.
    """
    sm_scale = q.shape[-1] ** -0.5 if scale is None else scale
    multiplier = max(abs(sm_scale) * LOG2E, MIN_MULTIPLIER)
    of_scores = multiplier * score_gain(spec, q.shape[-1])
    rows = q if sm_scale >= 0 else -q  # the scales stay positive
    options: dict[str, Any] = {"rope_q": rope_q, "rope_k": rope_k, "sign_seed": sign_seed}
    found, stats = _statistics(q, k, v, spec, rope_q, rope_k)
    if spec.balance and spec.granularity == "token":
        options |= {"permuted": permuted, "column_factor": column_factor}
        q_codes, q_mean, k_codes, values = quantize.quantize_together(
            rows, k, v, spec, found, multiplier=of_scores, **options
        )
    else:
        q_codes, q_mean, k_codes = _rows(rows, k, spec, found, of_scores, **options)
        values = _value(v, spec, found, stats, permuted)
    return Operands(
        q_codes,
        k_codes,
        values,
        q_mean,
        found.k_mean,
        sm_scale,
        multiplier,
        found.q_factor,
        found.k_factor,
    )


def _statistics(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, rope_q: Rope | None, rope_k: Rope | None
) -> tuple[Sample, quantize.ChannelStats | None]:
    """What is taken out and balanced; V's statistics where its mean is that of all tokens."""
    if spec.balance:
        found = quantize.sample(q, k, v, spec, rope_q=rope_q, rope_k=rope_k)
        if found.v_extremes is None or spec.granularity == "token":
            return found, None
        return found, joined(found.v_extremes)
    k_mean = quantize.token_mean(k, rope_k) if spec.smooth_k else None
    if spec.tile_v or not spec.smooth_v:
        return Sample(k_mean, quantize.token_mean(v) if spec.smooth_v else None), None
    stats = quantize.channel_stats(v)
    return Sample(k_mean, stats.mean), stats


def _rows(
    q: Tensor,
    k: Tensor,
    spec: AttentionSpec,
    found: Sample,
    multiplier: float,
    *,
    rope_q: Rope | None,
    rope_k: Rope | None,
    sign_seed: Tensor | None,
) -> tuple[QuantizedTensor, Tensor | None, QuantizedTensor]:
    """Codes of Q, its means, and codes of K, in a launch each."""
    by_block = spec.granularity == "block"
    options: dict[str, Any] = {
        "rotation": spec.rotate,
        "sign_seed": sign_seed,
        "clip": spec.clip,
    }
    of_q: dict[str, Any] = {"factor": found.q_factor, "multiplier": multiplier, "rope": rope_q}
    q_mean: Tensor | None = None
    if spec.smooth_q and not by_block:
        q_codes, q_mean = quantize.quantize_smoothed_rows(q, spec.qk, **of_q, **options)
    else:
        if spec.smooth_q:
            q_mean = quantize.block_mean(q, Q_BLOCK, rope_q)
        block = Q_SCALE_BLOCK if by_block else 1
        q_codes = quantize.quantize_rows(q, spec.qk, mean=q_mean, block=block, **of_q, **options)
    k_codes = quantize.quantize_rows(
        k,
        spec.qk,
        mean=found.k_mean,
        factor=found.k_factor,
        block=K_SCALE_BLOCK if by_block else 1,
        rope=rope_k,
        **options,
    )
    return q_codes, q_mean, k_codes


def _value(
    v: Tensor,
    spec: AttentionSpec,
    found: Sample,
    stats: quantize.ChannelStats | None,
    permuted: bool,
) -> Tensor | QuantizedValue:
    if spec.pv is Precision.FP16:
        return v
    return quantize.quantize_value(
        v,
        spec.pv,
        mean=found.v_mean,
        scale=found.v_scale,
        stats=stats,
        by_tile=spec.tile_v,
        **kernel_options(spec, permuted),
    )
