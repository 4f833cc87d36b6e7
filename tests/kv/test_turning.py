"""The angles of a host's RoPE, from what it does."""

import pytest
import torch

from sage_diffusion.kernels.kv.sides import Turn
from sage_diffusion.kv.turning import angles_of

CPU, DIM = torch.device("cpu"), 16
FREQUENCIES = 1e5 ** -(torch.arange(DIM // 2) * 2 / DIM)


class Rope:
    """Of halves of a head; ``gain`` as YaRN has, ``bend`` turns less at large positions."""

    def __init__(self, gain=1.0, bend=0.0, every_other=False):
        self.gain, self.bend, self.every_other = gain, bend, every_other

    def rotate(self, x, positions, inverse=False):
        at = positions.float() * (1 - self.bend * (positions > 500))
        angle = at[:, None, :, None] * FREQUENCIES * (-1 if inverse else 1)
        cos, sin = self.gain * angle.cos(), self.gain * angle.sin()
        a, b = (x[..., ::2], x[..., 1::2]) if self.every_other else x.float().chunk(2, -1)
        parts = a * cos - b * sin, b * cos + a * sin
        return torch.stack(parts, -1).flatten(3) if self.every_other else torch.cat(parts, -1)


def test_angles_are_exact_and_turn_as_the_host_does():
    rope = Rope(gain=1.3)
    angles, gain = angles_of(rope, DIM, CPU)
    torch.testing.assert_close(angles, FREQUENCIES.double(), rtol=1e-6, atol=1e-9)
    assert gain == pytest.approx(1.3, rel=1e-6)
    k = torch.randn(2, 3, 5, DIM, generator=torch.Generator().manual_seed(0))
    turn = Turn(angles, gain, torch.tensor([40, 9000]))
    positions = turn.first[:, None] + 7 + torch.arange(5)
    torch.testing.assert_close(turn.keys(k, 7), rope.rotate(k, positions), rtol=1e-3, atol=1e-3)
    q = torch.randn(2, 6, 1, DIM, generator=torch.Generator().manual_seed(1))
    back = turn.queries(q, torch.tensor([0, 7]))[1]
    want = q.unflatten(1, (3, 2)) @ turn.keys(k[:, :, :1], 7)[:, :, None].mT
    got = back.unflatten(1, (3, 2)) @ k[:, :, :1][:, :, None].mT
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", [Rope(bend=0.5), Rope(every_other=True)])
def test_others_are_not_guessed(rope):
    assert angles_of(rope, DIM, CPU) is None
    assert angles_of(rope, DIM - 1, CPU) is None
