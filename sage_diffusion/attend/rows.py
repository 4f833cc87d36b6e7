"""What a spec does to one attention call, judged on a few query rows against all keys.

A row's softmax sees every key, so a handful of rows tells the whole call's error at
``O(rows * Lk * D)`` instead of ``O(Lq * Lk * D)``.  Rows are gathered after everything that looks
at more than one row of Q (block means, scales per block), so their codes are bit-exact those of the
whole call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend.calls import AttentionEvent, Call
from sage_diffusion.attend.validation import four_dims
from sage_diffusion.kernels.attention import reference
from sage_diffusion.kernels.formats import (
    K_SCALE_BLOCK,
    LOG2E,
    Q_BLOCK,
    Q_SCALE_BLOCK,
    Precision,
    QuantizedTensor,
    Sample,
)
from sage_diffusion.kernels.quantize import reference as quantize
from sage_diffusion.kernels.quantize.limits import score_gain, value_options
from sage_diffusion.kernels.spec import FP16, AttentionSpec

#: Columns of what :func:`measure` returns.  ``error`` is the squared error relative to the squared
#: output: unlike the other two it adds up over calls, so plans are made with it.
METRICS = ("cosine", "rel_l1", "error")

#: Values of K, and as many of V, that are held in float32 at once: 256 MiB each.
_MAX_VALUES = 1 << 26

#: Scores that exact attention holds in float32 at once, about 256 MiB.
_MAX_SCORES = 1 << 26


class RowCall:
    """One attention call cut down to some of its query rows; codes are made once per form.

    Args:
        q: ``[B, H, Lq, D]`` float; k, v: ``[B, Hkv, Lk, D]``.
        index: ``[R]`` int64, the rows to compute.
        mask: None, boolean or additive, broadcastable to ``[B, H, Lq, Lk]``.
        is_causal: query i sees keys 0 .. i.
        scale: softmax scale, ``1 / sqrt(D)`` if None.
        sign_seed: as in :class:`.Call`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        sign_seed: Tensor | None = None,
    ):
        self.q, self.k, self.v, self.index = q, k, v, index
        self.sign_seed = sign_seed
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.mask = row_mask(mask, is_causal, index, k.shape[2])
        self._made: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def of(cls, call: Call, index: Tensor) -> RowCall:
        """Some rows of a call whose q and k are rotated."""
        q, k, v, mask, is_causal, scale = call[:6]
        mask = four_dims(mask)
        return cls(
            q,
            k,
            v,
            index,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            sign_seed=call.sign_seed,
        )

    @classmethod
    def seen(cls, event: AttentionEvent, index: Tensor) -> RowCall:
        """Some rows of a call as an observer sees it."""
        return cls(
            event.q,
            event.k,
            event.v,
            index,
            mask=event.mask,
            is_causal=event.is_causal,
            scale=event.scale,
            sign_seed=event.sign_seed,
        )

    def exact(self) -> Tensor:
        """The rows of exact attention in float32, ``[B, H, R, D]``."""
        batch, kv_heads, k_len, dim = self.k.shape
        group = self.q.shape[1] // kv_heads
        # K and V of a long video would double their memory in float32: some heads at a time.
        some = max(1, _MAX_VALUES // (batch * k_len * dim))
        parts = []
        for first in range(0, kv_heads, some):
            kv, heads = slice(first, first + some), slice(first * group, (first + some) * group)
            mask = self.mask
            if mask is not None and mask.shape[1] != 1:
                mask = mask[:, heads]
            out, _ = reference.attention(
                self.q[:, heads, self.index].float(),
                self.k[:, kv].float(),
                self.v[:, kv].float(),
                FP16,
                mask=mask,
                scale=self.scale,
            )
            parts.append(out)
        return torch.cat(parts, 1)

    def run(self, spec: AttentionSpec) -> Tensor:
        """The rows as ``spec`` computes them, ``[B, H, R, D]`` float32."""
        if not spec.quantized:
            return self.exact()
        q_mean = self._q_mean() if spec.smooth_q else None
        k_mean, v_mean, q_factor, k_factor, v_scale, _ = self._means_and_factors(spec)
        mask = self.mask
        if q_mean is not None:
            mask = self._with_delta(spec, q_mean, k_mean)
        values: Any = self.v
        if spec.pv is not Precision.FP16:
            values = self._value(spec, v_mean, v_scale)
        return reference.attend_quantized(
            self._q_codes(spec, q_mean, q_factor),
            self._k_codes(spec, k_mean, k_factor),
            values,
            mask=mask,
            fp16_accumulator=spec.pv_accumulator == "fp16",
            unsigned_p=spec.unsigned_p,
        )[0]

    def _means_and_factors(self, spec: AttentionSpec) -> Sample:
        balanced = spec.balance and (spec.smooth_q, spec.sample_v and _of_value(spec))
        key = ("means", balanced, spec.smooth_k, spec.smooth_v)
        if key not in self._made:
            self._made[key] = reference.means_and_factors(self.q, self.k, self.v, spec)
        return self._made[key]

    def _q_codes(
        self, spec: AttentionSpec, mean: Tensor | None, factor: Tensor | None
    ) -> QuantizedTensor:
        key = ("q", *_of_rows(spec), spec.unbiased, spec.smooth_k and spec.balance)
        if key not in self._made:
            self._made[key] = self._quantize_q(spec, mean, factor)
        return self._made[key]

    def _quantize_q(
        self, spec: AttentionSpec, mean: Tensor | None, factor: Tensor | None
    ) -> QuantizedTensor:
        options: dict[str, Any] = {
            "rotation": spec.rotate,
            "sign_seed": self.sign_seed,
            "clip": spec.clip,
            "factor": factor,
            "multiplier": self.scale * LOG2E * score_gain(spec, self.q.shape[-1]),
        }
        if spec.granularity == "token":
            rows = self.q[:, :, self.index].float()
            if mean is not None:
                rows = rows - mean[:, :, self.index // Q_BLOCK]
            return quantize.quantize_rows(rows, spec.qk, **options)
        # A scale per block looks at the block's other rows: quantize all of Q, then gather.
        codes = quantize.quantize_rows(self.q, spec.qk, mean=mean, block=Q_SCALE_BLOCK, **options)
        return codes._replace(
            data=codes.data[:, :, self.index],
            scale=codes.scale[:, :, self.index // Q_SCALE_BLOCK],
            block=1,
        )

    def _k_codes(
        self, spec: AttentionSpec, mean: Tensor | None, factor: Tensor | None
    ) -> QuantizedTensor:
        key = ("k", *_of_rows(spec), spec.smooth_k)
        if key not in self._made:
            self._made[key] = quantize.quantize_rows(
                self.k,
                spec.qk,
                mean=mean,
                factor=factor,
                rotation=spec.rotate,
                sign_seed=self.sign_seed,
                clip=spec.clip,
                block=K_SCALE_BLOCK if spec.granularity == "block" else 1,
            )
        return self._made[key]

    def _value(self, spec: AttentionSpec, mean: Tensor | None, scale: Tensor | None) -> Any:
        options = {"by_tile": spec.tile_v, **value_options(spec)}
        smoothed = spec.smooth_v and (1, spec.balance)
        key = ("v", spec.pv, smoothed, spec.sample_v, *options.values())
        if key not in self._made:
            self._made[key] = quantize.quantize_value(
                self.v, spec.pv, mean=mean, scale=scale, **options
            )
        return self._made[key]

    def _q_mean(self) -> Tensor:
        if ("q_mean",) not in self._made:
            self._made["q_mean",] = quantize.block_mean(self.q, Q_BLOCK)
        return self._made["q_mean",]

    def _with_delta(self, spec: AttentionSpec, q_mean: Tensor, k_mean: Tensor | None) -> Tensor:
        """What smooth_q took out of S, added back row by row as an additive mask."""
        key = ("delta", spec.smooth_k, spec.balance)
        if key not in self._made:
            blocks = reference.delta_s(q_mean, self.k, k_mean, self.scale)
            delta = blocks[:, :, self.index // Q_BLOCK]
            if self.mask is not None and self.mask.dtype == torch.bool:
                delta = torch.where(self.mask, delta, -torch.inf)
            elif self.mask is not None:
                delta = delta + self.mask.float()
            self._made[key] = delta
        return self._made[key]


def _of_rows(spec: AttentionSpec) -> tuple[Any, ...]:
    """What codes of Q or K depend on beside their mean."""
    return spec.qk, spec.smooth_q, spec.rotate, spec.balance, spec.clip, spec.granularity


def _of_value(spec: AttentionSpec) -> tuple[Precision, bool]:
    """The format of V, and whether P V accumulates in FP16."""
    return spec.pv, spec.pv_accumulator == "fp16"


def row_mask(mask: Tensor | None, is_causal: bool, index: Tensor, k_len: int) -> Tensor | None:
    """The mask of the chosen rows, the causal triangle folded in.

    Args:
        mask: None, boolean or additive, broadcastable to ``[B, H, Lq, Lk]``.
        is_causal: query i sees keys 0 .. i.
        index: ``[R]`` int64.
        k_len: Lk.

    Returns:
        None, boolean or additive, broadcastable to ``[B, H, R, Lk]``.
    """
    if mask is not None and mask.ndim < 4:
        mask = mask[(None,) * (4 - mask.ndim)]
    if mask is not None and mask.shape[2] != 1:
        mask = mask[:, :, index]
    if not is_causal:
        return mask
    seen = torch.arange(k_len, device=index.device) <= index[:, None]
    if mask is None:
        return seen[None, None]
    if mask.dtype == torch.bool:
        return mask & seen
    return torch.where(seen, mask.float(), -torch.inf)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Attention in float32, a slice of query rows at a time.

    Args:
        q: ``[B, H, Lq, D]``; k, v: ``[B, Hkv, Lk, D]``.
        mask: boolean (True: attend) or additive, broadcastable to ``[B, H, Lq, Lk]``.
        is_causal: query i sees keys 0 .. i, combined with ``mask``.
        scale: softmax scale, ``1 / sqrt(D)`` if None.
        rows: ``[R]`` int64, the query rows to compute; all if None.

    Returns:
        ``[B, H, R, D]`` float32; a fully masked row gives 0.
    """
    batch, heads, q_len, _ = q.shape
    if rows is None:
        rows = torch.arange(q_len, device=q.device)
    parts = [
        RowCall(q, k, v, some, mask=mask, is_causal=is_causal, scale=scale).exact()
        for some in rows.split(max(1, _MAX_SCORES // (batch * heads * k.shape[2])))
    ]
    return torch.cat(parts, 2)


def sample_rows(q_len: int, rows: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """``min(rows, q_len)`` distinct rows in ascending order, one in each equal stretch of Q."""
    if rows >= q_len:
        return torch.arange(q_len, device=device)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.linspace(0, q_len, rows + 1).long()
    width = edges[1:] - edges[:-1]
    index = edges[:-1] + (torch.rand(rows, generator=generator) * width).long()
    return index.to(device)


def compare_rows(out: Tensor, exact: Tensor) -> Tensor:
    """Cosine, relative L1 and relative squared error of ``out``, float32 ``[3]`` (METRICS).

    A non-finite or zero-norm comparison is the worst there is (cosine 0, L1 1, error 1) unless both
    are zero: a poisoned layer must look bad in a table, not missing.
    """
    a, b = out.float().flatten(), exact.float().flatten()
    power = b.square().sum()
    cosine = (a @ b) / (a.norm() * b.norm()).clamp(min=1e-30)
    l1 = (a - b).abs().sum() / b.abs().sum().clamp(min=1e-30)
    error = (a - b).square().sum() / power.clamp(min=1e-30)
    both_zero = (power == 0) & (a.square().sum() == 0)
    found = torch.stack([torch.where(both_zero, 1.0, cosine), l1, error])
    # 0, 1, 1, made on the device: a list would be copied there, and the copy waited for.
    worst = torch.arange(3, dtype=found.dtype, device=found.device).clamp(max=1.0)
    return torch.where(found.isfinite().all(), found, worst)


def measure(call: RowCall, specs: Sequence[AttentionSpec], exact: Tensor | None = None) -> Tensor:
    """:data:`METRICS` of every spec on the call's rows, float32 ``[len(specs), 3]``.

    ``exact``: ``[B, H, R, D]`` where the caller has it already.
    """
    truth = call.exact() if exact is None else exact
    return torch.stack([compare_rows(call.run(spec), truth) for spec in specs])


def outliers(x: Tensor) -> Tensor:
    """How far a tensor's worst channel sticks out: max over channels of ``max|x_c| / rms(x)``.

    ``[B, H, L, D]`` -> scalar, the worst head counts.  About 4 for Gaussian values.
    """
    values = x.float()
    rms = values.square().mean((2, 3)).sqrt().clamp(min=1e-30)  # [B, H]
    return (values.abs().amax((2, 3)) / rms).max()
