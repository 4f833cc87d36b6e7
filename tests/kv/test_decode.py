"""Attention on a packed past: who computes it, and what is refused."""

import pytest
import torch
from kv_sides import assert_close, data, exact, side

from sage_diffusion.kernels.kv.sides import Turn
from sage_diffusion.kv import decode

SCALE = 0.125


def sides(axes=("channel", "token"), dim=64, v_group=32):
    q, k, v = data(1, 2, 2, 1, dim, 48)
    return q, side(k, 4, axes[0], 16), side(v, 4, axes[1], v_group)


def test_a_cpu_has_the_twin():
    q, k, v = sides()
    assert decode.choose(q, k, v) == "torch"
    mask = (torch.arange(48) < 40)[None, None, None]
    got = decode.attend(q, k, v, SCALE, mask)
    assert_close(got, exact(q, k.read(0, 48), v.read(0, 48), SCALE, mask), 1e-5)


def test_keys_before_rope_are_turned():
    q, k, v = sides()
    angles = 0.1 ** torch.arange(32, dtype=torch.float64)
    turn = Turn(angles, 1.0, torch.tensor([5]))
    got = decode.attend(q, k, v, SCALE, None, turn)
    assert_close(got, exact(q, turn.keys(k.read(0, 48), 0), v.read(0, 48), SCALE), 1e-5)
    with pytest.raises(ValueError, match=r"turn must have 32 angles, .* got \(16,\)"):
        decode.attend(q, k, v, SCALE, None, turn._replace(angles=angles[:16]))


def test_a_kernel_that_was_asked_for_says_why_it_does_not_run():
    q, k, v = sides()
    with pytest.raises(ValueError, match="gluon can't attend to this on cpu: needs a CUDA"):
        decode.attend(q, k, v, SCALE, backend="gluon")
    with pytest.raises(ValueError, match="backend must be one of auto, gluon, triton, torch"):
        decode.attend(q, k, v, SCALE, backend="cuda")


def test_shapes_that_a_kernel_has_not():
    q, k, v = sides()
    assert decode.refuse_shapes("gluon", q, k, v) is None
    assert decode.refuse_shapes("triton", q, k, v) is None
    both = decode.refuse_shapes("gluon", *sides(("token", "token")))
    assert "needs keys per channel and values per token, got token and token" in both
    odd = sides(dim=96)
    assert decode.refuse_shapes("triton", *odd) is None
    assert "head dim of 64, 128, 256, got 96" in decode.refuse_shapes("gluon", *odd)
    assert "groups of 16 channels" in decode.refuse_shapes("gluon", *sides(v_group=8))
    many = q.expand(1, 4, 1, 64).repeat(1, 1, 200, 1)
    assert "got 400 rows" in decode.refuse_shapes("triton", many, k, v)


@pytest.mark.parametrize("form", ["fp16", "fp8"])
def test_steps_that_overflow_in_half_precision_are_another_kernels(form):
    q, k, v = data(1, 2, 2, 1, 64, 48)
    v[0, 1, 40, 3] = 4e4
    k, v = side(k, 4, "channel", 16), side(v, 4, "token", 32, form)
    reason = decode.refuse_shapes("gluon", q, k, v)
    assert reason.startswith("needs steps of values below 2,047, got 2,")
    assert decode.refuse_shapes("triton", q, k, v) is None
    assert decode.refuse_shapes("gluon", q, k, v._replace(tokens=40)) is None
    assert decode.refuse_shapes("gluon", q, k, v._replace(largest=1.0)) is None


def test_bad_input_is_refused():
    q, k, v = sides()
    with pytest.raises(ValueError, match="q must be floating"):
        decode.attend(q[0], k, v, SCALE)
    with pytest.raises(ValueError, match=r"a multiple of 2, L, 64\], got \(1, 3, 1, 64\)"):
        decode.attend(q[:, :3], k, v, SCALE)
    with pytest.raises(ValueError, match="same batch, heads and tokens"):
        decode.attend(q, k, v._replace(tokens=32), SCALE)
    with pytest.raises(ValueError, match="there must be tokens"):
        decode.attend(q, k._replace(tokens=0), v._replace(tokens=0), SCALE)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        decode.attend(q, k, v, SCALE, torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be boolean or floating, got torch\.int64"):
        decode.attend(q, k, v, SCALE, torch.ones(48, dtype=torch.int64))
