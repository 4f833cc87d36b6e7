"""Codes whose widths differ: by direction (K in a basis), or of three levels (V)."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import (
    TERNARY,
    Width,
    levels,
    pack_trits,
    row_words,
    unpack_trits,
)
from sage_diffusion.kernels.kv.quantize import decode, minmax
from sage_diffusion.kv.codes import pack, unpack
from sage_diffusion.kv.store import Store

#: Bits that a direction may have, 0 for one that is dropped.
WIDTHS = (0, 2, 3, 4, 5, 6, 8)

#: Tokens whose codes fill words of every width.
BLOCK = 32

#: Widths of the layout that make up one of ours, lowest bits first.
_PLANES: dict[int, tuple[int, ...]] = {
    2: (2,), 3: (3,), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)
}  # fmt: skip


def side_bits(size: int) -> float:
    """Bits per element of a step and a zero of 8 bits each, shared by ``size`` elements."""
    return 16 / size


def quantize(x: Tensor, top: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. ``top`` of groups along ``dim``.

    Returns:
        codes uint8, as ``x``; steps and zeros uint8, without ``dim``.
    """
    step, eight = minmax(x.amin(dim), x.amax(dim), top, "fp8")
    zero = eight.view(torch.uint8)
    scale, offset = _scales(step, zero, dim)
    return ((x - offset) / scale).round_().clamp_(0, top).to(torch.uint8), step, zero


def dequantize(codes: Tensor, step: Tensor, zero: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`quantize`, float32."""
    scale, offset = _scales(step, zero, dim)
    return torch.addcmul(offset, codes.float(), scale)


def _scales(step: Tensor, zero: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scale, offset = decode(step, zero.view(torch.float8_e4m3fn), 2)
    return scale.unsqueeze(dim), offset.unsqueeze(dim)


class Coefficients:
    """Coefficients ``[B, n, r]``, each direction with its width, min-max over groups of tokens.

    Args:
        widths: ``[r]`` int64, of :data:`WIDTHS`.
        group: most tokens of a group; the last of what is appended at once may have fewer.

    Attributes:
        kept: ``[s]`` int64, the directions that have bits, in the order in which they are read.
        stores: ``codes2``.., ``steps`` and ``zeros``.
    """

    def __init__(self, widths: Tensor, group: int):
        if group % BLOCK:
            raise ValueError(f"groups must be of a multiple of {BLOCK} tokens, got {group}")
        found = [(b, (widths == b).nonzero()[:, 0]) for b in WIDTHS[1:]]
        self.kinds = [(b, index) for b, index in found if index.numel()]
        self.kept = torch.cat([widths.new_empty(0), *(index for _, index in self.kinds)])
        self.group, self.tokens = group, 0
        self._sizes: list[int] = []  # tokens of each group
        self.stores = {f"codes{b}": Store(1) for b, _ in self.kinds}
        self.stores |= {"steps": Store(1), "zeros": Store(1)}

    def append(self, z: Tensor) -> None:
        """Quantize ``[B, n, r]``, n a multiple of :data:`BLOCK`."""
        for part in z.float().split(self.group, 1):
            found = []
            for b, index in self.kinds:
                codes, *side = quantize(part[:, :, index.to(z.device)], (1 << b) - 1, 1)
                self.stores[f"codes{b}"].append(_pack(codes, b))
                found.append(side)
            if found:
                steps, zeros = (torch.cat(x, -1)[:, None] for x in zip(*found, strict=True))
                self.stores["steps"].append(steps)
                self.stores["zeros"].append(zeros)
            self._sizes.append(part.shape[1])
            self.tokens += part.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` of the kept directions, ``[B, n, s]`` float32."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        counts = torch.tensor([-(-size // BLOCK) for size in self._sizes])
        group = torch.arange(len(self._sizes)).repeat_interleave(counts)[first:last]
        step, zero = (self.stores[name].read() for name in ("steps", "zeros"))
        group = group.to(step.device)
        parts, begin = [], 0
        for b, index in self.kinds:
            end = begin + index.numel()
            steps, zeros = (x[:, :, begin:end].index_select(1, group) for x in (step, zero))
            codes = _unpack(self.stores[f"codes{b}"].read(first, last), b)  # [B, blocks, s, 32]
            parts.append(dequantize(codes, steps, zeros, 3))
            begin = end
        z = torch.cat(parts, 2).transpose(2, 3).flatten(1, 2)
        return z[:, start - first * BLOCK : stop - first * BLOCK]

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``, a multiple of :data:`BLOCK`; a group may lose its end."""
        ends = list(accumulate(self._sizes))
        self._sizes = [
            min(size, tokens - (end - size))
            for size, end in zip(self._sizes, ends, strict=True)
            if end - size < tokens
        ]
        for name, store in self.stores.items():
            store.cut(len(self._sizes) if name in ("steps", "zeros") else tokens // BLOCK)
        self.tokens = tokens


def _pack(codes: Tensor, width: int) -> Tensor:
    """``[B, n, r]`` -> ``[B, n / 32, r, width]``: blocks of tokens take the layout's channels."""
    codes = codes.unflatten(1, (-1, BLOCK)).transpose(2, 3)
    words, low = [], 0
    for p in _PLANES[width]:
        words.append(pack((codes >> low) & ((1 << p) - 1), p))
        low += p
    return torch.cat(words, -1)


def _unpack(words: Tensor, width: int) -> Tensor:
    found, low = None, 0
    for p, part in zip(_PLANES[width], words.split(list(_PLANES[width]), -1), strict=True):
        codes = unpack(part.contiguous(), p, BLOCK) << low
        found, low = codes if found is None else found | codes, low + p
    assert found is not None
    return found


class TokenCodes:
    """Values ``[B, H, n, D]`` in groups of channels of one token, min-max.

    Three levels are not the layout's symmetric ones: they reach from the smallest to the largest
    value of a group, as the others do, and are stored five in a byte.

    Args:
        width: of the layout.
        group: channels.

    Attributes:
        stores: ``codes``, ``steps`` and ``zeros``.
    """

    def __init__(self, width: Width, group: int, dim: int):
        row_words(dim, width)
        if dim % group:
            raise ValueError(f"groups of {group} channels must divide the head's {dim}")
        self.width, self.group, self.dim = width, group, dim
        self.stores = {"codes": Store(), "steps": Store(), "zeros": Store()}

    def append(self, x: Tensor) -> None:
        parts = x.float().unflatten(-1, (-1, self.group))
        codes, step, zero = quantize(parts, levels(self.width) - 1, -1)
        codes, trits = codes.flatten(-2), self.width == TERNARY
        self.stores["codes"].append(pack_trits(codes) if trits else pack(codes, self.width))
        self.stores["steps"].append(step)
        self.stores["zeros"].append(zero)

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as float32 ``[B, H, n, D]``."""
        words, step, zero = (
            self.stores[name].read(start, stop) for name in ("codes", "steps", "zeros")
        )
        trits = self.width == TERNARY
        codes = unpack_trits(words, self.dim) if trits else unpack(words, self.width, self.dim)
        parts = codes.unflatten(-1, (-1, self.group))
        return dequantize(parts, step, zero, -1).flatten(-2)

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``."""
        for store in self.stores.values():
            store.cut(tokens)
