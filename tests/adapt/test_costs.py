"""What calls take beyond their main loops, and what plans make of it."""

import math

import numpy as np
import pytest

from sage_diffusion.adapt.costs import (
    Costs,
    CostTableError,
    call_milliseconds,
    card_costs,
    load_costs,
    relative_cost,
)
from sage_diffusion.adapt.planner import make_plan, predicted_time
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.times import cell_times
from sage_diffusion.speed.traffic import LAUNCH_MICROSECONDS

SPECS = ("int8/fp16", "int8/fp8-fast", "int4/fp8-fast")
HEADS, DIM = 24, 128


def table_of(tokens, *, known=True, k_len=None, layers=3, steps=4):
    """Layers of one size, which err alike."""
    k_len = k_len or tokens
    work = float(HEADS * tokens * k_len * DIM)
    table = ScoreTable(SPECS, steps, {"model": "M"})
    for i in range(layers):
        for step in range(steps):
            pair = (tokens, k_len) if known else None
            table.saw(f"blocks.{i}", step, None, work, 1, pair)
            error = np.array([1e-6, 1e-4, 1e-2]) * (1 + i + step)
            table.add(f"blocks.{i}", step, None, np.stack([1 - error, error**0.5, error], -1))
    return table


def test_a_calls_time():
    costs = card_costs("rtx4090")
    half = call_milliseconds("fp16", costs, 4608, 4608, DIM, HEADS)
    operations = 4 * HEADS * 4608**2 * DIM
    assert half == pytest.approx(operations / 165.2e9 + LAUNCH_MICROSECONDS / 1e3, rel=1e-2)
    for spec in SPECS:
        call = call_milliseconds(spec, costs, 4608, 4608, DIM, HEADS)
        loop = (half - LAUNCH_MICROSECONDS / 1e3) * relative_cost(spec, costs)
        assert loop * 1.1 < call < loop + 0.35
    with pytest.raises(CostTableError, match="a call's time needs a card"):
        call_milliseconds("fp16", Costs({"fp16": 1}), 64, 64, DIM, 1)


def test_long_calls_cost_their_main_loop_and_short_ones_do_not():
    loops = cell_times(table_of(64), SPECS, card_costs("rtx4090", math.inf)).sum((0, 1, 2))
    assert loops == pytest.approx([relative_cost(s, card_costs("rtx4090")) for s in SPECS])
    before = None
    for tokens in (512, 1024, 4096, 16384, 262144):
        times = cell_times(table_of(tokens), SPECS, card_costs("rtx4090")).sum((0, 1, 2))
        assert (times > loops).all()
        assert before is None or (times < before).all()
        before = times
    # 4 bit's delta-S grows as the loop does.
    assert before == pytest.approx(loops, rel=0.1)
    assert before[:2] == pytest.approx(loops[:2], rel=0.02)


def test_four_bit_does_not_pay_in_a_plan_for_a_thousand_tokens():
    short, long = (
        make_plan(table_of(tokens), budget=0.95 if tokens < 2000 else 0.25, costs="rtx4090")
        for tokens in (1024, 32768)
    )
    took = [predicted_time(table_of(1024), spec, "rtx4090") for spec in (*SPECS, "fp16")]
    assert min(took) == took[1] < took[2] and SPECS[1].startswith("int8")
    assert short.share(lambda name: name.startswith("int4")) == 0
    assert long.share(lambda name: name.startswith("int4")) > 0.2
    assert long.plan.calibration["time_of"] == "calls"
    assert long.plan.calibration["costs"] == "rtx4090"


def test_a_plan_is_made_for_other_sizes_than_were_calibrated():
    small, large = table_of(1024), table_of(8192)
    asked = predicted_time(small, "int8/fp8-fast", card_costs("rtx4090", 8192))
    assert asked == pytest.approx(predicted_time(large, "int8/fp8-fast", "rtx4090"))
    # The text of cross-attention stays as long as it is.
    text = predicted_time(table_of(1024, k_len=77), "int8/fp8-fast", card_costs("rtx4090", 8192))
    assert text == pytest.approx(
        predicted_time(table_of(8192, k_len=77), "int8/fp8-fast", "rtx4090")
    )
    plan = make_plan(small, budget=0.6, costs=card_costs("rtx4090", 8192)).plan
    assert plan.calibration["tokens"] == 8192
    with pytest.raises(CostTableError, match="tokens must be one or more, got 0"):
        card_costs("rtx4090", 0)
    with pytest.raises(CostTableError, match="tokens must be one or more, got nan"):
        card_costs("rtx4090", math.nan)


def test_without_sizes_or_card_the_main_loops_count():
    loops = relative_cost("int8/fp8-fast", card_costs("rtx4090"))
    old = table_of(1024, known=False)
    assert predicted_time(old, "int8/fp8-fast", "rtx4090") == pytest.approx(loops)
    assert make_plan(old, budget=0.5).plan.calibration["time_of"] == "main loops"
    plain = load_costs({"fp16": 1.0, "int8/fp8-fast": 0.4})
    assert predicted_time(table_of(1024), "int8/fp8-fast", plain) == pytest.approx(0.4)
    assert load_costs(dict(plain), math.inf) == plain
    with pytest.raises(CostTableError, match="tokens must come with the name of a card, got 4608"):
        load_costs(dict(plain), 4608)


def test_cells_that_were_skipped_take_what_the_others_do():
    table, whole = table_of(2048), table_of(2048)
    table.work[1, 2], table.calls[1, 2] = np.nan, 0
    got, want = (cell_times(one, SPECS, card_costs("rtx4090")) for one in (table, whole))
    assert got == pytest.approx(want)


def test_tokens_stay_with_a_table(tmp_path):
    table = table_of(1024, k_len=77)
    table.save(tmp_path / "scores.json")
    assert ScoreTable.load(tmp_path / "scores.json").tokens == {
        f"blocks.{i}": (1024, 77) for i in range(3)
    }
