"""Plans as ComfyUI users meet them."""

import json

import pytest
import torch

from sage_diffusion.integrations.comfy.doctor import answers, diagnosis
from sage_diffusion.integrations.comfy.images import (
    as_image,
    draw,
    from_png,
    grid,
    matching,
    note,
    plan_layers,
    shares,
)
from sage_diffusion.integrations.comfy.presets import (
    OWN_PLANS,
    PRESETS,
    custom,
    describe,
    plan_files,
    preset,
    renamed,
    save_plan,
    with_default,
    with_rule,
    without_rule,
)
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule


def spec_at(plan, layer="double.00", progress=0.5, tokens=4096):
    return str(plan.resolve(layer, progress, tokens=tokens))


@pytest.mark.parametrize(
    ("name", "first", "middle"),
    [
        ("quality", "fp16", "int8/fp16"),
        ("balanced", "int8/fp16", "int8/fp8"),
        ("fast", "int8/fp8", "int4/fp8-fast"),
    ],
)
def test_presets(name, first, middle):
    plan = preset(name)
    assert spec_at(plan, progress=0.0) == first
    assert spec_at(plan) == spec_at(plan, progress=1.0) == middle
    assert spec_at(plan, tokens=77) == "fp16"
    assert set(PRESETS) == {"quality", "balanced", "fast"}


def test_presets_choose_what_the_machine_runs(monkeypatch):
    from sage_diffusion.integrations.comfy import presets

    def select(call, backend="auto"):
        if "8/fp8" in str(call.spec) or "int4" in str(call.spec):
            raise presets.backends.BackendUnavailable(call.spec, {})

    monkeypatch.setattr(presets.backends, "select", select)
    presets.preset.cache_clear()
    try:
        assert spec_at(presets.preset("fast")) == "int8/int8"
        assert spec_at(presets.preset("balanced")) == "int8/int8"
    finally:
        presets.preset.cache_clear()


def test_an_unknown_preset():
    with pytest.raises(PlanError, match="quality, balanced, fast, got 'best'"):
        preset("best")


def test_custom_plans():
    plan = custom(
        "int4/int8", start=0.25, end=0.75, layers="double.*, !double.00\nsingle.1?", min_tokens=100
    )
    assert spec_at(plan, "double.01") == "int4/int8"
    assert spec_at(plan, "single.12") == "int4/int8"
    assert spec_at(plan, "double.00") == "fp16"
    assert spec_at(plan, "single.05") == "fp16"
    assert spec_at(plan, "double.01", progress=0.1) == "fp16"
    assert spec_at(plan, "double.01", progress=0.75) == "fp16"
    assert spec_at(plan, "double.01", tokens=99) == "fp16"
    assert spec_at(custom("int8/fp16", layers="!double.00")) == "fp16"
    assert spec_at(custom("int8/fp16", layers="!double.00"), "double.01") == "int8/fp16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "int5"}, "not an attention spec"),
        ({"spec": "int8/fp16", "start": 0.6, "end": 0.5}, "start must be less than end"),
        ({"spec": "int8/fp16", "layers": " "}, "layers must be globs"),
        ({"spec": "int8/fp16", "layers": "!"}, "layers must be globs"),
    ],
)
def test_custom_plans_say_what_is_wrong(arguments, message):
    with pytest.raises(PlanError, match=message):
        custom(**arguments)


def test_the_packs_own_plans_are_readable_and_listed():
    files = plan_files([OWN_PLANS])
    assert len(files) >= 3
    for name, path in files.items():
        assert PrecisionPlan.load(path).name == name


