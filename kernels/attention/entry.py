"""What the hosts of all attention kernels do alike.

A backend's ``attention`` is :func:`attention_of` its record, which quantizes and calls
``attend_quantized`` of the record's module; what those have in common stands below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..formats import Q_BLOCK, QuantizedTensor, cdiv, columns_length, padded_dim
from ..rope import Rope
from ..spec import AttentionSpec
from .gluon_columns import as_columns, key_bias
from .operands import Operands, quantize_operands
from .record import Kernels, Tuned
from .terms import smoothed_lse

#: Delta-S of smoothed Q exists for this many bytes of query blocks at a time.
BIAS_BYTES = 64 * 2**20

#: ``bias(first_block, blocks)`` -> ``[B, H, blocks, columns]`` for blocks of 128 query rows.
Bias = Callable[[int, int], Tensor]


def attention_of(kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A backend's entry: :func:`.reference.attention` on its kernels."""

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
        sign_seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As :func:`.reference.attention` for the specs that the kernels compute.

        Args:
            tuned: launches measured on this card, instead of the built-in ones.
            rope_q, rope_k: rotate q and k as they are quantized.
            sign_seed: read by the kernels, so that a captured graph can be fed another.

        Returns:
            Output ``[B, H, Lq, D]`` in q's dtype, and the natural log-sum-exp ``[B, H, Lq]``
            float32 if ``return_lse``, else None.

        Raises:
            ValueError: the spec is not one of these kernels'.
        """
        reason = kernels.unsupported_spec(spec)
        if reason is not None:
            raise ValueError(f"{spec}: {reason}")
        dtype = q.dtype
        if dtype == torch.float64:
            q, k, v = q.float(), k.float(), v.float()
        x = quantize_operands(
            q,
            k,
            v,
            spec,
            scale,
            permuted=kernels.permuted(spec),
            column_factor=kernels.column_factor(spec),
            rope_q=rope_q,
            rope_k=rope_k,
            sign_seed=sign_seed,
        )
        options: dict[str, Any] = {}
        key_mask = None
        if kernels.adds_key_masks and mask is not None and (mask.ndim < 2 or mask.shape[-2] == 1):
            # One mask for all queries costs next to nothing as part of the bias.
            key_mask, mask = mask.expand(q.shape[0], q.shape[1], 1, k.shape[2]), None
        if spec.unsigned_p:
            options["unsigned_p"] = True
        if x.q_mean is not None or key_mask is not None:
            options["bias"] = bias_of(x, q.shape[1], k, rope_k, key_mask)
        out, lse = kernels.load().attend_quantized(
            x.q,
            x.k,
            x.v,
            mask=mask,
            is_causal=is_causal,
            fp16_accumulator=spec.pv_accumulator == "fp16",
            out_dtype=dtype,
            return_lse=return_lse,
            launch=None if tuned is None else tuned(q.device, spec, padded_dim(q.shape[-1])),
            **options,
        )
        if lse is not None and x.k_mean is not None:
            lse = lse + smoothed_lse(q, x.k_mean, x.sm_scale, rope_q)
        return out, lse

    return attention


def bias_of(
    x: Operands, heads: int, k: Tensor, rope_k: Rope | None = None, mask: Tensor | None = None
) -> Bias:
    """Delta-S, a mask of the keys, or their sum.

    Args:
        x: with the means of Q and K.
        heads: of Q.
        k: ``[B, Hkv, Lk, D]``, which ``rope_k`` rotates.
        mask: ``[B, H, 1, Lk]``.
    """

    def bias(first: int, count: int) -> Tensor:
        if x.q_mean is None:
            return key_bias(heads, k, mask=mask).expand(-1, -1, count, -1)
        return key_bias(
            heads,
            k,
            q_mean=x.q_mean,
            k_mean=x.k_mean,
            multiplier=x.multiplier,
            rope=rope_k,
            mask=mask,
            first_block=first,
            blocks=count,
        )

    return bias


def in_columns(delta_s: Tensor) -> Bias:
    """Of the twin's delta-S, in token order."""
    columns = as_columns(delta_s)
    return lambda first, count: columns[:, :, first : first + count].contiguous()


def in_parts(
    q: QuantizedTensor, k_len: int, block_m: int, bias: Bias | None, least: int = 1
) -> Iterator[tuple[int, int, Tensor | None, tuple[int, ...]]]:
    """Launches of a call: first query block, number of blocks, their bias and its strides.

    Args:
        q: its codes.
        k_len: keys.
        block_m: query rows of a block.
        bias: what is added, :data:`BIAS_BYTES` of it at a time; all blocks at once if None.
        least: 128-row blocks of a launch, however large their bias is.
    """
    batch, heads, q_len = q.data.shape[:3]
    blocks, ratio = cdiv(q_len, block_m), Q_BLOCK // block_m
    if bias is None:
        yield 0, blocks, None, (0, 0, 0)
        return
    fitting = BIAS_BYTES // (4 * batch * heads * columns_length(k_len))
    chunk = min(blocks, max(least, fitting) * ratio)
    for first in range(0, blocks, chunk):
        count = min(chunk, blocks - first)
        added = bias(first // ratio, cdiv(count, ratio))
        yield first, count, added, added.stride()[:3]


def outputs(
    q: QuantizedTensor, head_dim: int, dtype: torch.dtype, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Memory for the output, and for the log-sum-exp if it is asked for."""
    shape, device = q.data.shape[:3], q.data.device
    out = torch.empty(*shape, head_dim, dtype=dtype, device=device)
    return out, torch.empty(shape, dtype=torch.float32, device=device) if return_lse else None


def readable(mask: Tensor) -> tuple[int, Tensor]:
    """1 (boolean) or 2 (additive), and the mask in a type that Triton reads."""
    if mask.dtype == torch.bool:
        return 1, mask.view(torch.uint8)
    return 2, mask.float() if mask.dtype == torch.float64 else mask
