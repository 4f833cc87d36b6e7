"""What several test files use."""

import torch
from torch import Tensor


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


def biased(batch: int, heads: int, length: int, dim: int, seed: int) -> tuple[Tensor, ...]:
    """q, k, v with the channel bias and the outliers of diffusion models' attention.

    K has a large mean and every head a few channels of large spread (SageAttention, 2410.02367
    figure 4), Q a smaller mean that drifts along the sequence, V a mean of 8 (SageAttention2).
    """
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, length, dim, generator=g) for _ in range(3))
    spread = torch.ones(dim)
    spread[:: dim // 4] = 4.0
    drift = torch.linspace(0.5, 1.5, length)[:, None]
    q = q * spread + 3.0 * torch.randn(heads, 1, dim, generator=g) * drift
    k = k * spread + 8.0 * torch.randn(heads, 1, dim, generator=g)
    return q * 0.4, k * 0.4, v + 8.0 * torch.randn(heads, 1, dim, generator=g).sign()
