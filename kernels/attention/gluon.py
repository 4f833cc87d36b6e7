"""The Gluon attention kernel's host side: tensor cores that ``tl.dot`` doesn't reach."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ..formats import (
    Q_BLOCK,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    padded_dim,
    padded_length,
)
from ..rope import Rope
from ..spec import AttentionSpec
from .gluon_columns import as_columns, columns_length, key_bias, key_scales
from .gluon_kernel import SCALE_SHIFT, attention_kernel
from .gluon_masks import pack_mask
from .gluon_support import MAX_REGISTERS, GluonLaunch, Tuned, unsupported_spec
from .gluon_support import launch as launch_for
from .operands import quantize_operands
from .terms import smoothed_lse

#: Delta-S of smoothed Q exists for this many bytes of query blocks at a time (1024 rows at least).
BIAS_BYTES = 64 * 2**20
_MIN_BIAS_BLOCKS = 8

#: ``bias(first_block, blocks)`` -> ``[B, H, blocks, columns]`` for blocks of 128 query rows.
Bias = Callable[[int, int], Tensor]


def attend_quantized(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: QuantizedValue,
    *,
    delta_s: Tensor | None = None,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    fp16_accumulator: bool = False,
    out_dtype: torch.dtype = torch.float32,
    return_lse: bool = True,
    launch: GluonLaunch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.reference.attend_quantized`.

    Args:
        q, k: INT4, INT8 or FP4; q's scales must be positive.
        v: INT8, FP8 or FP4 with permuted tokens (:func:`..quantize.permute.permute_value`).
        delta_s: as of the twin, in token order.
        bias: computes delta-S, a mask of the keys, or their sum in column order when it is needed;
            instead of ``delta_s``.
        mask: boolean or additive, broadcastable to ``[B, H, Lq, Lk]``.
        out_dtype: of the output.
        return_lse: otherwise the log-sum-exp is not computed and None is returned.
        launch: instead of the one for the head dim.

    Raises:
        ValueError: a format that the kernel doesn't read.
    """
    formats = (Precision.INT4, Precision.INT8, Precision.FP4)
    if q.precision is not k.precision or q.precision not in formats:
        raise ValueError(
            "q and k must both be int4, int8 or fp4, "
            f"got {q.precision.value} and {k.precision.value}"
        )
    allowed = ((Precision.INT8, False), (Precision.FP4, False), (Precision.FP8, True))
    if (v.precision, fp16_accumulator) not in allowed:
        raise ValueError(
            "v must be int8, fp4, or fp8 with fp16_accumulator, "
            f"got {v.precision.value} and fp16_accumulator={fp16_accumulator}"
        )
    batch, heads, q_len = q.data.shape[:3]
    kv_heads, k_len = k.data.shape[1:3]
    head_dim, device = v.data.shape[2], q.data.device
    q_words, k_words, v_words = (x.data.contiguous().view(torch.int32) for x in (q, k, v))
    dim = q_words.shape[3] * (4 if q.precision is Precision.INT8 else 8)
    config = launch or launch_for(dim)
    micro = tuple(
        None if x.micro is None else x.micro.contiguous().view(torch.int32) for x in (q, k, v)
    )

    packed = None if mask is None else pack_mask(mask, q_len, k_len)
    if delta_s is not None:
        columns = as_columns(delta_s)

        def bias(first: int, count: int) -> Tensor:
            return columns[:, :, first : first + count].contiguous()

    out = torch.empty(batch, heads, q_len, head_dim, dtype=out_dtype, device=device)
    lse = None
    if return_lse:
        lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=device)
    sign = 1.0 if q.precision is Precision.FP4 else -1.0  # that of MAGIC_BITS
    scales = key_scales(k, sign / SCALE_SHIFT)
    blocks = triton.cdiv(q_len, config.block_m)
    ratio = Q_BLOCK // config.block_m
    chunk = blocks
    if bias is not None:
        rows = BIAS_BYTES // (4 * batch * heads * columns_length(k_len))
        chunk = min(blocks, max(_MIN_BIAS_BLOCKS, rows) * ratio)
    with torch.cuda.device_of(q.data):
        for first in range(0, blocks, chunk):
            count = min(chunk, blocks - first)
            added = None
            if bias is not None:
                added = bias(first // ratio, triton.cdiv(count, ratio))
            attention_kernel[(count * batch * heads,)](
                q_words,
                k_words,
                v_words,
                q.scale.contiguous(),
                scales,
                *micro,
                v.scale.contiguous(),
                None if v.mean is None else v.mean.contiguous(),
                added,
                None if packed is None else packed.words,
                None if packed is None else packed.span,
                out,
                lse,
                heads,
                heads // kv_heads,
                q_len,
                k_len,
                q.scale.shape[2],
                padded_length(k_len),
                first,
                count,
                *((0, 0, 0) if added is None else added.stride()[:3]),
                *((0, 0) if packed is None else packed.strides),
                D=head_dim,
                WORDS=q_words.shape[3],
                DP=dim,
                QK=q.precision.value,
                PV=v.precision.value,
                Q_BLOCK=q.block,
                MASK="none" if packed is None else packed.kind,
                CAUSAL=is_causal,
                BM=config.block_m,
                STEP=config.step,
                STAGES=config.stages,
                num_warps=config.num_warps,
                maxnreg=MAX_REGISTERS,
                enable_fp_fusion=True,
            )
    return out, lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    tuned: Tuned | None = None,
    *,
    rope_q: Rope | None = None,
    rope_k: Rope | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.reference.attention` for the specs that :func:`.gluon_support.unsupported` passes.

    Args:
        tuned: launches measured on this card, instead of the built-in ones.
        rope_q, rope_k: rotate q and k as they are quantized.

    Returns:
        Output ``[B, H, Lq, D]`` in q's dtype, and the natural log-sum-exp ``[B, H, Lq]`` float32
        if ``return_lse``, else None.

    Raises:
        ValueError: the spec is not one of this kernel's.
    """
    reason = unsupported_spec(spec)
    if reason is not None:
        raise ValueError(f"{spec}: {reason}")
    dtype = q.dtype
    if dtype == torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    x = quantize_operands(q, k, v, spec, scale, permuted=True, rope_q=rope_q, rope_k=rope_k)
    assert isinstance(x.v, QuantizedValue)  # the kernel takes no spec whose V is not
    bias, key_mask = None, None
    if mask is not None and (mask.ndim < 2 or mask.shape[-2] == 1):
        # One mask for all queries costs nothing as part of the bias.
        key_mask = mask.expand(q.shape[0], q.shape[1], 1, k.shape[2])
        mask = None
    if x.q_mean is not None or key_mask is not None:

        def bias(first: int, count: int) -> Tensor:
            smooth = x.q_mean is not None
            added = key_bias(
                q.shape[1],
                k,
                q_mean=x.q_mean,
                k_mean=x.k_mean,
                multiplier=x.multiplier,
                rope=rope_k if smooth else None,
                mask=key_mask,
                first_block=first if smooth else 0,
                blocks=count if smooth else 1,
            )
            return added if smooth else added.expand(-1, -1, count, -1)

    out, lse = attend_quantized(
        x.q,
        x.k,
        x.v,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        fp16_accumulator=spec.pv_accumulator == "fp16",
        out_dtype=dtype,
        return_lse=return_lse,
        launch=None if tuned is None else tuned(q.device, spec, padded_dim(q.shape[-1])),
    )
    if lse is not None and x.k_mean is not None:
        lse = lse + smoothed_lse(q, x.k_mean, x.sm_scale, rope_q)
    return out, lse
