"""Codes of few bits in words of 32, laid out for the decode kernel's registers.

A token's words are its own: appending is writing rows, cropping and choosing are slices.  A row
holds one *plane* after another; a plane has p bits of every code, and 3 bits are a plane of 2 and
one of 1.  Within a plane of a head of D channels:

* channel ``16 m + 2 g + h`` (m < D / 16, g < 8, h < 2) has the slot ``s = g * (D / 16) + m`` of the
  halves h: low (0) or high (1) 16 bits of a word;
* slot s of p = 2, 4, 8 is bit ``p * (s % (16 / p))`` of the halves of word ``s // (16 / p)``;
* a plane of 1 bit follows that of 2: its word w has word 2 w in its even bits, 2 w + 1 in the odd.

So a lane of a tensor-core product finds the channels that it multiplies in words of its own, two
neighbours in the two halves of a word, and a constant shift goes from one 16 channels to the next:
an AND and an OR with a constant make two half-precision numbers, and nothing moves between lanes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: Codes of three levels, 0, 1 and 2, stored in 2 bits.
TERNARY: Literal["ternary"] = "ternary"

#: Bits of a code, or :data:`TERNARY`.
Width = int | Literal["ternary"]

WIDTHS: tuple[Width, ...] = (8, 4, 3, 2, TERNARY, 1)

#: Channels whose codes fill words of any width.
BLOCK = 32

#: Trits in a byte of the parked form.
TRITS = 5


def bits(width: Width) -> int:
    """Stored bits of a code.

    Raises:
        ValueError: there is no such width.
    """
    if width not in WIDTHS or isinstance(width, bool):
        raise ValueError(f"width must be one of {', '.join(map(str, WIDTHS))}, got {width!r}")
    return 2 if width == TERNARY else int(width)


def levels(width: Width) -> int:
    """Codes are 0 .. levels - 1."""
    return 3 if width == TERNARY else 1 << bits(width)


def planes(width: Width) -> tuple[int, ...]:
    """Bits of the planes, those of the lowest bits first."""
    stored = bits(width)
    return (2, 1) if stored == 3 else (stored,)


def row_words(dim: int, width: Width) -> int:
    """Words of a token of ``dim`` channels; missing ones up to a multiple of 32 are zeros."""
    return -(-dim // BLOCK) * bits(width)


def pack(codes: Tensor, width: Width) -> Tensor:
    """Words of codes.

    Args:
        codes: ``[..., T, D]`` uint8, each below :func:`levels`.
        width: bits of a code, or "ternary".

    Returns:
        ``[..., T, row_words(D, width)]`` int32.

    Raises:
        TypeError: the codes are not uint8.
        ValueError: a code is too large, or there is no such width.
    """
    count = levels(width)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() and count < 256 and int(codes.max()) >= count:
        raise ValueError(f"codes of width {width} must be below {count}, got {int(codes.max())}")
    return pack_checked(codes, width)


def pack_checked(codes: Tensor, width: Width) -> Tensor:
    """:func:`pack` of codes that are known to fit: looks at no value, so waits for no GPU."""
    slots = _slots(codes)
    words, low = [], 0
    for p in planes(width):
        part = slots if (p, low) == (8, 0) else (slots >> low) & ((1 << p) - 1)
        words.append(_plane(part, p))
        low += p
    return torch.cat(words, -1) if len(words) > 1 else words[0]


def unpack(words: Tensor, width: Width, dim: int) -> Tensor:
    """Codes of words.

    Args:
        words: ``[..., T, row_words(dim, width)]`` int32.
        width: bits of a code, or "ternary".
        dim: channels D.

    Returns:
        ``[..., T, D]`` uint8.

    Raises:
        TypeError: the words are not int32.
        ValueError: a row has another number of words.
    """
    count = row_words(dim, width)
    if words.dtype != torch.int32:
        raise TypeError(f"words must be int32, got {words.dtype}")
    if words.shape[-1] != count:
        raise ValueError(
            f"rows of {dim} channels at width {width} must have {count} words, "
            f"got {words.shape[-1]}"
        )
    blocks = -(-dim // BLOCK)
    slots, low = None, 0
    for p, plane in zip(
        planes(width), words.split([blocks * p for p in planes(width)], -1), strict=True
    ):
        part = _from_plane(plane, p) << low
        slots = part if slots is None else slots | part
        low += p
    assert slots is not None  # every width has a plane
    return _channels(slots)[..., :dim]


def _slots(codes: Tensor) -> Tensor:
    """``[..., D]`` -> ``[..., D / 2, 2]``: slots, and the halves h."""
    dim = codes.shape[-1]
    padded = -(-dim // BLOCK) * BLOCK
    if padded != dim:
        codes = F.pad(codes, (0, padded - dim))
    return codes.unflatten(-1, (padded // 16, 8, 2)).transpose(-3, -2).flatten(-3, -2)


def _channels(slots: Tensor) -> Tensor:
    """The inverse of :func:`_slots`, with the channels that it added."""
    return slots.unflatten(-2, (8, -1)).transpose(-3, -2).flatten(-3)


def _plane(slots: Tensor, p: int) -> Tensor:
    """``[..., S, 2]`` uint8 below 2^p -> ``[..., S p / 16]`` int32."""
    if p == 1:  # [.., word, of two words of 2 bits, position, half]
        part = slots.unflatten(-2, (-1, 2, 8)).transpose(-3, -2).flatten(-3, -2)
    else:
        part = slots.unflatten(-2, (-1, 16 // p))
    shift = torch.arange(0, 16, p, device=slots.device)[:, None]
    shift = (shift + 16 * torch.arange(2, device=slots.device)).to(torch.int32)
    return (part.to(torch.int32) << shift).sum((-2, -1), dtype=torch.int32)


def _from_plane(words: Tensor, p: int) -> Tensor:
    """The inverse of :func:`_plane`."""
    shift = torch.arange(0, 16, p, device=words.device)[:, None]
    shift = (shift + 16 * torch.arange(2, device=words.device)).to(torch.int32)
    part = ((words[..., None, None] >> shift) & ((1 << p) - 1)).to(torch.uint8)
    if p == 1:
        part = part.unflatten(-2, (8, 2)).transpose(-3, -2).flatten(-3, -2)
        return part.flatten(-3, -2)
    return part.flatten(-3, -2)


def pack_trits(codes: Tensor) -> Tensor:
    """Parked form of ternary codes: five in a byte, 1.6 bits each.

    Args:
        codes: ``[..., D]`` uint8, 0 .. 2.

    Returns:
        ``[..., ceil(D / 5)]`` uint8.
    """
    dim = codes.shape[-1]
    codes = F.pad(codes, (0, -dim % TRITS)).unflatten(-1, (-1, TRITS))
    return (codes * _powers(codes.device)).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`pack_trits`, ``[..., dim]``."""
    digits = packed[..., None] // _powers(packed.device) % 3
    return digits.flatten(-2)[..., :dim]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=device)
