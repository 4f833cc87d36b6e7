"""The Gluon attention kernel's host side: tensor cores that ``tl.dot`` doesn't reach."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Precision, QuantizedTensor, QuantizedValue, padded_length
from ..start import start_kernel
from .entry import Bias, attention_of, in_columns, in_parts, outputs
from .gluon_columns import key_scales
from .gluon_kernel import attention_kernel
from .gluon_masks import pack_mask
from .gluon_support import KERNELS, MAX_REGISTERS, GluonLaunch, column_factor
from .gluon_support import launch as launch_for

#: Blocks of 128 query rows of a launch at least, however large their delta-S is.
_MIN_BIAS_BLOCKS = 8


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
    unsigned_p: bool = False,
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
        unsigned_p: as of the twin, for v in INT8.
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
    if unsigned_p and v.precision is not Precision.INT8:
        raise ValueError(f"unsigned_p needs v in int8, got {v.precision.value}")
    batch, heads, q_len = q.data.shape[:3]
    kv_heads, k_len = k.data.shape[1:3]
    head_dim = v.data.shape[2]
    q_words, k_words, v_words = (x.data.contiguous().view(torch.int32) for x in (q, k, v))
    dim = q_words.shape[3] * (4 if q.precision is Precision.INT8 else 8)
    v_scale = v.scale.contiguous()
    if v.tile_scales:
        v_scale = v_scale.view(torch.int32)
    config = launch or launch_for(dim)
    micro = tuple(
        None if x.micro is None else x.micro.contiguous().view(torch.int32) for x in (q, k, v)
    )

    packed = None if mask is None else pack_mask(mask, q_len, k_len)
    if delta_s is not None:
        bias = in_columns(delta_s)
    out, lse = outputs(q, head_dim, out_dtype, return_lse)
    scales = key_scales(k, column_factor(q.precision)) if k.columns is None else k.columns
    parts = in_parts(q, k_len, config.block_m, bias, _MIN_BIAS_BLOCKS)
    with torch.cuda.device_of(q.data):
        for first, count, added, strides in parts:
            start_kernel(
                attention_kernel,
                (count * batch * heads,),
                q_words,
                k_words,
                v_words,
                q.scale.contiguous(),
                scales,
                *micro,
                v_scale,
                None if v.mean is None else v.mean.contiguous(),
                v.tiles,
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
                *strides,
                *((0, 0) if packed is None else packed.strides),
                D=head_dim,
                WORDS=q_words.shape[3],
                DP=dim,
                QK=q.precision.value,
                PV="uint8" if unsigned_p else v.precision.value,
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


attention = attention_of(KERNELS)