def test_folders_are_searched_in_order(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    plan = PrecisionPlan("int8/fp16")
    save_plan(plan, mine, "sub/a", overwrite=False)
    save_plan(plan, theirs, "sub/a.json", overwrite=False)
    save_plan(plan, theirs, "b", overwrite=False)
    assert plan_files([mine, theirs]) == {
        "sub/a": mine / "sub" / "a.json",
        "b": theirs / "b.json",
    }
    assert plan_files([tmp_path / "nowhere"]) == {}


def test_saving_replaces_only_what_it_may(tmp_path):
    plan = PrecisionPlan("int8/fp16", name="one")
    path = save_plan(plan, tmp_path, "a", overwrite=False)
    with pytest.raises(PlanError, match="exists"):
        save_plan(plan, tmp_path, "a", overwrite=False)
    save_plan(renamed(plan, "two"), tmp_path, "a", overwrite=True)
    assert PrecisionPlan.load(path).name == "two"
    for broken in ("{", '{"version": 9}', "[]"):
        path.write_text(broken)
        with pytest.raises(PlanError, match="not overwritten"):
            save_plan(plan, tmp_path, "a", overwrite=True)
        assert path.read_text() == broken


@pytest.mark.parametrize("name", ["../a", "/a", "", "a//b", "a/../b", ".hidden", "a\\b"])
def test_saving_stays_in_its_folder(tmp_path, name):
    with pytest.raises(PlanError, match="name must be made of"):
        save_plan(PrecisionPlan(), tmp_path, name, overwrite=True)
    assert not list(tmp_path.rglob("*"))


def test_edits():
    plan = PrecisionPlan("fp16", (Rule("int8/fp16", "a"), Rule("int8/int8", "b")))
    top = with_rule(plan, Rule("int4/int8", "a"))
    assert [str(rule.spec) for rule in top.rules] == ["int4/int8", "int8/int8"]
    assert len(with_rule(plan, Rule("int4/int8", "c"), first=False).rules) == 3
    with pytest.raises(PlanError, match="can never apply"):
        with_rule(plan, Rule("int4/int8", "a"), first=False)
    assert [rule.layers for rule in without_rule(plan, 0).rules] == ["b"]
    with pytest.raises(PlanError, match="between 0 and 1, got 2"):
        without_rule(plan, 2)
    assert str(with_default(plan, "int8/fp8").default) == "int8/fp8"
    assert renamed(plan, " ").name is None


def test_a_plan_in_words():
    rule = Rule("int8/fp16", "double.*", 0.25, 0.5, "cond", 128)
    text = describe(PrecisionPlan("fp16", (rule,), name="mine", model="SD3"))
    assert text.splitlines() == [
        "mine",
        "made for SD3",
        "0: double.*, steps 25%-50%, cond only, from 128 tokens -> int8/fp16",
        "else -> fp16",
    ]


# ---------------------------------------------------------------------- pictures
PLAN = PrecisionPlan("fp16", (Rule("int8/fp16", "double.*", 0.5), Rule("int4/int8", "single.*")))


def test_a_plan_as_a_grid():
    layers = ["double.00", "single.00"]
    cells = grid(PLAN, layers, 4, "cond", 4096)
    assert [[str(spec) for spec in row] for row in cells] == [
        ["fp16", "fp16", "int8/fp16", "int8/fp16"],
        ["int4/int8"] * 4,
    ]
    assert shares(cells) == {"int4/int8": 0.5, "fp16": 0.25, "int8/fp16": 0.25}
    assert plan_layers(PLAN) == ["double.*", "single.*", "(other layers)"]
    assert matching(layers, "") == layers
    assert matching(layers, "sing*, x") == ["single.00"]


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


def test_images_are_comfyuis():
    image = note("nothing to draw " * 20)
    assert image.dtype == torch.float32
    assert float(image.max()) <= 1
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 51)).save(buffer, "PNG")
    red = from_png(buffer.getvalue())
    assert red.shape == (1, 2, 3, 3)
    assert torch.allclose(red[0, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


# ---------------------------------------------------------------------- doctor
def test_the_doctor_answers_for_every_spec():
    found = answers("cpu")
    assert found["int4/fp8-fast"]["reference"] is None
    assert "CUDA" in found["int8/fp16"]["triton"]
    text = diagnosis("cpu", mask="bool")
    assert "int8/fp16       reference" in text
    assert "preset fast: int8/fp8, int4/fp8-fast" in text
    assert "slower than ordinary attention" in text


def test_own_plans_are_json_that_people_can_read():
    for path in OWN_PLANS.glob("*.json"):
        assert list(json.loads(path.read_text()))[:3] == ["version", "name", "default"]
