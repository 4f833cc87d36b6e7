"""A calibration's card, its time to beat, and its file."""

import math

import pytest

from sage_diffusion.adapt.costs import card_costs, relative_cost
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.integrations.comfy import sampler


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
        # Nine tenths of 192 cycles of 1024 and a tenth of 256.
        ("rtx4090", (128, 128), 0.194),
        ("rtx4090", (64, 128), 0.197),  # exponentials bind where heads are small
        ("rtx3090", (128,), 0.194),
        ("h100", (128,), 0.728),  # measured: of its 8 bits those with FP8
    ],
)
def test_the_time_to_beat_is_that_of_fast(card, head_dims, time):
    assert sampler.fast_time(card_costs(card), table(*head_dims)) == pytest.approx(time, abs=1e-3)


@pytest.mark.parametrize("card", sampler.CARDS)
def test_some_candidate_beats_the_time_on_every_card(card):
    for head_dim in (64, 128):
        costs = card_costs(card)
        time = sampler.fast_time(costs, table(head_dim))
        assert any(relative_cost(x, costs, head_dim) <= time for x in sampler.candidates(card))
        assert time < 1 or (card, head_dim) == ("h100", 64)  # measured: nothing is faster


def test_a_new_name_is_one_that_no_file_has(tmp_path):
    path = tmp_path / "a.json"
    assert sampler.free_path(path) == path
    path.touch()
    (tmp_path / "a 2.json").touch()
    assert sampler.free_path(path) == tmp_path / "a 3.json"


@pytest.mark.parametrize(("tokens", "whole"), [(256, False), (8192, True)])
def test_short_calls_are_planned_by_their_main_loops(tokens, whole):
    """Else there is nothing but FP16 for the small pictures that one tries a calibration with."""
    found = ScoreTable((), 1)
    found.saw("double.00", 0, "both", 24.0 * tokens**2 * 128, 1, (tokens, tokens))
    costs, note = sampler.costs_of("rtx4090", found)
    assert costs.card == "rtx4090" and costs.whole == whole
    assert (note == "") == whole
    assert whole or f"whole calls of {tokens} tokens are not predicted to be faster" in note
    assert sampler.fast_time(costs, found) < 1
    loops = sampler.fast_time(card_costs("rtx4090", math.inf), found)
    assert (sampler.fast_time(costs, found) == pytest.approx(loops)) != whole
