"""Plans as users meet them by name, and what a card makes of them."""

import pytest
import torch

from sage_diffusion.adapt import presets
from sage_diffusion.adapt.costs import CYCLES, call_milliseconds, card_costs
from sage_diffusion.adapt.presets import (
    EIGHT_BIT,
    PRESETS,
    card_preset,
    cheapest_first,
    describe_preset,
    least_tokens,
    preset,
)
from sage_diffusion.plan import PlanError


def spec_at(plan, layer="double.00", progress=0.5, tokens=4096):
    return str(plan.resolve(layer, progress, tokens=tokens))


@pytest.fixture
def on(monkeypatch):
    """Plans of another card, which runs all that it has costs of."""

    def card(name):
        runs = CYCLES.get(name, {})
        monkeypatch.setattr(presets, "this_card", lambda device: name)
        monkeypatch.setattr(
            presets.backends,
            "automatic",
            lambda call: "triton" if call.spec.formats in runs else None,
        )
        presets.preset.cache_clear()

    yield card
    monkeypatch.undo()
    presets.preset.cache_clear()


@pytest.mark.parametrize(
    ("name", "first", "middle"),
    [
        ("quality", "fp16", "int8/fp16"),
        ("balanced", "int8/fp16", "int8/int8"),
        ("fast", "int8/int8", "int4/fp8-fast"),
    ],
)
def test_presets(name, first, middle):
    plan = preset(name)
    assert spec_at(plan, progress=0.0) == first
    assert spec_at(plan) == spec_at(plan, progress=1.0) == middle
    assert spec_at(plan, tokens=77) == "fp16"
    assert set(PRESETS) == {"quality", "balanced", "fast"}


@pytest.mark.parametrize(
    ("card", "quality", "edge", "balanced", "fast"),
    [
        ("rtx3090", "int8/fp16", "int8/fp16", "int8/int8", "int4/int8"),
        ("rtx4090", "int8/fp16", "int8/fp16", "int8/int8", "int4/fp8-fast"),
        ("rtx5090", "int8/fp16", "int8/fp16", "int8/int8", "fp4/fp8-fast"),
        ("a100", "int8/int8", "int8/fp16", "int8/int8", "int4/int8-tile_v"),
        ("h100", "int8/fp8", "fp16", "int8/fp8", "int8/fp8"),
    ],
)
def test_the_best_spec_is_that_of_the_card(on, card, quality, edge, balanced, fast):
    """As docs/kernels.md's table says."""
    on(card)
    plan = preset("quality")
    assert spec_at(plan, tokens=32768) == quality
    assert spec_at(plan, progress=0.0, tokens=32768) == "fp16"
    plan = preset("balanced")
    assert spec_at(plan, tokens=32768) == balanced
    assert spec_at(plan, progress=0.05, tokens=32768) == edge
    plan = preset("fast")
    assert spec_at(plan, tokens=32768) == fast
    assert spec_at(plan, progress=0.05, tokens=32768) == balanced
    assert spec_at(plan, tokens=448) == "fp16"


def test_four_bit_begins_where_it_is_faster(on):
    on("rtx4090")
    plan, costs = preset("fast"), card_costs("rtx4090")
    fewest = [rule.min_tokens for rule in plan.rules[1:]]  # 8 bit has none where 4 bit is faster
    assert all(512 < tokens < 4096 for tokens in fewest)
    for tokens in (256, *(n - 64 for n in fewest), *fewest, 16384):
        took = {
            name: call_milliseconds(name, costs, tokens, tokens, 128, 24)
            for name in ("fp16", "int8/int8", "int4/fp8-fast")
        }
        assert spec_at(plan, tokens=tokens) == min(took, key=took.get)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("card", CYCLES)
def test_no_preset_is_predicted_to_be_slower_than_half(name, card):
    plan, costs = card_preset(name, card), card_costs(card)
    for tokens in (256, 1024, 2048, 4608, 16384, 32768):
        for progress in (0.0, 0.5):
            spec = plan.resolve("", progress, tokens=tokens)
            took = call_milliseconds(spec, costs, tokens, tokens, 128, 24)
            assert took <= call_milliseconds("fp16", costs, tokens, tokens, 128, 24)
    assert describe_preset(name, plan, card).startswith(f"{name}: ")


def test_of_equals_the_most_accurate_comes_first():
    assert cheapest_first(EIGHT_BIT, "rtx4090")[:2] == ["int8/int8", "int8/fp8-fast"]
    assert cheapest_first(EIGHT_BIT, "h100")[0] == "int8/fp8"
    assert cheapest_first(EIGHT_BIT, "rtx3090")[-2:] == ["int8/fp8", "int8/fp8-fast"]
    assert cheapest_first(EIGHT_BIT, None) == list(EIGHT_BIT)


def test_what_never_pays_keeps_the_least():
    assert least_tokens("int8/fp16", "fp16", "h100", 128) == 128
    assert least_tokens("int8/fp8", "fp16", "rtx3090", 128) == 128  # nobody told its time
    assert least_tokens("int8/int8", "fp16", None, 77) == 77
    assert least_tokens("int8/int8", "fp16", "rtx4090", 8192) == 8192


def test_presets_choose_what_the_machine_runs(monkeypatch):
    def automatic(call):
        return None if "8/fp8" in str(call.spec) or "int4" in str(call.spec) else "triton"

    monkeypatch.setattr(presets.backends, "automatic", automatic)
    presets.preset.cache_clear()
    try:
        assert spec_at(presets.preset("fast")) == "fp4/fp8-fast"
        assert spec_at(presets.preset("balanced")) == "int8/int8"
    finally:
        presets.preset.cache_clear()


def test_the_card_is_found_by_its_architecture(monkeypatch):
    assert presets.this_card(torch.device("cpu")) is None
    for capability, card in (((8, 9), "rtx4090"), ((12, 0), "rtx5090"), ((7, 5), None)):
        monkeypatch.setattr(presets, "device_arch", lambda device, c=capability: (c, None))
        assert presets.this_card(torch.device("cpu")) == card
    assert set(presets.CARD_OF.values()) == set(CYCLES)


def test_an_unknown_preset():
    with pytest.raises(PlanError, match="quality, balanced, fast, got 'best'"):
        preset("best")
