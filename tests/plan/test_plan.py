import json
import os

import pytest
import torch
from paced import at_most

from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule, progress, step_progress


def plan_json(**fields):
    return json.dumps({"version": 6, "default": "int8/fp8", **fields})


def test_first_match_wins_and_ranges_are_half_open():
    plan = PrecisionPlan(
        "int4/fp8-fast",
        (
            Rule("fp16", "double.0*", end=0.5),
            Rule("int8/fp16", "double.*", start=0.5),
            Rule("int8/fp8", branch="uncond", start=0.9),
            Rule("int8/int8", min_tokens=4096),
        ),
    )

    def name(*args, **kwargs):
        return str(plan.resolve(*args, **kwargs))

    assert name("double.01", 0.0) == "fp16"
    assert name("double.01", 0.4999) == "fp16"
    assert name("double.01", 0.5) == "int8/fp16"
    assert name("double.01", 1.0) == "int8/fp16"  # an end of 1 includes the last step
    assert name("single.01", 0.95, branch="uncond", tokens=64) == "int8/fp8"
    assert name("single.01", 0.95, branch="cond", tokens=64) == "int4/fp8-fast"
    assert name("single.01", 0.1, tokens=4096) == "int8/int8"
    assert name("single.01", 0.1, tokens=4095) == "int4/fp8-fast"
    assert name("Double.01", 0.1, tokens=1) == "int4/fp8-fast"  # globs are case-sensitive


def test_json_round_trip_keeps_everything():
    plan = PrecisionPlan(
        AttentionSpec.parse("int8/fp8+smooth_v"),
        (Rule("int4/int8", "a.*", 0.25, 0.75, "cond", 16), Rule("fp16", "b")),
        model="FluxTransformer2DModel",
        name="balanced",
        schedule=(1.0, 0.5, 0.0),
        fingerprint={"layers": ["a", "b"]},
        calibration={"prompts": 4},
        sign_seed=7,
    )
    assert PrecisionPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("version", [1, 2])
def test_specs_of_older_plans_mean_what_they_meant(version):
    rules = [{"spec": "int8/fp8", "end": 0.5}, {"spec": {"pv": "int8"}, "end": 0.7}]
    text = json.dumps({"version": version, "default": "int8/int8", "rules": rules})
    old = PrecisionPlan.from_json(text)
    assert old.default == AttentionSpec("int8", "int8")
    assert [rule.spec for rule in old.rules] == [AttentionSpec("int8", "fp8"), old.default]
    assert PrecisionPlan.from_json(old.to_json()) == old  # in today's names
    fields = PrecisionPlan.from_json(json.dumps({"version": version, "default": {"pv": "fp8"}}))
    assert fields.default == AttentionSpec("int8", "fp8")
    new = PrecisionPlan.from_json(plan_json(default={"pv": "fp8"}, rules=rules))
    assert new.default == AttentionSpec.parse("int8/fp8") != fields.default
    assert new.rules[0].spec.rotate


def test_plans_of_version_3_read_v_twice():
    """A spec as an object has today's V where it names one and its default has another."""
    rules = [{"spec": "int8/fp8", "end": 0.5}, {"spec": {"pv": "fp8"}, "end": 0.7}]
    text = json.dumps({"version": 3, "default": "int4/fp8-fast", "rules": rules})
    old = PrecisionPlan.from_json(text)
    assert str(old.default) == "int4/fp8-fast-sample_v-unbiased" and not old.rules[0].spec.sample_v
    assert PrecisionPlan.from_json(old.to_json()) == old
    today = PrecisionPlan.from_json(plan_json(default="int8/fp16", rules=rules))
    assert all(rule.spec.sample_v for rule in today.rules) and not today.default.sample_v
    rules[1]["spec"]["sample_v"] = False
    today = PrecisionPlan.from_json(plan_json(default="int8/fp16", rules=rules))
    assert not today.rules[1].spec.sample_v


