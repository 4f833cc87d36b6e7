"""Files of ids (``.vqt``): a header of 32 bytes and the ids, packed to their bits.

``SVQT``, version, levels, pictures, height, width, codebook size, the tokenizer's fingerprint; then
the ids in order, 64 at a time as one little-endian number to the base of the codebook size.  That
is log2(K) bits an id for a power of two, and at most 1/64 of a byte more for any other K.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sage_diffusion.files import write_bytes
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError

_HEADER = struct.Struct("<4sBBHIIQ8s")
_MAGIC, _VERSION, _CHUNK = b"SVQT", 1, 64


@dataclass(frozen=True)
class Tokens:
    """Ids and whose they are.

    Attributes:
        ids: ``[B, h, w]`` or ``[B, h, w, Q]`` int64.
        codebook_size: K.
        fingerprint: of the tokenizer.
    """

    ids: Tensor
    codebook_size: int
    fingerprint: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Tensor) -> Tokens:
        """Ids of a tokenizer."""
        return cls(ids, tokenizer.codebook_size, tokenizer.fingerprint)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise TokenizerError unless these are a tokenizer's ids."""
        if (self.codebook_size, self.fingerprint) != (
            tokenizer.codebook_size,
            tokenizer.fingerprint,
        ):
            raise TokenizerError(
                f"ids must be of this tokenizer ({tokenizer.codebook_size} codes, "
                f"{tokenizer.fingerprint}), got ids of another ({self.codebook_size} codes, "
                f"{self.fingerprint})"
            )


def pack(tokens: Tokens) -> bytes:
    """The bytes of a file.

    Raises:
        TokenizerError: ids of another shape or out of range, or more than the header can say.
    """
    ids, size = tokens.ids, tokens.codebook_size
    if ids.ndim not in (3, 4) or ids.is_floating_point():
        raise TokenizerError(f"ids must be integers [B, h, w(, Q)], got {tuple(ids.shape)}")
    if ids.numel() and (ids.min() < 0 or ids.max() >= size):
        raise TokenizerError(
            f"ids must be 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    levels = ids.shape[3] if ids.ndim == 4 else 0
    if levels > 255 or len(ids) > 65535:
        raise TokenizerError(
            f"a file holds 65535 pictures of 255 levels at most, got {tuple(ids.shape)}"
        )
    fingerprint = bytes.fromhex(tokens.fingerprint)
    header = _HEADER.pack(_MAGIC, _VERSION, levels, *ids.shape[:3], size, fingerprint)
    numbers, parts = ids.flatten().tolist(), [header]
    for start in range(0, len(numbers), _CHUNK):
        some, value = numbers[start : start + _CHUNK], 0
        for number in reversed(some):
            value = value * size + number
        parts.append(value.to_bytes(_width(len(some), size), "little"))
    return b"".join(parts)


def unpack(data: bytes) -> Tokens:
    """What :func:`pack` packed.

    Raises:
        TokenizerError: these bytes are no such file, or damaged.
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise TokenizerError("not a file of ids: it must begin with SVQT and a header of 32 bytes")
    _, version, levels, batch, height, width, size, mark = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise TokenizerError(f"a file of ids must have version {_VERSION}, got {version}")
    shape = [batch, height, width, *([levels] if levels else [])]
    count = math.prod(shape)
    whole, rest = divmod(count, _CHUNK)
    step = _width(_CHUNK, size) if size >= 2 else 0
    expected = _HEADER.size + whole * step + (_width(rest, size) if rest and size >= 2 else 0)
    if size < 2 or len(data) != expected:
        raise TokenizerError(
            f"a file of {count} ids of {size} codes must have {expected} bytes, got {len(data)}"
        )
    numbers: list[int] = []
    for i in range(whole + bool(rest)):
        start = _HEADER.size + i * step
        value = int.from_bytes(data[start : start + step], "little")
        for _ in range(_CHUNK if i < whole else rest):
            value, number = divmod(value, size)
            numbers.append(number)
        if value:
            raise TokenizerError(f"the file of ids is damaged near byte {start}")
    ids = torch.tensor(numbers, dtype=torch.int64).view(shape)
    return Tokens(ids, size, mark.hex())


def _width(count: int, size: int) -> int:
    """Bytes of so many ids."""
    return ((size**count - 1).bit_length() + 7) // 8


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Write a file, whole or not at all."""
    write_bytes(path, pack(tokens))


def load_tokens(path: Path) -> Tokens:
    """Read a file.

    Raises:
        TokenizerError: it can't be read or is no file of ids; the message names it.
    """
    try:
        return unpack(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path} can't be read: {error.strerror}") from None
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
