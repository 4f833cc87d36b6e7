import dataclasses

import pytest

from sage_diffusion.kernels.formats import Precision
from sage_diffusion.kernels.spec import LADDER, AttentionSpec


@pytest.mark.parametrize("name", LADDER)
def test_ladder_names_round_trip(name):
    spec = AttentionSpec.parse(name)
    assert str(spec) == name
    assert AttentionSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "name",
    [
        "int8/fp16+block",
        "int8/fp8+smooth_v",
        "int4/fp8-fast-clip",
        "int4/int8-smooth_q-rotate-clip+block",
        "fp8/fp8",
        "int8/int8-smooth_k+rotate",
        "int4/int8+unsigned_p+smooth_v",
    ],
)
def test_switches_round_trip(name):
    spec = AttentionSpec.parse(name)
    assert AttentionSpec.parse(str(spec)) == spec


def test_what_the_names_switch_on():
    for name in LADDER[1:]:
        spec = AttentionSpec.parse(name)
        four_bit = name.startswith(("int4", "fp4"))
        assert spec.smooth_k and spec.rotate and spec.balance
        assert spec.smooth_q == spec.clip == spec.unbiased == four_bit
        assert spec.smooth_v == spec.unsigned_p == spec.tile_v == name.endswith("/int8")
        assert spec.sample_v == name.endswith(("/fp8", "/fp8-fast", "/fp4"))
        assert spec.pv_accumulator == ("fp16" if name.endswith("-fast") else "fp32")
    assert AttentionSpec.parse("fp16") == AttentionSpec("fp16", "fp16")
    assert not AttentionSpec.parse("fp16").quantized


def test_names_of_the_first_edition_mean_what_they_meant():
    """Whatever they are called today: files of that time are read, and written again."""
    for name in LADDER[1:]:
        old = AttentionSpec.parse(name, edition=1)
        four_bit = name.startswith(("int4", "fp4"))
        assert old.smooth_k and not (old.smooth_v or old.unsigned_p or old.balance)
        assert old.smooth_q == old.rotate == old.clip == four_bit
        assert AttentionSpec.parse(str(old)) == old
        assert old.formats == name
    today = AttentionSpec.parse("int8/int8")
    switches = "+rotate+balance+smooth_v+tile_v+unsigned_p"
    assert AttentionSpec.parse(f"int8/int8{switches}", edition=1) == today
    assert str(AttentionSpec.parse("int8/fp8", edition=1)) == "int8/fp8-rotate-balance"
    assert AttentionSpec.parse(today, edition=1) is today


def test_names_of_the_second_edition_mean_what_they_meant():
    for name in LADDER[1:]:
        old, today = AttentionSpec.parse(name, edition=2), AttentionSpec.parse(name)
        assert not (old.sample_v or old.unbiased or old.tile_v)
        assert dataclasses.replace(today, sample_v=False, unbiased=False, tile_v=False) == old
        assert AttentionSpec.parse(str(old)) == old
    assert str(AttentionSpec.parse("int8/fp8", edition=2)) == "int8/fp8-sample_v"


def test_names_of_the_third_edition_mean_what_they_meant():
    for name in LADDER[1:]:
        old, today = AttentionSpec.parse(name, edition=3), AttentionSpec.parse(name)
        assert not (old.unbiased or old.tile_v)
        assert dataclasses.replace(today, unbiased=False, tile_v=False) == old
        assert AttentionSpec.parse(str(old)) == old
    assert str(AttentionSpec.parse("int4/int8", edition=3)) == "int4/int8-tile_v-unbiased"


def test_names_of_the_fourth_edition_mean_what_they_meant():
    for name in LADDER[1:]:
        old, today = AttentionSpec.parse(name, edition=4), AttentionSpec.parse(name)
        assert not old.tile_v and dataclasses.replace(today, tile_v=False) == old
        assert AttentionSpec.parse(str(old)) == old
    assert str(AttentionSpec.parse("int8/int8", edition=4)) == "int8/int8-tile_v"


def test_only_an_int8_v_has_scales_of_its_tiles():
    assert not AttentionSpec("int8", "fp8", tile_v=True).tile_v
    assert AttentionSpec("int8", "int8", tile_v=True).tile_v  # with and without a sample
    assert str(AttentionSpec.parse("int4/fp8-fast+tile_v")) == "int4/fp8-fast"


def test_only_clipped_scores_have_a_bias():
    assert not AttentionSpec("int4", "fp8", unbiased=True).unbiased
    assert str(AttentionSpec.parse("int4/int8-clip")) == "int4/int8-clip"
    assert not AttentionSpec.parse("int8/fp16+unbiased").unbiased


def test_a_sample_serves_v_only_where_there_is_one():
    assert not AttentionSpec("int8", "fp8", sample_v=True).sample_v  # nothing is balanced
    assert str(AttentionSpec.parse("int8/fp8-balance")) == "int8/fp8-balance"
    assert not AttentionSpec.parse("int8/int8+sample_v").sample_v
    assert not AttentionSpec.parse("int8/fp16").sample_v


def test_strings_are_accepted_and_resolved_at_the_edge():
    spec = AttentionSpec("int8", "fp8")
    assert spec.qk is Precision.INT8 and spec.pv is Precision.FP8
    assert AttentionSpec.parse(spec) is spec


@pytest.mark.parametrize(
    "text",
    ["", "int5", "int5/fp8", "fp4/int4", "int8/fp16-fast", "int8/fp8+sharp", "int8/fp8-block"],
)
def test_unknown_names_list_the_ladder(text):
    with pytest.raises(ValueError, match="the ladder is fp16, int8/fp16"):
        AttentionSpec.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk": "int5"}, "qk must be one of fp16, fp8, int8, int4, fp4, got 'int5'"),
        ({"pv": "int4"}, "pv must be one of"),
        ({"qk": "fp16", "pv": "fp8"}, "pv must be fp16 when qk is fp16"),
        ({"pv": "int8", "pv_accumulator": "fp16"}, "needs pv='fp8'"),
        ({"pv": "fp8", "unsigned_p": True}, "unsigned_p needs pv='int8', got pv='fp8'"),
        ({"clip": True}, "clip needs qk='int4' or 'fp4', got qk='int8'"),
        ({"qk": "int4", "clip": True, "granularity": "block"}, "granularity='token'"),
        ({"granularity": "row"}, "granularity must be token or block"),
    ],
)
def test_impossible_combinations(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)


def test_types_are_checked():
    with pytest.raises(TypeError, match="smooth_k must be True or False"):
        AttentionSpec(smooth_k=1)
    with pytest.raises(TypeError, match="spec must be a string"):
        AttentionSpec.parse(8)
    with pytest.raises(ValueError, match="unknown field 'qkk'"):
        AttentionSpec.from_dict({"qkk": "int8"}, AttentionSpec())
