"""Derivatives, transforms of torch.func and float64 as the default: declined with a reason."""

import pytest
import torch

from sage_diffusion import AttentionSession, attention
from sage_diffusion.attend.layer import AttentionRefused

Q = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_transforms_and_forward_derivatives_are_declined_with_a_reason():
    session = AttentionSession("int8/fp16")

    def loss(q):
        return session.attend("a", q, Q, Q, native=plain).sum()

    def plain(q, k, v, mask, is_causal, scale):
        return (q @ k.mT).softmax(-1) @ v

    expected = torch.func.jvp(lambda q: plain(q, Q, Q, None, False, None).sum(), (Q,), (Q,))
    assert torch.equal(torch.func.jvp(loss, (Q,), (Q,))[1], expected[1])
    assert torch.func.vmap(loss)(Q[None].expand(3, -1, -1, -1, -1)).shape == (3,)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(Q, Q)
        assert torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent is not None
        loss(Q)  # no derivative of this one is asked for
    reasons = session.summary().declined
    assert sorted(reasons.values()) == [1, 2]
    assert "torch.func (vmap, jvp, ..)" in next(r for r, n in reasons.items() if n == 2)
    assert "forward-mode derivatives" in next(r for r, n in reasons.items() if n == 1)
    assert session.summary().quantized == 1


def test_float64_as_the_default_is_declined_with_a_reason():
    session = AttentionSession("int8/int8")
    torch.set_default_dtype(torch.float64)
    try:
        out = session.attend("a", Q, Q, Q)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(Q, Q, Q))
    assert "default dtype is float64" in str(session.summary())


@pytest.mark.parametrize("strict", [False, True])
def test_a_strict_session_refuses_them(strict):
    session = AttentionSession("int8/int8", strict=strict)
    if not strict:
        torch.func.vmap(lambda q: session.attend("a", q, Q, Q))(Q[None])
        return
    with pytest.raises(AttentionRefused, match="a: inside a transform"):
        torch.func.vmap(lambda q: session.attend("a", q, Q, Q))(Q[None])


def test_the_function_says_so_too():
    with pytest.raises(RuntimeError, match="inside a transform"):
        torch.func.vmap(lambda q: attention(q, Q, Q))(Q[None])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        attention(torch.autograd.forward_ad.make_dual(Q, Q), Q, Q)
