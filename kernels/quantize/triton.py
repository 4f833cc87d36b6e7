"""The quantizers in Triton, bit-exact with :mod:`.reference` given the same means.

Offsets into the caller's tensors are 64-bit, every masked load names its ``other``, and FP fusion
is off where the twin's rounding must be reproduced.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Q_BLOCK, Precision, QuantizedTensor, cdiv, padded_dim
from ..rope import Rope
from ..start import start_kernel
from .limits import code_top
from .rope import Tables, rope_arguments
from .sample import sample
from .stats import ChannelStats, block_mean, channel_stats, token_mean
from .together import quantize_together
from .triton_rows import Rows, check_rows, empty_rows, rows_program
from .triton_value import quantize_value, shares

__all__ = [
    "ChannelStats",
    "block_mean",
    "channel_stats",
    "quantize_rows",
    "quantize_smoothed_rows",
    "quantize_together",
    "quantize_value",
    "sample",
    "token_mean",
]


@triton.jit
def _quantize_rows_kernel(
    p_x,  # as of Rows
    p_mean,
    p_factor,
    p_seed,
    p_codes,
    p_scale,
    p_micro,
    length,
    heads,
    group,
    means,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    multiplier,
    p_cos,  # tables of RoPE, or None
    p_sin,
    rope_b,
    rope_l,
    rope_d,
    D: tl.constexpr,  # as of rows_program
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    MEAN_BLOCK: tl.constexpr,
    OWN_MEAN: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    x = Rows(
        p_x,
        p_mean,
        p_factor,
        p_seed,
        p_codes,
        p_scale,
        p_micro,
        None,
        length,
        heads,
        group,
        means,
        stride_b,
        stride_h,
        stride_l,
        stride_d,
        multiplier,
    )
    rows_program(
        x,
        Tables(p_cos, p_sin, rope_b, rope_l, rope_d),
        tl.program_id(0),
        D,
        DP,
        LOG2_DP,
        FORMAT,
        TOP,
        BLOCK,
        SPAN,
        GROUPED,
        MEAN_BLOCK,
        OWN_MEAN,
        ROTATE,
        SHARES,
        ROPE,
        INTERLEAVED,
        1.0,
    )


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
    rope: Rope | None = None,
) -> QuantizedTensor:
    """As :func:`.reference.quantize_rows`, for INT8, INT4, FP8 and FP4.

    Args:
        rope: rotates ``x`` as it is loaded; then the twin's ``x`` is
            :func:`..rope.apply_rope` of it, and ``mean`` the mean of that.

    Raises:
        ValueError: another precision, or ``block`` is not 1, 32, 64 or 128, or not 1 for FP4.
    """
    check_rows(precision)
    if precision is Precision.FP4 and block != 1:
        raise ValueError(f"block must be 1 for fp4, got {block}")
    if block not in (1, 32, 64, 128):
        raise ValueError(f"block must be 1, 32, 64 or 128, got {block}")
    batch, heads, length, head_dim = x.shape
    dim = padded_dim(head_dim)
    rows = block if block > 1 else 16 if clip else 32
    blocks = cdiv(length, rows)
    codes, micro = empty_rows(x, precision)
    groups = length if block == 1 else blocks
    scale = torch.empty(batch, heads, groups, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        start_kernel(
            _quantize_rows_kernel,
            (blocks * batch * heads,),
            x,
            None if mean is None else mean.contiguous(),
            factor,
            sign_seed if rotation else None,
            codes,
            scale,
            micro,
            length,
            heads,
            1 if factor is None else heads // factor.shape[1],
            mean.shape[2] if mean is not None and mean.ndim == 4 else 1,
            *x.stride(),
            multiplier,
            **rope_arguments(rope, x),
            D=head_dim,
            DP=dim,
            LOG2_DP=dim.bit_length() - 1,
            FORMAT=precision.value,
            TOP=code_top(precision),
            BLOCK=rows,
            SPAN=rows,
            GROUPED=block != 1,
            MEAN_BLOCK=Q_BLOCK if mean is not None and mean.ndim == 4 else 0,
            OWN_MEAN=False,
            ROTATE=rotation,
            SHARES=shares(precision, clip),
            num_warps=4 if rows * dim <= (2048 if precision is Precision.FP4 else 8192) else 8,
            enable_fp_fusion=False,
        )
    return QuantizedTensor(codes, scale, precision, block, micro)


def quantize_smoothed_rows(
    x: Tensor,
    precision: Precision,
    *,
    factor: Tensor | None = None,
    rotation: bool = False,
    sign_seed: Tensor | None = None,
    clip: bool = False,
    multiplier: float = 1.0,
    rope: Rope | None = None,
) -> tuple[QuantizedTensor, Tensor]:
    """:func:`quantize_rows` minus the mean of every 128 rows, reading ``x`` once.

    ``rope`` rotates ``x`` first.

    Returns:
        The codes with one scale per row, and the means ``[B, H, ceil(L / 128), D]`` float32, as of
        :func:`block_mean`.

    Raises:
        ValueError: another precision than INT8, INT4, FP8 and FP4.
    """
    check_rows(precision)
    batch, heads, length, head_dim = x.shape
    dim, groups, device = padded_dim(head_dim), cdiv(length, Q_BLOCK), x.device
    codes, micro = empty_rows(x, precision)
    scale = torch.empty(batch, heads, length, dtype=torch.float32, device=device)
    mean = torch.empty(batch, heads, groups, head_dim, dtype=torch.float32, device=device)
    with torch.cuda.device_of(x):
        start_kernel(
            _quantize_rows_kernel,
            (groups * batch * heads,),
            x,
            mean,
            factor,
            sign_seed if rotation else None,
            codes,
            scale,
            micro,
            length,
            heads,
            1 if factor is None else heads // factor.shape[1],
            groups,
            *x.stride(),
            multiplier,
            **rope_arguments(rope, x),
            D=head_dim,
            DP=dim,
            LOG2_DP=dim.bit_length() - 1,
            FORMAT=precision.value,
            TOP=code_top(precision),
            BLOCK=16 if clip else 32,
            SPAN=Q_BLOCK,
            GROUPED=False,
            MEAN_BLOCK=Q_BLOCK,
            OWN_MEAN=True,
            ROTATE=rotation,
            SHARES=shares(precision, clip),
            num_warps=4 if rope is None else 8,  # room for the tables
            enable_fp_fusion=False,
        )
    return QuantizedTensor(codes, scale, precision, 1, micro), mean
