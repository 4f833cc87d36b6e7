"""A plan as text, as a grid of specs and as a picture."""

import pytest

from sage_diffusion.integrations.comfy.images import as_image
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule
from sage_diffusion.plan.show import describe, draw, grid, matching, plan_layers, spec_shares


def test_a_plan_in_words():
    rule = Rule("int8/fp16", "double.*", 0.25, 0.5, "cond", 128)
    text = describe(PrecisionPlan("fp16", (rule,), name="mine", model="SD3"))
    assert text.splitlines() == [
        "mine",
        "made for SD3",
        "0: double.*, steps 25%-50%, cond only, from 128 tokens -> int8/fp16",
        "else -> fp16",
    ]
    made = PrecisionPlan("fp16", calibration={"stage": "the local error of attention"})
    assert "calibrated on the local error of attention" in describe(made).splitlines()
    assert "calibrated" not in describe(PrecisionPlan("fp16", calibration={"stage": 3}))


# ---------------------------------------------------------------------- pictures
PLAN = PrecisionPlan("fp16", (Rule("int8/fp16", "double.*", 0.5), Rule("int4/int8", "single.*")))


def test_a_plan_as_a_grid():
    layers = ["double.00", "single.00"]
    cells = grid(PLAN, layers, 4, "cond", 4096)
    assert [[str(spec) for spec in row] for row in cells] == [
        ["fp16", "fp16", "int8/fp16", "int8/fp16"],
        ["int4/int8"] * 4,
    ]
    assert spec_shares(cells) == {"int4/int8": 0.5, "fp16": 0.25, "int8/fp16": 0.25}
    assert plan_layers(PLAN) == ["double.*", "single.*", "(other layers)"]
    assert matching(layers, "") == layers
    assert matching(layers, "sing*, x") == ["single.00"]
    with pytest.raises(PlanError, match=r"layers: 'x' matches none of double\.00"):
        matching(layers, "x")


def test_the_picture_shows_each_cell_in_its_colour():
    cells = grid(PLAN, ["double.00"], 2, None, 4096)
    picture = as_image(draw(cells, ["double.00"], "title"))
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    colours = (picture.reshape(-1, 3).unique(dim=0) * 255).round().int()
    found = {tuple(colour) for colour in colours.tolist()}
    assert {(224, 224, 224), (198, 219, 239)} <= found
    other = AttentionSpec.parse("int8/fp16+rotate")
    draw([[other]], ["x"], "a spec that is not on the ladder")
