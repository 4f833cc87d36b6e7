"""The calls that every kernel must get right: plain data, and tensors made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sage_diffusion.kernels.rope import Rope

Mask = Literal["", "keys", "bool", "additive"]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: as a finding names it.
        batch, heads, kv_heads, q_len, k_len, head_dim: its shape.
        mask: none, one of the keys, or one per query, boolean or added.
        is_causal, return_lse: as in :func:`sage_diffusion.attention`.
        rope: q and k are rotated as they are quantized.
        sign_seed: of the Hadamard rotation's signs, None: as 0, but without reading one.
        dtype: of q, k and v.
        stride: elements between two tokens, 0: tokens, heads and channels as in a fused projection.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    mask: Mask = ""
    is_causal: bool = False
    return_lse: bool = False
    rope: bool = False
    sign_seed: int | None = None
    dtype: torch.dtype = torch.float16
    stride: int = 0

    @property
    def bytes_needed(self) -> int:
        """An estimate from above: inputs, codes, the twin's float32 and one head's float64 scores.

        The twin sees a tile of 64 keys of all heads at a time.
        """
        rows = self.batch * (self.heads * self.q_len + 2 * self.kv_heads * self.k_len)
        compared = 2 if self.is_far else self.batch * self.heads
        scores = self.q_len * (self.k_len + 64 * compared)
        storage = 2 * self.stride * max(self.q_len, self.k_len)
        return storage + (8 if self.is_far else 24) * rows * self.head_dim + 24 * scores

    @property
    def is_far(self) -> bool:
        """Too large for a comparison of all heads: the first and the last are compared."""
        return self.batch * self.heads * self.q_len * self.head_dim >= 2**31


class Inputs(NamedTuple):
    """Tensors of a case."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    rope: Rope | None
    sign_seed: Tensor | None


_FP16, _BF16 = torch.float16, torch.bfloat16

#: On a card.  Few combinations of head dim, mask and type, because each is compiled for each
#: kernel, but every value of each, and lengths around the edges of tiles and blocks.  Triton
#: compiles anew for lengths of 1 and those that 16 divides: the last two, :data:`FAR_CASES` and
#: :data:`REPEATED` are of kinds that stand above them.
CARD_CASES = (
    Case("odd lengths", 1, 4, 2, 257, 1031, 72, return_lse=True),
    Case("head dim 64", 2, 3, 3, 1000, 1000, 64, sign_seed=987654321, dtype=_BF16),
    Case("causal, grouped heads", 1, 4, 1, 1025, 1025, 128, is_causal=True, sign_seed=7),
    Case("mask of keys", 2, 2, 2, 300, 333, 128, "keys"),
    Case("boolean mask", 1, 2, 2, 200, 515, 128, "bool", return_lse=True),
    Case("additive mask, causal", 1, 2, 2, 129, 640, 64, "additive", is_causal=True),
    Case("rotated", 1, 2, 2, 640, 640, 128, rope=True, sign_seed=2**31 - 1),
    Case("head dim 256", 1, 2, 2, 130, 700, 256, return_lse=True),
    Case("one token", 1, 2, 2, 1, 1, 64),
    Case("many keys", 1, 2, 2, 128, 40000, 128),
    Case("many programs", 4, 40, 40, 64, 192, 128),
)

