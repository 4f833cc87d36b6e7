"""Predicted bounds of decode attention on a packed past: what they must not lose again."""

import json

import pytest

pytest.importorskip("triton", minversion="3.9")

from sage_diffusion import cli
from sage_diffusion.kv.cost import DecodeCost, Setting, decode_costs, rope_costs
from sage_diffusion.speed.cost import CostError, NoKernelError

#: Card, widths, lane-instructions of an element at most, times as fast as bfloat16 at 64K tokens.
GOALS = [("rtx4090", 2, 2.0, 5.0), ("h100", 2, 2.0, 4.5), ("h100", 4, 2.2, 3.0)]


@pytest.mark.parametrize("gpu,width,most,ratio", GOALS)
def test_goals(gpu, width, most, ratio):
    (got,) = decode_costs([gpu], [Setting(width, width, 128, 128)], [65536])
    assert got.instructions <= most and got.spills == 0 and got.bits == width + 0.25
    assert got.ratio >= ratio


def test_a_short_past_is_no_slower_than_bfloat16():
    (got,) = decode_costs(["h100"], [Setting(2, 2, 64, 64)], [1024])
    assert got.ratio >= 1.0 and got.spills == 0


def test_keys_before_rope_are_rotated_where_it_is_cheaper():
    """Few rows: in the kernel; a block of video reads a scratch."""
    bound = DecodeCost("h100", 2.5, 65536, 2.0, "memory", 200, 0, 18.0, 84.0)
    few, many = rope_costs([bound, bound.__class__(**{**bound.__dict__, "length": 1024})])
    assert (few.rows, few.faster, many.rows, many.faster) == (8, "kernel", 1560, "scratch")
    assert few.kernel < few.scratch and many.scratch < many.kernel


def test_command(capsys):
    assert cli.main(["cost", "--kv", "--gpu", "rtx2080ti"]) == 1
    assert "rtx2080ti: needs sm_80 or newer" in capsys.readouterr().err
    assert cli.main(["cost", "--kv", "--gpu", "rtx4090", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["decode"]) == 15 and len(found["rope"]) == 6
    assert all(row["spills"] == 0 and row["ratio"] >= 1.0 for row in found["decode"])
    best = {row["bits"]: row["ratio"] for row in found["decode"] if row["length"] == 65536}
    assert best[2.5] >= 4.0


def test_unknown_cards():
    with pytest.raises(CostError, match="gpu must be one of"):
        decode_costs(["rtx1"])
    with pytest.raises(NoKernelError, match="rtx2080ti"):
        decode_costs(["rtx2080ti"])
