"""Packed keys or values of one layer, as the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Width, row_words, unpack
from .quantize import Axis, Groups, dequantize


class Side(NamedTuple):
    """Packed keys, or values, of ``tokens`` tokens; there may be room for C >= tokens.

    Attributes:
        words: ``[B, H, C, W]`` int32 (:func:`.layout.pack`).
        step, zero: as :func:`.quantize.quantize` gives them: ``[B, H, ceil(C / group), D]`` per
            channel, ``[B, H, C, D / group]`` per token.
        width: bits of a code, or "ternary".
        axis: "channel" or "token".
        group: tokens (per channel) or channels (per token) that share a step.
        dim: channels D.
        tokens: those that there are.
        largest: no step is larger; None where that is not known.
    """

    words: Tensor
    step: Tensor
    zero: Tensor | None
    width: Width
    axis: Axis
    group: int
    dim: int
    tokens: int
    largest: float | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start .. stop - 1 as ``[B, H, stop - start, D]`` float32; start begins a group."""
        if self.axis == "channel" and start % self.group:
            raise ValueError(f"start must be a multiple of {self.group}, got {start}")
        first, last = start, stop
        if self.axis == "channel":
            first, last = start // self.group, -(-stop // self.group)
            end = last * self.group
        else:
            end = stop
        codes = unpack(self.words[:, :, start:end], self.width, self.dim)
        step = self.step[:, :, first:last]
        zero = None if self.zero is None else self.zero[:, :, first:last]
        back = dequantize(Groups(codes, step, zero), self.width, self.axis)
        return back[:, :, : stop - start]


class Turn(NamedTuple):
    """RoPE of keys that were stored before it; channel i turns with channel i + D / 2.

    Attributes:
        angles: ``[D / 2]`` float64, radians a token.
        gain: that cosines and sines are multiplied by, as YaRN does.
        first: ``[B]`` int64, position of each sequence's token 0; may be negative.
    """

    angles: Tensor
    gain: float
    first: Tensor

    def keys(self, k: Tensor, start: int) -> Tensor:
        """``k [B, H, n, D]`` of tokens from ``start`` on, at their positions."""
        n = torch.arange(start, start + k.shape[2], device=k.device)
        return self._turned(k, self.first[:, None] + n)

    def queries(self, q: Tensor, token: Tensor) -> Tensor:
        """``q [B, Hq, L, D]`` so that products with keys before RoPE at ``token [S]`` are right.

        Returns:
            ``[S, B, Hq, L, D]`` float32.
        """
        positions = (self.first[None, :, None] + token[:, None, None]).expand(-1, -1, q.shape[2])
        many = q.expand(len(token), *q.shape)
        return self._turned(many.flatten(0, 1), -positions.flatten(0, 1)).view(many.shape)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x [B, H, n, D]`` at ``positions [B, n]``, float32."""
        angle = positions[:, None, :, None].double() * self.angles
        cos, sin = ((self.gain * found).float() for found in (angle.cos(), angle.sin()))
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def check(name: str, side: Side) -> None:
    """Whether the parts of a side fit each other.

    Raises:
        TypeError: a tensor has another type than it must have.
        ValueError: shapes or devices do not fit.
    """
    words, step = side.words, side.step
    if words.dtype != torch.int32 or step.dtype not in (torch.float16, torch.uint8):
        raise TypeError(
            f"{name} must have int32 words and float16 or uint8 steps, "
            f"got {words.dtype} and {step.dtype}"
        )
    batch, heads, room = words.shape[:3]
    if words.shape[3] != row_words(side.dim, side.width):
        raise ValueError(
            f"{name}: rows of {side.dim} channels at width {side.width} must have "
            f"{row_words(side.dim, side.width)} words, got {words.shape[3]}"
        )
    if side.axis == "channel":
        groups = -(-side.tokens // side.group)
        fits = room >= groups * side.group and step.shape[2] >= groups
        fits = fits and (*step.shape[:2], step.shape[3]) == (batch, heads, side.dim)
    else:
        fits = room >= side.tokens and step.shape[2] >= side.tokens
        shape = (batch, heads, side.dim // side.group)
        fits = fits and (*step.shape[:2], step.shape[3]) == shape and side.dim % side.group == 0
    if not fits or (side.zero is not None and side.zero.shape != step.shape):
        raise ValueError(
            f"{name}: {side.tokens} tokens in groups of {side.group} per {side.axis} do not fit "
            f"words {tuple(words.shape)} and steps {tuple(step.shape)}"
        )
    if step.device != words.device:
        raise ValueError(f"{name} must be on one device, got {words.device} and {step.device}")


def of_heads(x: Tensor) -> Tensor:
    """``[B, H, N, M]`` with one stride from head to head of all batches, rows side by side."""
    each = x.stride()
    if each[3] == 1 and each[2] == x.shape[3] and each[0] == x.shape[1] * each[1]:
        return x
    return x.contiguous()


def expanded(
    mask: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor | None, str, tuple[int, ...]]:
    """A mask as ``[B, Hq, L, tokens]``, how a kernel reads it, and its strides."""
    if mask is None:
        return None, "none", (0, 0, 0, 0)
    mask = mask.expand(shape)
    return mask, "bool" if mask.dtype == torch.bool else "additive", mask.stride()