def test_scores_of_plans_of_version_4_are_as_clipping_leaves_them():
    rules = [{"spec": "int8/fp8", "end": 0.5}, {"spec": {"smooth_v": True}, "end": 0.7}]
    text = json.dumps({"version": 4, "default": "int4/fp8-fast", "rules": rules})
    old = PrecisionPlan.from_json(text)
    assert str(old.default) == "int4/fp8-fast-unbiased" and not old.rules[1].spec.unbiased
    assert old.rules[0].spec == AttentionSpec.parse("int8/fp8")
    assert PrecisionPlan.from_json(old.to_json()) == old


def test_an_int8_v_of_plans_of_version_5_has_one_scale_for_all_tokens():
    """A spec as an object has today's V where it names one and its default has another."""
    rules = [{"spec": "int4/int8", "end": 0.5}, {"spec": {"pv": "int8"}, "end": 0.7}]
    text = json.dumps({"version": 5, "default": "int8/fp8", "rules": rules})
    old = PrecisionPlan.from_json(text)
    assert str(old.rules[0].spec) == "int4/int8-tile_v" and not old.rules[1].spec.tile_v
    assert PrecisionPlan.from_json(old.to_json()) == old
    today = PrecisionPlan.from_json(plan_json(default="int8/fp8", rules=rules))
    assert all(rule.spec.tile_v for rule in today.rules) and not today.default.tile_v
    rules[1]["spec"]["tile_v"] = False
    assert (
        not PrecisionPlan.from_json(plan_json(default="int8/fp8", rules=rules)).rules[1].spec.tile_v
    )


def test_plans_of_version_1_rotate_alike_at_all_steps():
    old = PrecisionPlan.from_json('{"version": 1, "default": "int4/fp8-fast"}')
    assert old.sign_seed is None
    again = PrecisionPlan.from_json(old.to_json())  # in a later version, and the same numbers
    assert again == old and json.loads(old.to_json())["sign_seed"] is None
    assert PrecisionPlan.from_json(plan_json()).sign_seed == 0
    assert PrecisionPlan.of("int4/fp8-fast").sign_seed == 0


