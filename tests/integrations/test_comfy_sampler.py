"""A calibration's card, its time to beat, and its file."""

import pytest
import torch

from sage_diffusion.adapt.costs import card_costs, relative_cost
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.integrations.comfy import sampler


def test_the_card_is_found_by_its_architecture(monkeypatch):
    assert sampler.this_card(torch.device("cpu")) is None
    for capability, card in (((8, 9), "rtx4090"), ((12, 0), "rtx5090"), ((7, 5), None)):
        monkeypatch.setattr(sampler, "device_arch", lambda device, c=capability: (c, None))
        assert sampler.this_card(torch.device("cpu")) == card
    assert set(sampler._CARD_OF.values()) == set(sampler.CARDS)


def table(*head_dims):
    """A calibration's table of layers that work alike."""
    found = ScoreTable((), 1)
    for i, head_dim in enumerate(head_dims):
        found.saw(f"double.{i:02}", 0, "both", 8.0, 1)
        found.fingerprint.setdefault("head_dims", {})[f"double.{i:02}"] = head_dim
    return found


@pytest.mark.parametrize(
    ("card", "head_dims", "time"),
    [
        # Nine tenths of 192 cycles of 1024 and a tenth of 384.
        ("rtx4090", (128, 128), 0.206),
        ("rtx4090", (64, 128), 0.210),  # exponentials bind where heads are small
        ("rtx3090", (128,), 0.25),  # no 4 bit with FP8
        ("h100", (128,), 0.807),  # measured: balanced is faster there
    ],
)
def test_the_time_to_beat_is_that_of_fast(card, head_dims, time):
    assert sampler.fast_time(card, table(*head_dims)) == pytest.approx(time, abs=1e-3)


@pytest.mark.parametrize("card", sampler.CARDS)
def test_some_candidate_beats_the_time_on_every_card(card):
    for head_dim in (64, 128):
        time = sampler.fast_time(card, table(head_dim))
        costs = card_costs(card)
        assert any(relative_cost(x, costs, head_dim) <= time for x in sampler.candidates(card))
        assert time < 1 or (card, head_dim) == ("h100", 64)  # measured: nothing is faster


def test_a_new_name_is_one_that_no_file_has(tmp_path):
    path = tmp_path / "a.json"
    assert sampler.free_path(path) == path
    path.touch()
    (tmp_path / "a 2.json").touch()
    assert sampler.free_path(path) == tmp_path / "a 3.json"
