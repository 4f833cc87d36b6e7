"""Packed keys and values for tests, and attention on what they stand for in float64."""

import numpy as np
import torch

from sage_diffusion.kernels.kv import layout
from sage_diffusion.kernels.kv.quantize import quantize
from sage_diffusion.kernels.kv.sides import Side


def side(x, width, axis, group, form="fp16"):
    """``x [B, H, T, D]`` packed."""
    tokens = x.shape[2]
    if axis == "channel":  # whole groups are stored
        x = torch.cat((x, x[:, :, :1].expand(-1, -1, -tokens % group, -1)), 2)
    got = quantize(x, width, axis, group, form)
    words = layout.pack(got.codes, width)
    return Side(words, got.step, got.zero, width, axis, group, x.shape[3], tokens)


def data(batch, heads, group, queries, dim, tokens):
    """q, k, v; K's channels differ in size and mean."""
    g = torch.Generator().manual_seed(tokens + dim)
    q = torch.randn(batch, heads * group, queries, dim, generator=g) / 3
    k, v = (torch.randn(batch, heads, tokens, dim, generator=g) for _ in range(2))
    k = k * (1 + 4 * torch.rand(dim, generator=g)) + 2 * torch.randn(dim, generator=g)
    return q, k, v + 1


def far(side):
    """The same side with heads 2^31 words apart, as a million tokens of many heads have them."""
    words, apart = side.words, 2**31
    pages = np.zeros(apart + words[0, 0].numel(), np.int32)  # most of them nobody touches
    strides = (words.shape[1] * apart, apart, words.shape[3], 1)
    there = torch.from_numpy(pages).as_strided(words.shape, strides).copy_(words)
    return side._replace(words=there)


def exact(q, k, v, scale, mask=None):
    """Output and natural log-sum-exp of unpacked ``k, v``."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.transpose(2, 3) * scale
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    out = torch.where((s == -torch.inf).all(-1, keepdim=True), 0.0, s.softmax(-1)) @ v
    return out, s.logsumexp(-1)


def assert_close(got, want, bound):
    """Outputs by relative L2, log-sum-exps by the largest difference; infinities are equal."""
    (out, lse), (want_out, want_lse) = got, want
    assert out.isfinite().all()
    assert (out - want_out).norm() <= bound * want_out.norm()
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    finite = want_lse > -torch.inf
    assert (lse - want_lse)[finite].abs().max() <= 20 * bound
