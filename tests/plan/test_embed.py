"""Plans as text inside of something else: whole, told apart, checked, small."""

import hashlib
import json

import pytest

from sage_diffusion.plan import PlanError, PrecisionPlan, Rule
from sage_diffusion.plan.embed import LARGEST, content_hash, embed_plan, read_embedded
from sage_diffusion.plan.library import bundled_plan

PLAN = PrecisionPlan("int8/fp8", (Rule("fp16", "double.00", 0.5),), name="mïne")


def test_a_plan_comes_back_whole_with_its_hash():
    for plan in (PLAN, bundled_plan()):
        found = read_embedded(embed_plan(plan, "mine/a"))
        assert found.plan == plan
        assert (found.file, found.written, found.edited) == ("mine/a", content_hash(plan), False)


def test_a_calibrated_plan_takes_a_few_kilobytes():
    assert len(embed_plan(bundled_plan(), "bundled")) < 6000


def test_hashes_tell_plans_apart_and_not_how_they_were_written():
    other = PrecisionPlan("int8/fp8", (Rule("fp16", "double.00", 0.6),), name="mïne")
    assert content_hash(other) != content_hash(PLAN)
    assert content_hash(PrecisionPlan.from_json(PLAN.to_json())) == content_hash(PLAN)
    assert len(content_hash(PLAN)) == 16


def test_a_plan_edited_by_hand_loads_and_is_known():
    text = embed_plan(PLAN, "a").replace('"start":0.5', '"start":0.25')
    found = read_embedded(text)
    assert found.edited
    assert found.plan.rules[0].start == 0.25


def test_a_plan_of_an_earlier_version_was_not_edited_by_hand():
    old = {"version": 1, "default": "int8/fp8", "rules": []}
    digest = hashlib.sha256(json.dumps(old, sort_keys=True, separators=(",", ":")).encode())
    text = json.dumps({"file": "a", "sha256": digest.hexdigest()[:16], "plan": old})
    found = read_embedded(text)
    assert found.plan != PrecisionPlan("int8/fp8") and not found.edited
    assert read_embedded(text.replace("int8/fp8", "int8/fp16")).edited


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object of file, sha256 and plan"),
        (json.dumps({"file": 1, "sha256": "a", "plan": {}}), "file must be text, got 1"),
        (
            embed_plan(PLAN, "a").replace('"start":0.5', '"start":5'),
            "embedded plan 'a': rules[0].start",
        ),
        (embed_plan(PLAN, "a").replace('"version":6', '"version":9'), "this plan has version 9"),
        ("x" * (5 << 20), "at most 256 kB, got 5120 kB; load it from a file"),
    ],
)
def test_what_is_no_embedded_plan_is_refused(text, words):
    with pytest.raises(PlanError) as caught:
        read_embedded(text)
    assert words in str(caught.value)


def test_a_plan_too_large_to_embed_is_refused_where_it_is_made():
    large = PrecisionPlan("fp16", name="x" * LARGEST)
    with pytest.raises(PlanError, match="load it from a file"):
        embed_plan(large, "a")
