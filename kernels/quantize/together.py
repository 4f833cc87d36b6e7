"""Q, K and V of one attention call quantized in one launch.

A launch takes a host longer than these kernels take a card at a few thousand tokens.  The programs
of Q come first, then those of K, then those of V (:func:`.triton_rows.rows_program`,
:func:`.triton_value.value_program`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import (
    Q_BLOCK,
    TILE_N,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    Sample,
    cdiv,
    columns_length,
    padded_dim,
)
from ..rope import Rope
from ..spec import AttentionSpec
from ..start import start_kernel
from .limits import code_top
from .rope import TABLES, Tables, rope_arguments
from .stats import ChannelStats, extremes, joined
from .triton_rows import Rows, check_rows, empty_rows, rows_program
from .triton_value import Value, kernel_options, shares, value_arguments, value_program


@triton.jit
def _quantize_kernel(
    p_q,  # of Q, as of Rows
    p_q_mean,
    p_q_factor,
    p_q_codes,
    p_q_scale,
    p_q_micro,
    q_len,
    q_heads,
    group,
    q_means,
    q_b,  # strides
    q_h,
    q_l,
    q_d,
    multiplier,
    p_k,  # of K
    p_k_mean,
    p_k_factor,
    p_k_codes,
    p_k_scale,
    p_k_micro,
    p_k_columns,
    k_b,
    k_h,
    k_l,
    k_d,
    p_v,  # of V, as of Value; or None
    p_v_mean,
    p_v_low,
    p_v_high,
    p_v_codes,
    p_v_scale,
    p_v_micro,
    p_v_sums,
    p_v_tiles,
    k_len,
    kv_heads,
    v_b,
    v_h,
    v_l,
    v_d,
    p_seed,
    q_programs,
    k_programs,
    p_q_cos,  # tables of RoPE, or None
    p_q_sin,
    q_rope_b,
    q_rope_l,
    q_rope_d,
    p_k_cos,
    p_k_sin,
    k_rope_b,
    k_rope_l,
    k_rope_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOG2_DP: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    Q_SPAN: tl.constexpr,
    K_SPAN: tl.constexpr,
    OWN_MEAN: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARES: tl.constexpr,
    COLUMN_FACTOR: tl.constexpr,
    Q_ROPE: tl.constexpr,
    Q_INTERLEAVED: tl.constexpr,
    K_ROPE: tl.constexpr,
    K_INTERLEAVED: tl.constexpr,
    V_BLOCK_D: tl.constexpr,
    V_TOP: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_SHARES: tl.constexpr,
    PERMUTED: tl.constexpr,
    V_BY_TILE: tl.constexpr,
):
    program = tl.program_id(0)
    if program < q_programs:
        x = Rows(
            p_q,
            p_q_mean,
            p_q_factor,
            p_seed,
            p_q_codes,
            p_q_scale,
            p_q_micro,
            None,
            q_len,
            q_heads,
            group,
            q_means,
            q_b,
            q_h,
            q_l,
            q_d,
            multiplier,
        )
        rows_program(
            x,
            Tables(p_q_cos, p_q_sin, q_rope_b, q_rope_l, q_rope_d),
            program,
            D,
            DP,
            LOG2_DP,
            FORMAT,
            TOP,
            BLOCK,
            Q_SPAN,
            False,
            Q_SPAN,
            OWN_MEAN,
            ROTATE,
            SHARES,
            Q_ROPE,
            Q_INTERLEAVED,
            1.0,
        )
    elif program < q_programs + k_programs:
        y = Rows(
            p_k,
            p_k_mean,
            p_k_factor,
            p_seed,
            p_k_codes,
            p_k_scale,
            p_k_micro,
            p_k_columns,
            k_len,
            kv_heads,
            1,
            1,
            k_b,
            k_h,
            k_l,
            k_d,
            1.0,
        )
        rows_program(
            y,
            Tables(p_k_cos, p_k_sin, k_rope_b, k_rope_l, k_rope_d),
            program - q_programs,
            D,
            DP,
            LOG2_DP,
            FORMAT,
            TOP,
            BLOCK,
            K_SPAN,
            False,
            0,
            False,
            ROTATE,
            SHARES,
            K_ROPE,
            K_INTERLEAVED,
            COLUMN_FACTOR,
        )
    elif p_v is not None:
        v = Value(
            p_v,
            p_v_mean,
            p_v_low,
            p_v_high,
            p_v_codes,
            p_v_scale,
            p_v_micro,
            p_v_sums,
            p_v_tiles,
            k_len,
            kv_heads,
            v_b,
            v_h,
            v_l,
            v_d,
        )
        program -= q_programs + k_programs
        value_program(v, program, D, V_BLOCK_D, V_TOP, V_FORMAT, V_SHARES, PERMUTED, V_BY_TILE)


def quantize_together(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    found: Sample,
    *,
    multiplier: float = 1.0,
    permuted: bool = False,
    column_factor: float | None = None,
    rope_q: Rope | None = None,
    rope_k: Rope | None = None,
    sign_seed: Tensor | None = None,
) -> tuple[QuantizedTensor, Tensor | None, QuantizedTensor, Tensor | QuantizedValue]:
    """What :mod:`.triton` does with Q, K and V, one scale for each of their tokens.

    Args:
        q: ``[B, H, Lq, D]``; k, v: ``[B, Hkv, Lk, D]``, any float dtype and strides.
        spec: of a balanced call.
        found: what is taken out of K and V, and what their channels are multiplied by.
        multiplier: folded into Q's scales.
        permuted: V's tokens in the order of P's registers.
        column_factor: K's scales are wanted in column order too, times this
            (:func:`..attention.gluon_columns.key_scales`).
        rope_q, rope_k: rotate q and k as they are loaded.
        sign_seed: of the rotation's signs.

    Returns:
        Q, its means of every 128 rows if the spec smooths it, K, and V.

    Raises:
        ValueError: Q and K in another format than INT8, INT4, FP8 and FP4.
    """
    check_rows(spec.qk)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len, dim, device = k.shape[1], k.shape[2], padded_dim(head_dim), q.device
    q_codes, q_micro = empty_rows(q, spec.qk)
    k_codes, k_micro = empty_rows(k, spec.qk)
    q_scale = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    k_scale = torch.empty(k.shape[:3], dtype=torch.float32, device=device)
    # Rows at a time, and of a program: loops cost registers, and 4 bit has none to lose.
    rows = 16 if spec.clip else 32
    q_span, k_span = Q_BLOCK if spec.smooth_q else rows, TILE_N if spec.clip else rows
    q_blocks, k_blocks = cdiv(q_len, q_span), cdiv(k_len, k_span)
    q_mean = columns = None
    if spec.smooth_q:
        q_mean = torch.empty(batch, heads, q_blocks, head_dim, dtype=torch.float32, device=device)
    if column_factor is not None:
        k_blocks = columns_length(k_len) // k_span
        shape = (batch, kv_heads, columns_length(k_len) // TILE_N, 2, TILE_N)
        columns = torch.empty(shape, dtype=torch.float32, device=device)
    values, value, constants, v_programs = _value(v, spec, found, permuted)
    programs = q_blocks * batch * heads, k_blocks * batch * kv_heads
    turn_q, turn_k = rope_arguments(rope_q, q), rope_arguments(rope_k, k)
    with torch.cuda.device_of(q):
        start_kernel(
            _quantize_kernel,
            (sum(programs) + v_programs,),
            q,
            q_mean,
            found.q_factor,
            q_codes,
            q_scale,
            q_micro,
            q_len,
            heads,
            heads // kv_heads,
            q_blocks,
            *q.stride(),
            multiplier,
            k,
            found.k_mean,
            found.k_factor,
            k_codes,
            k_scale,
            k_micro,
            columns,
            *k.stride(),
            *value[:9],
            k_len,
            kv_heads,
            *v.stride(),
            sign_seed if spec.rotate else None,
            *programs,
            *(turn[name] for turn in (turn_q, turn_k) for name in TABLES),
            D=head_dim,
            DP=dim,
            LOG2_DP=dim.bit_length() - 1,
            FORMAT=spec.qk.value,
            TOP=code_top(spec.qk),
            BLOCK=rows,
            Q_SPAN=q_span,
            K_SPAN=k_span,
            OWN_MEAN=spec.smooth_q,
            ROTATE=spec.rotate,
            SHARES=shares(spec.qk, spec.clip),
            COLUMN_FACTOR=column_factor,
            Q_ROPE=turn_q["ROPE"],
            Q_INTERLEAVED=turn_q["INTERLEAVED"],
            K_ROPE=turn_k["ROPE"],
            K_INTERLEAVED=turn_k["INTERLEAVED"],
            **constants,
            **_launch(spec, dim, rope_q is not None),
            enable_fp_fusion=False,
        )
    return (
        QuantizedTensor(q_codes, q_scale, spec.qk, 1, q_micro),
        q_mean,
        QuantizedTensor(k_codes, k_scale, spec.qk, 1, k_micro, columns),
        values,
    )


def _launch(spec: AttentionSpec, dim: int, rotated: bool) -> dict[str, Any]:
    """Warps of a program, more where registers are short: wide rows, RoPE's tables, searches."""
    if spec.pv is Precision.FP4:  # on NVIDIA cards only
        return {"num_warps": 8, "maxnreg": 128}
    searches = spec.clip and spec.qk is Precision.INT4
    return {"num_warps": 8 if dim > 128 or searches or (spec.smooth_q and rotated) else 4}


def _scale(v: Tensor, spec: AttentionSpec, found: Sample) -> Tensor | ChannelStats | None:
    """V's scales, or what they come from; None where every tile finds its own."""
    if spec.tile_v:
        return None
    if found.v_scale is not None:
        return found.v_scale
    return extremes(v) if found.v_extremes is None else joined(found.v_extremes)


def _value(
    v: Tensor, spec: AttentionSpec, found: Sample, permuted: bool
) -> tuple[Tensor | QuantizedValue, tuple[Any, ...], dict[str, Any], int]:
    """V's part of the launch, as of :func:`.triton_value.value_arguments`; in half it has none."""
    names = ("BLOCK_D", "TOP", "FORMAT", "SHARES", "BY_TILE")
    if spec.pv is Precision.FP16:
        nothing = {f"V_{name}": None for name in names}
        return v, (None,) * len(Value._fields), {**nothing, "PERMUTED": False}, 0
    made, value, constants, programs = value_arguments(
        v,
        spec.pv,
        mean=found.v_mean,
        scale=_scale(v, spec, found),
        **kernel_options(spec, permuted),
    )
    own = {f"V_{name}": constants[name] for name in names}
    return made, value, {**own, "PERMUTED": permuted}, programs
