"""Plans that come with the package, and folders of plans."""

import json

import pytest

from sage_diffusion.plan import PlanError, PrecisionPlan
from sage_diffusion.plan.edit import (
    renamed,
)
from sage_diffusion.plan.library import (
    FOLDER,
    OWN_PLANS,
    plan_files,
    save_plan,
    shipped,
    shipped_plan,
)


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


def test_own_plans_are_json_that_people_can_read():
    for path in OWN_PLANS.glob("*.json"):
        assert list(json.loads(path.read_text()))[:3] == ["version", "name", "default"]


@pytest.mark.parametrize("name", shipped())
def test_shipped_plans_are_valid(name):
    plan = shipped_plan(name)
    assert plan.name
    calibrated = plan.calibration is not None
    assert calibrated == (name == "bundled")
    # A plan for one family must not look as if it had been measured there.
    assert calibrated or plan.model is None or "not calibrated" in plan.name
    assert PrecisionPlan.from_json(plan.to_json()) == plan


def test_unknown_shipped_plan():
    assert len(shipped()) == len(list(FOLDER.glob("*.json"))) > 5
    with pytest.raises(PlanError, match="plan must be one of"):
        shipped_plan("nope")
