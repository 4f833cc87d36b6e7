"""The Hopper attention kernel's host side: INT8 or FP8 Q K^T and FP8 P V on ``wgmma``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..formats import Precision, QuantizedTensor, QuantizedValue, cdiv, padded_length
from ..start import start_kernel
from .entry import Bias, attention_of, outputs, readable
from .gluon_columns import key_scales
from .hopper_kernel import attention_kernel
from .hopper_support import KERNELS, TILE_KEYS, HopperLaunch
from .hopper_support import launch as launch_for


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
    launch: HopperLaunch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.reference.attend_quantized`, in one launch.

    Args:
        q, k: INT8 or FP8; q's scales must be positive.
        v: FP8 with permuted tokens (:func:`..quantize.permute.permute_value`).
        delta_s: must be None, this kernel's Q is not smoothed.
        bias: computes a mask of the keys in column order, the same for all queries.
        mask: boolean or additive, broadcastable to ``[B, H, Lq, Lk]``.
        fp16_accumulator: must be False, ``wgmma`` gains nothing from it.
        out_dtype: of the output.
        return_lse: otherwise the log-sum-exp is not computed and None is returned.
        launch: instead of the one for the head dim.

    Raises:
        ValueError: a format that the kernel doesn't read, or ``delta_s``.
    """
    if q.precision is not k.precision or q.precision not in (Precision.INT8, Precision.FP8):
        raise ValueError(
            f"q and k must both be int8 or fp8, got {q.precision.value} and {k.precision.value}"
        )
    if v.precision is not Precision.FP8 or fp16_accumulator:
        raise ValueError(
            "v must be fp8 without fp16_accumulator, "
            f"got {v.precision.value} and fp16_accumulator={fp16_accumulator}"
        )
    if delta_s is not None:
        raise ValueError("delta_s must be None: smooth_q is not part of this kernel")
    batch, heads, q_len, dim = q.data.shape
    kv_heads, k_len = k.data.shape[1:3]
    head_dim = v.data.shape[2]
    config = launch_for(dim, mask is not None or bias is not None, launch)
    kind, mask_strides = 0, [0, 0, 0]
    if mask is not None:
        kind, mask = readable(mask)
        if mask.shape[-1] != k_len or mask.stride(-1) != 1:
            mask = mask.expand(*mask.shape[:-1], k_len).contiguous()
        mask = mask.expand(batch, heads, q_len, k_len)
        mask_strides = list(mask.stride()[:3])
    out, lse = outputs(q, head_dim, out_dtype, return_lse)
    scales = key_scales(k) if k.columns is None else k.columns
    added = None if bias is None else bias(0, 1)
    with torch.cuda.device_of(q.data):
        start_kernel(
            attention_kernel,
            (cdiv(q_len, config.block_m) * batch * heads,),
            rows(q.data, config.block_m),
            rows(k.data, TILE_KEYS),
            rows(v.data, dim, TILE_KEYS),
            q.scale.contiguous(),
            scales,
            v.scale.contiguous(),
            None if v.mean is None else v.mean.contiguous(),
            added,
            mask,
            out,
            lse,
            heads,
            heads // kv_heads,
            q_len,
            k_len,
            q.scale.shape[2],
            padded_length(k_len),
            *((0, 0) if added is None else added.stride()[:2]),
            *mask_strides,
            D=head_dim,
            DP=dim,
            Q_BLOCK=q.block,
            MASK=kind,
            HIDES=mask is not None or bias is not None,
            CAUSAL=is_causal,
            BM=config.block_m,
            STAGES=config.stages,
            num_warps=config.num_warps,
            maxnreg=config.registers,
            enable_fp_fusion=True,
        )
    return out, lse


def rows(x: Tensor, block: int, width: int | None = None) -> TensorDescriptor:
    """What the copy engine needs to know of codes ``[.., rows, bytes]``.

    Args:
        x: on the device.
        block, width: rows and bytes of a copy; all bytes of a row by default.
    """
    flat = x.contiguous().flatten(0, -2)
    width = width or x.shape[-1]
    shape, strides = list(flat.shape), list(flat.stride())
    return TensorDescriptor(flat, shape, strides, [block, width], _swizzled(min(width, 128)))


@functools.cache
def _swizzled(width: int) -> gl.NVMMASharedLayout:
    """Rows of bytes as ``wgmma`` reads them without conflicts; made once, it takes microseconds."""
    return gl.NVMMASharedLayout(width, 8, 2)


attention = attention_of(KERNELS)