def test_a_spec_object_takes_missing_fields_from_the_default():
    text = plan_json(
        default="int8/fp8+smooth_v", rules=[{"spec": {"qk": "int4", "smooth_q": True}}]
    )
    spec = PrecisionPlan.from_json(text).rules[0].spec
    assert spec == AttentionSpec(
        "int4", "fp8", smooth_q=True, smooth_v=True, rotate=True, balance=True, sample_v=True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "a plan must be a JSON object, got list"),
        ('{"version": 1}', "default: is missing"),
        ('{"default": "fp16"}', "version: is missing"),
        ('{"version": 0, "default": "fp16"}', "version: must be 1 to 6, got 0"),
        ('{"version": 7, "new": 1}', "reads up to 6: update sage-diffusion"),
        ('{"version": true, "default": "fp16"}', "version: "),
        ('{"version": 1, "default": "fp16", "sign_seed": 1}', "sign_seed: .* version 1 have none"),
        (plan_json(sign_seed=-1), "^sign_seed must be a whole number from 0 to 2147483647 or null"),
        (plan_json(sign_seed=2**31), "^sign_seed must be .*, got 2147483648"),
        (plan_json(sign_seed=True), "^sign_seed must be .*, got True"),
        (plan_json(sign_seed="7" * 10**6), "^sign_seed must be .*, got '777"),
        (plan_json(colour="red"), "colour: unknown key"),
        (plan_json(fingerprint={"layers": 3}), "fingerprint.layers: "),
        (plan_json(fingerprint={"head_dims": {"a": "x"}}), "fingerprint.head_dims.a: "),
        (plan_json(default="int5/fp8"), "default: 'int5/fp8' is not an attention spec"),
        (plan_json(rules=[{"spec": "fp16"}, {"spec": {"qk": "int5"}}]), r"rules\[1\].spec.qk: "),
        (plan_json(rules=[{"spec": {"qkk": "int8"}}]), r"rules\[0\].spec: unknown field 'qkk'"),
        (plan_json(rules=[{"spec": "fp16", "glob": "*"}]), r"rules\[0\].glob: unknown key"),
        (plan_json(rules=[{"layers": "*"}]), r"rules\[0\].spec: is missing"),
        (plan_json(rules=[{"spec": "fp16", "start": "a"}]), r"rules\[0\].start: "),
        (plan_json(rules=[{"spec": "fp16", "end": 1.5}]), r"rules\[0\].end: .*1.5"),
        (plan_json(rules=[{"spec": "fp16", "start": 0.5, "end": 0.5}]), "start must be less than"),
        (plan_json(rules=[{"spec": "fp16", "branch": "both"}]), "branch must be cond, uncond"),
        (plan_json(rules=[{"spec": "fp16", "min_tokens": -1}]), r"rules\[0\].min_tokens: "),
        (plan_json(rules=[{"spec": "fp16"}, {"spec": "int8/fp8"}]), "can never apply"),
        (plan_json(schedule=[0.0, 1.0]), "strictly descending"),
        (plan_json(schedule=[2, "1.0"]), r"^schedule\[1\]: .*number, got '1.0'"),
        (plan_json(schedule=[True, 0.5]), r"^schedule\[0\]: .*number, got True"),
        (plan_json(schedule=[1.0, None]), r"^schedule\[1\]: .*number, got None"),
        (plan_json(schedule=[float("inf"), 1.0]), r"^schedule\[0\] must be a finite number"),
        (plan_json(schedule_unit="metres" * 10**6), "^schedule_unit must be one of"),
        (plan_json(rules=[{"spec": "fp16", "start": float("nan")}]), r"^rules\[0\].start must be"),
        (plan_json(rules=[{"spec": "fp16", "start": False}]), r"^rules\[0\].start: .*got False"),
        (plan_json(rules=[{"spec": "fp16", "min_tokens": "9"}]), r"^rules\[0\].min_tokens: "),
        (plan_json(rules=[{"spec": "fp16", "min_tokens": 10**299}]), r"^rules\[0\]: min_tokens"),
        (plan_json(rules=[{"spec": "fp16", "layers": "a" * 10**6}]), r"^rules\[0\]: layers must"),
        (plan_json(rules=[{"spec": "fp16", "branch": "b" * 10**6}]), r"^rules\[0\]: branch must"),
        (plan_json(rules=[{"spec": "x" * 10**6}]), r"^rules\[0\].spec: 'xxx"),
        (plan_json(rules=[{"spec": {"y" * 10**6: 1}}]), r"^rules\[0\].spec: unknown field"),
        (plan_json(rules=[{"spec": ["int8"] * 10**5}]), r"^rules\[0\].spec: "),
        (plan_json(rules=["fp16" * 10**5]), r"^rules\[0\]: "),
        (plan_json(rules={"0": {}}), "^rules: "),
        (plan_json(**{"k" * 10**6: 1}), "^kkk.*: unknown key"),
        (plan_json(name=["n"] * 10**6), "^name: "),
        (plan_json(name="\ud800"), "^name must be Unicode text"),
        (plan_json(fingerprint={"head_dims": {"a": "64"}}), "^fingerprint.head_dims.a: "),
        (plan_json(fingerprint={"head_dims": {"a": -64}}), "^fingerprint.head_dims.a: "),
        (plan_json(calibration={"a": [float("nan")]}), r"^calibration.a\[0\] must be a finite"),
        (f'{{"version": 1{"0" * 5000}}}', "^version must be a finite number"),
        (f'{{"version": 1{"0" * 299}}}', "^version: this plan has version 1000"),
        (f'{{"calibration": {"[" * 20_000}', r"^calibration\[0\].* must have at most 64"),
        ('{"version": 1, "rules": [], "rules": [{}]}', "^rules must occur once"),
    ],
)
def test_bad_plans_name_the_path(text, message):
    with at_most(2000), pytest.raises(PlanError, match=message) as caught:
        PrecisionPlan.from_json(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("values", [("1.0", "0.5"), (True, False), (2.0, float("nan")), (1e400, 1)])
def test_a_schedule_is_of_finite_numbers_in_python_too(values):
    assert PrecisionPlan("fp16", schedule=torch.tensor([2, 0.5])).schedule == (2.0, 0.5)
    with pytest.raises(PlanError, match=r"schedule\[[01]\] must be a finite number"):
        PrecisionPlan("fp16", schedule=values)


def test_shadowed_rules_are_refused_and_overlapping_ones_are_not():
    with pytest.raises(PlanError, match=r"rules\[1\] can never apply: rules\[0\] covers it"):
        PrecisionPlan("fp16", (Rule("int8/fp8", "a.*"), Rule("int4/int8", "a.b", 0.2, 0.4)))
    PrecisionPlan("fp16", (Rule("int8/fp8", "a.*", end=0.5), Rule("int4/int8", "a.b", 0.2, 0.6)))
    PrecisionPlan("fp16", (Rule("int8/fp8", branch="cond"), Rule("int4/int8")))


def test_check_tells_another_model_from_a_stray_rule():
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", "double.*"), Rule("int8/fp16", "x.*")), "Flux")
    assert plan.check(["double.0", "single.0"]) == [
        "rules[1].layers 'x.*' matches no layer (there are double.0, single.0)"
    ]
    with pytest.raises(PlanError, match=r"rules\[1\]"):
        plan.check(["double.0"], strict=True)
    with pytest.raises(PlanError, match=r"another model \(Flux\)"):
        plan.check(["blocks.0.attn1"])
    assert PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),)).check(["blocks.0"]) == []


