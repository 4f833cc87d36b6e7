"""Which plan counts where a workflow carries one and a file of its name is, or is not, here."""

import pytest

from sage_diffusion.integrations.comfy.carried import choose, signature
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule
from sage_diffusion.plan.embed import content_hash, embed_plan

MINE = PrecisionPlan("int8/fp8", (Rule("fp16", "double.00", 0.5),), name="a")
OTHER = PrecisionPlan("int8/fp16", name="a")


@pytest.fixture
def path(tmp_path):
    OTHER.save(tmp_path / "a.json")
    return tmp_path / "a.json"


def test_whoever_lacks_the_file_runs_what_the_workflow_carries():
    chosen = choose("a", embed_plan(MINE, "a"), None)
    assert chosen.plan == MINE
    assert chosen.origin == f"plan of this workflow, hash {content_hash(MINE)}"


def test_another_file_of_that_name_is_told_apart(path):
    chosen = choose("a", embed_plan(MINE, "a"), path)
    assert chosen.plan == MINE
    assert f"the file a here is another ({content_hash(OTHER)})" in chosen.origin
    assert "another" not in choose("a", embed_plan(OTHER, "a"), path).origin


def test_without_one_the_file_counts(path):
    chosen = choose("a", "", path)
    assert chosen.plan == OTHER
    assert chosen.origin == f"file a, hash {content_hash(OTHER)}"
    assert choose("a", embed_plan(MINE, "b"), path).plan == OTHER  # of a file chosen before
    with pytest.raises(PlanError, match="no plan named 'a' here, and the workflow carries none"):
        choose("a", "", None)


def test_an_edited_plan_runs_and_is_named():
    text = embed_plan(MINE, "a").replace('"start":0.5', '"start":0.25')
    chosen = choose("a", text, None)
    assert chosen.plan.rules[0].start == 0.25
    assert f"edited by hand (was {content_hash(MINE)})" in chosen.origin


def test_a_broken_file_beside_a_carried_plan_does_no_harm(path):
    path.write_text("{")
    assert choose("a", embed_plan(MINE, "a"), path).plan == MINE
    with pytest.raises(PlanError, match="is not JSON"):
        choose("a", "", path)


def test_two_nodes_with_two_plans_of_one_name_each_run_their_own():
    plans = [choose("a", embed_plan(plan, "a"), None).plan for plan in (MINE, OTHER)]
    assert plans == [MINE, OTHER]


def test_the_signature_changes_with_the_file_and_with_what_is_carried(path):
    before = signature("a", "", path)
    assert signature("a", "", path) == before
    MINE.save(path)
    assert signature("a", "", path) != before
    assert signature("a", "text", path) != signature("a", "", path)
    assert signature("a", "", None) != before
