"""What several test files use."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sage_diffusion.kernels.attention import tuning


def relative_l1(got: Tensor, want: Tensor) -> float:
    """Sum of absolute differences over the sum of absolute values."""
    return ((got.double() - want.double()).abs().sum() / want.double().abs().sum()).item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, whatever the dtype."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def fused_view(batch: int, heads: int, length: int, dim: int, seed: int, dtype=torch.float16):
    """``[B, H, L, D]`` whose tokens, heads and channels lie as in a fused QKV projection."""
    g = torch.Generator().manual_seed(seed)
    fused = torch.randn(batch, length, 3, heads, dim, generator=g).to(dtype)
    return fused[:, :, 1].transpose(1, 2)


def steep(v: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, H, L, D]`` with tiles of 64 tokens of other sizes each, and scales of its channels."""
    tile = torch.arange(v.shape[2]) // 64
    v = v * 30.0 ** torch.tensor([0, 1, -2])[tile % 3][:, None]
    return v, v.abs().amax(2) / 7


def biased(batch: int, heads: int, length: int, dim: int, seed: int) -> tuple[Tensor, ...]:
    """q, k, v with the channel bias and the outliers of diffusion models' attention.

    Q and K have a mean per channel, Q's drifting along the sequence, and a few channels of large
    spread (SageAttention, 2410.02367, figure 4); V has a mean of 8 (SageAttention2, 2411.10958).
    """
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, length, dim, generator=g) for _ in range(3))
    spread = torch.ones(dim)
    spread[:: dim // 4] = 4.0
    drift = torch.linspace(0.8, 1.2, length)[:, None]
    q = q * spread + 5.0 * torch.randn(heads, 1, dim, generator=g) * drift
    k = k * spread + 5.0 * torch.randn(heads, 1, dim, generator=g)
    return q * 0.3, k * 0.3, v + 8.0 * torch.randn(heads, 1, dim, generator=g).sign()


@contextlib.contextmanager
def card(cc: int) -> Iterator[Any]:
    """A simulated GPU (:mod:`ptxvm`), and this package's launch configurations for it."""
    from ptxvm import gpu  # needs Triton, the other helpers do not

    with gpu(cc) as driver, mock.patch.object(tuning, "architecture", lambda device: f"sm_{cc}"):
        yield driver