def test_files(tmp_path):
    plan, path = PrecisionPlan("int8/fp8", (Rule("fp16", end=0.1),)), tmp_path / "deep" / "p.json"
    plan.save(path)
    assert PrecisionPlan.load(path) == plan == PrecisionPlan.of(str(path))
    assert os.listdir(path.parent) == ["p.json"]  # the temporary file is gone
    path.write_text('{"version": 1, "default": 3}')
    with pytest.raises(PlanError, match=r"p\.json: default: "):
        PrecisionPlan.load(path)
    with pytest.raises(PlanError, match="cannot be read"):
        PrecisionPlan.of(str(tmp_path / "missing.json"))
    path.write_bytes(b"\xef\xbb\xbf" + plan.to_json().encode())
    assert PrecisionPlan.load(path) == plan  # Windows editors put a byte-order mark before it
    path.write_text('{"version": 1, "default": NaN}')
    with pytest.raises(PlanError, match=r"p\.json: default must be a finite number"):
        PrecisionPlan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not UTF-8"):
        PrecisionPlan.load(path)


def test_of_takes_what_users_write():
    assert PrecisionPlan.of("int8/fp8") == PrecisionPlan(AttentionSpec.parse("int8/fp8"))
    assert PrecisionPlan.of("int8/fp16") == PrecisionPlan()
    with pytest.raises(TypeError, match="need a spec, a plan or a path, got int"):
        PrecisionPlan.of(8)
    with pytest.raises(ValueError, match="the ladder is"):
        PrecisionPlan.of("int9/fp8")


def test_progress():
    schedule = (1.0, 0.75, 0.5, 0.0)
    assert [progress(t, schedule) for t in schedule] == [0.0, 1 / 3, 2 / 3, 1.0]
    assert progress(2.0, schedule) == 0.0 and progress(-1.0, schedule) == 1.0
    assert progress(0.25, schedule) == pytest.approx(2.5 / 3)
    with pytest.raises(ValueError, match="finite"):
        progress(float("nan"), schedule)
    assert [step_progress(i, 3) for i in range(3)] == [0.0, 0.5, 1.0]
    assert step_progress(0, 1) == 0.0


def test_remap_to_another_schedule():
    plan = PrecisionPlan("fp16", schedule=(1.0, 0.5, 0.0))
    assert plan.remap(0.75) == 0.25
    with pytest.raises(PlanError, match="stores no schedule"):
        PrecisionPlan("fp16").remap(0.5)
