"""The plans for common families name layers that these families have."""

import re
from fnmatch import fnmatchcase

import pytest
from integrations.tiny_pipelines import PIPELINES, build

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers import apply
from sage_diffusion.plan import PrecisionPlan
from sage_diffusion.plan.library import FOLDER

PLANS = sorted(FOLDER.glob("*.json"))

#: Plan -> tiny pipeline of the family, where the names differ.
FAMILY = {"qwen-image": "qwenimage", "z-image": "zimage"}


def family(path):
    return FAMILY.get(path.stem, path.stem)


def first_block(name):
    """Tiny models have the first blocks only: every number becomes 0."""
    return re.sub(r"\d+", "0", name)


@pytest.mark.parametrize(
    "path", [p for p in PLANS if family(p) in PIPELINES], ids=lambda path: path.stem
)
def test_every_rule_matches_a_layer_of_its_family(path):
    plan = PrecisionPlan.load(path)
    tiny = build(family(path))
    session = AttentionSession(plan)
    with apply(tiny.pipe, session):
        names = {first_block(name) for name in session.layers}
    for rule in plan.rules:
        glob = first_block(rule.layers)
        assert any(fnmatchcase(name, glob) for name in names), (rule.layers, names)


def test_most_families_are_checked():
    assert sum(family(p) in PIPELINES for p in PLANS) >= 10
