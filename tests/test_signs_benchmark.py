"""``benchmarks.signs``: its sessions do what they say, and its figures on an untrained model."""

import numpy as np
import pytest
import torch
from from_file import benchmark
from tiny_emoji import tiny_emoji

from sage_diffusion import AttentionSession, PrecisionPlan, attention
from sage_diffusion.attend.calls import Call
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan.signs import step_seed

signs = benchmark("signs")
SPEC = AttentionSpec.parse(signs.SPEC)


class Seeds:
    def __init__(self):
        self.found = []

    def observe(self, event):
        self.found.append(int(event.sign_seed))


def seeds(session):
    """Of two layers at each of four steps."""
    watch = Seeds()
    session.observers.append(watch)
    qkv = [torch.randn(1, 1, 16, 16) for _ in range(3)]
    session.start(4)
    for step in range(4):
        session.begin_step(step)
        for layer in "ab":
            session.attend(layer, *qkv)
    session.finish()
    return [tuple(watch.found[i : i + 2]) for i in range(0, 8, 2)]


def test_who_shares_signs():
    plan = PrecisionPlan(SPEC, sign_seed=3)
    assert seeds(AttentionSession(plan)) == [(step_seed(3, step),) * 2 for step in range(4)]
    assert seeds(signs.Alike(plan)) == [(step_seed(3, step // 2),) * 2 for step in range(4)]
    apart = seeds(signs.LayerSigns(plan))
    assert len({seed for pair in apart for seed in pair}) == 8


def test_a_shifted_grid_errs_the_other_way():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 192, 64) for _ in range(3))
    seed = torch.tensor([5], dtype=torch.int32)
    exact = attention(q, k, v, "fp16")
    errors = [
        attention(q, k, v, SPEC, sign_seed=seed) - exact,
        signs.shifted_attention(Call(q, k, v), SPEC, seed) - exact,
        attention(q, k, v, SPEC, sign_seed=6) - exact,
    ]
    sizes = [error.norm().item() for error in errors]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
    correlation = np.corrcoef(torch.stack(errors).flatten(1).numpy())[0]
    assert correlation[1] < -0.05 and abs(correlation[2]) < 0.03


def test_figures():
    psnr = np.array([[40.0, 30.0], [42.0, 30.0]])
    found = signs.summary(psnr, np.array([[40.0, 31.0]]))
    assert found["mean"] == 35.5 and found["worst"] == 30
    assert found["pooled"] == pytest.approx(32.67, abs=0.01)
    assert (found["difference"], found["standard_error"]) == (0.0, 1.0)


def test_trials_and_picks_of_an_untrained_model(monkeypatch):
    pipe = tiny_emoji(layers=1)
    few = ((1, 0), (0,))
    found = signs.compare(signs.Pictures(pipe, few, steps=3), ["steps", "one", "opposite"], 2)
    assert found["steps"]["difference"] == 0 and list(found) == ["steps", "one", "opposite"]
    assert all(15 < row["worst"] <= row["mean"] for row in found.values())
    monkeypatch.setattr(signs, "CALIBRATED", few)
    monkeypatch.setattr(signs, "HELD_OUT", ((1, 1), (1000,)))
    picked = signs.pick(pipe, PrecisionPlan.of(signs.SPEC), 2)
    assert len(picked["held_out"]) == 2 and picked["chosen"] in (0, 1)
    assert picked["calibrated"] != picked["held_out"]
