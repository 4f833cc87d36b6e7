"""Attention over parts, joined by their log-sum-exp."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from sage_diffusion.kv.parts import attend, columns, merge


def tensors(tokens=50):
    g = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, 6, 3, 16, generator=g)
    return q, *(torch.randn(2, 2, tokens, 16, generator=g) for _ in "kv")


def test_parts_are_the_whole():
    q, k, v = tensors()
    mask = torch.rand(2, 1, 3, 50, generator=torch.Generator().manual_seed(1)) < 0.6
    want = scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=0.3
    )
    cuts = [(0, 7), (7, 40), (40, 50)]
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b], 0.3, columns(mask, a, b)) for a, b in cuts]
    torch.testing.assert_close(merge(parts).out, want)
    torch.testing.assert_close(merge(parts).lse, attend(q, k, v, 0.3, mask).lse)


def test_a_part_that_nobody_sees_adds_nothing():
    q, k, v = tensors()
    nobody = torch.zeros(1, 1, 1, 50, dtype=torch.bool)
    hidden = attend(q, k, v, 0.3, nobody)
    assert not hidden.out.any() and (hidden.lse == -torch.inf).all()
    seen = attend(q, k, v, 0.3)
    torch.testing.assert_close(merge([hidden, seen]).out, seen.out)
    assert not merge([hidden, hidden]).out.any()
