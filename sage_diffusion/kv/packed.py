"""One side, K or V, of one layer's older tokens: codes in words, steps and zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sage_diffusion.kv.store import Store

#: Tokens whose codes share words.
TILE = 256


def pack(codes: Tensor, width: int) -> Tensor:
    """Codes uint8 ``[.., T, D]`` -> words int32 ``[.., W, D]``, planes of bits tile by tile."""
    tokens = codes.shape[-2]
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -tokens % TILE)).unflatten(-2, (-1, 8, 32))
    bit = torch.arange(32, device=codes.device)[:, None]
    planes = [(((codes >> p) & 1).long() << bit).sum(-2) for p in range(width)]  # [.., t, 8, D]
    words = torch.stack(planes, -3).flatten(-4, -2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack(words: Tensor, width: int, tokens: int) -> Tensor:
    """The first ``tokens`` codes uint8 ``[.., tokens, D]``."""
    planes = words.unflatten(-2, (-1, width, 8, 1))
    bit = torch.arange(32, device=words.device, dtype=torch.int32)[:, None]
    bits = (planes >> bit) & 1  # [.., t, width, 8, 32, D]
    codes = sum(bits.select(-4, p) << p for p in range(width))
    assert isinstance(codes, Tensor)
    return codes.flatten(-4, -2)[..., :tokens, :].to(torch.uint8)


@dataclass(frozen=True)
class Groups:
    """Uniform min-max quantization: how many levels, and which elements share a step and a zero.

    Attributes:
        width: bits of a code.
        axis: "channel" for ``size`` tokens of one channel, "token" for ``size`` channels of one.
        size: elements of a group.
    """

    width: int
    axis: Literal["channel", "token"]
    size: int = 32

    def check(self, dim: int) -> None:
        """Raise ValueError unless channels divide into groups."""
        if self.axis == "token" and dim % self.size:
            raise ValueError(f"groups of {self.size} channels must divide the head's {dim}")

    def split(self, x: Tensor) -> tuple[Tensor, int]:
        """``[B, H, n, D]`` with the groups' axis apart, and that axis."""
        if self.axis == "channel":
            return x.unflatten(2, (-1, self.size)), 3
        return x.unflatten(3, (-1, self.size)), 4


class PackedSide:
    """Codes, steps and zeros of ``[B, H, T, D]``, appended group by group.

    Attributes:
        stores: ``codes`` int32 words, ``steps`` and ``zeros`` FP16.
    """

    def __init__(self, groups: Groups):
        self.groups, self.tokens = groups, 0
        self.stores = {"codes": Store(), "steps": Store(), "zeros": Store()}

    def append(self, x: Tensor) -> None:
        """Quantize ``x``; the last tile is packed anew if it was not full."""
        x, axis = self.groups.split(x.float())
        levels = 2**self.groups.width - 1
        zero = x.amin(axis, keepdim=True).half()
        step = ((x.amax(axis, keepdim=True) - zero.float()) / levels).half()
        codes = ((x - zero.float()) / step.float().clamp(min=1e-9)).round_().clamp_(0, levels)
        self.stores["steps"].append(step.squeeze(axis))
        self.stores["zeros"].append(zero.squeeze(axis))
        self._append_codes(codes.to(torch.uint8).flatten(axis - 1, axis))

    def _append_codes(self, codes: Tensor) -> None:
        words, width = self.stores["codes"], self.groups.width
        full, over = divmod(self.tokens, TILE)
        added = codes.shape[2]
        if over:
            last = unpack(words.read(full * 8 * width), width, over)
            codes = torch.cat((last, codes), 2)
            words.cut(full * 8 * width)
        words.append(pack(codes, width))
        self.tokens += added

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as float32 ``[B, H, n, D]``."""
        size = self.groups.size if self.groups.axis == "channel" else 1
        first, last = start // TILE, -(-stop // TILE)
        rows = 8 * self.groups.width
        words = self.stores["codes"].read(first * rows, last * rows)
        codes = unpack(words, self.groups.width, stop - first * TILE)[:, :, start - first * TILE :]
        lead = start % size  # tokens of the first group that are not wanted
        step, zero = (
            self.stores[name].read(start // size, -(-stop // size)).float()
            for name in ("steps", "zeros")
        )
        if self.groups.axis == "channel":
            step, zero = (
                x.repeat_interleave(size, 2)[:, :, lead : lead + stop - start] for x in (step, zero)
            )
            return codes.float().mul_(step).add_(zero)
        grouped = codes.float().unflatten(3, (-1, self.groups.size))
        return grouped.mul_(step[..., None]).add_(zero[..., None]).flatten(3)

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``, whole groups."""
        size = self.groups.size if self.groups.axis == "channel" else 1
        self.stores["codes"].cut(-(-tokens // TILE) * 8 * self.groups.width)
        for name in ("steps", "zeros"):
            self.stores[name].cut(tokens // size)
        self.tokens = tokens