#: Beyond 32-bit offsets: into the caller's tensors, into codes and output.  Where memory allows.
FAR_CASES = (
    Case("strides beyond 2^31", 1, 2, 2, 320, 320, 128, stride=2**31 // 319 // 16 * 16 + 16),
    Case("output beyond 2^31", 1, 514, 514, 32768, 64, 128),
)

#: On the emulator, a tile or two each.
EMULATED_CASES = (
    Case("odd lengths, grouped heads", 1, 2, 1, 65, 130, 72, return_lse=True),
    Case("causal", 1, 1, 1, 70, 70, 64, is_causal=True, dtype=_BF16),
    Case("mask of keys", 1, 1, 1, 33, 70, 64, "keys"),
    Case("boolean mask", 1, 1, 1, 33, 65, 64, "bool", return_lse=True),
    Case("additive mask, causal", 1, 1, 1, 65, 65, 64, "additive", is_causal=True),
    Case("rotated", 1, 1, 1, 64, 64, 64, rope=True, sign_seed=987654321),
    Case("strides beyond 2^31", 1, 1, 1, 64, 64, 64, stride=2**31 // 63 // 16 * 16 + 16),
)

#: Programs enough to fill any card, twice: a race that depends on who runs beside whom moves bits.
REPEATED = (
    Case("repeated", 2, 24, 24, 2048, 2064, 128),
    Case("repeated, boolean mask", 1, 24, 24, 1000, 1027, 128, "bool", return_lse=True),
)
REPEATED_EMULATED = (Case("repeated", 1, 2, 1, 65, 130, 72, return_lse=True),)

#: A row that sees no key, where a mask differs from query to query.
HIDDEN_ROW = 3


def inputs(case: Case, device: torch.device) -> Inputs:
    """The case's tensors, always the same.

    Q, K and V have means per channel: smoothing takes out those of K and of 4-bit Q.
    """
    generator = torch.Generator(device).manual_seed(case.q_len + case.k_len + case.head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    b, d = case.batch, case.head_dim
    parts = ((case.heads, case.q_len), (case.kv_heads, case.k_len), (case.kv_heads, case.k_len))
    storage = _far_storage(case, device) if case.stride else None
    found = []
    for i, (heads, length) in enumerate(parts):
        if storage is not None:
            places = (b * heads * d, d, case.stride, 1)
            x = storage.as_strided((b, heads, length, d), places, i * b * heads * d)
        else:
            x = torch.empty(b, length, heads, d, dtype=case.dtype, device=device).transpose(1, 2)
        means = normal(heads, 1, d)
        for part in range(b):
            for head in range(heads):  # float32 copies of all heads might not fit
                x[part, head] = normal(length, d) + (0.05 if i == 2 else 1.0) * means[head]
        found.append(x)
    q, k, v = found
    mask, rope = make_mask(case, generator, device), make_rope(case, device)
    return Inputs(q, k, v, mask, rope, make_sign_seed(case, device))


def _far_storage(case: Case, device: torch.device) -> Tensor:
    """Memory that is far larger than what is used of it; on the CPU nothing of the rest exists."""
    size = case.stride * max(case.q_len, case.k_len) + 4 * case.heads * case.head_dim * case.batch
    return torch.empty(size, dtype=case.dtype, device=device)


def make_mask(case: Case, generator: torch.Generator, device: torch.device) -> Tensor | None:
    if not case.mask:
        return None
    if case.mask == "keys":
        return (torch.arange(case.k_len, device=device) < case.k_len - 7)[None, None, None]
    shape = (case.batch, 1, case.q_len, case.k_len)
    seen = torch.rand(shape, generator=generator, device=device) < 0.6
    seen[..., 0] = True
    seen[:, :, HIDDEN_ROW] = False
    if case.mask == "bool":
        return seen
    added = torch.randn(shape, generator=generator, device=device)
    return torch.where(seen, added, -math.inf).to(case.dtype)


def make_rope(case: Case, device: torch.device) -> Rope | None:
    if not case.rope:
        return None
    angles = torch.arange(case.q_len)[:, None] * 10000.0 ** (
        -torch.arange(case.head_dim // 2) / (case.head_dim // 2)
    )
    angles = angles.repeat_interleave(2, 1).to(device)
    return Rope(angles.cos(), angles.sin())


def make_sign_seed(case: Case, device: torch.device) -> Tensor | None:
    if case.sign_seed is None:
        return None
    return torch.full((1,), case.sign_seed, dtype=torch.int32, device=device)
