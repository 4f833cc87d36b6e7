"""Rules found without trying each: the same answers, and quickly for thousands."""

import copy
import json
import pickle
import random
from fnmatch import fnmatchcase

import pytest
from paced import at_most

from sage_diffusion.plan import PlanError, PrecisionPlan, Rule
from sage_diffusion.plan.globs import GlobIndex
from sage_diffusion.plan.lookup import Lookup, without_shadowed
from sage_diffusion.plan.names import LayerName
from sage_diffusion.plan.rules import wider

SPECS = ("int8/fp8", "int4/fp8-fast", "fp16", "int8/int8")
GLOBS = ("*", "a.*", "a.[01]", "?.1", "b.**", "a.1", "[!a].*", "**.1", "unet.a.*", "[", "a.1.*")
LAYERS = (
    *("a.0", "a.1", "b.1", "b.10", "c", "["),
    *(LayerName("a.1", "unet"), LayerName("a.1", "unet", main=False), LayerName("b.1", "a")),
)


def some_rules(seed, count=40):
    pick = random.Random(seed)
    for _ in range(count):
        start, end = sorted(pick.sample([0.0, 0.2, 0.25, 0.5, 0.75, 1.0], 2))
        yield Rule(
            pick.choice(SPECS),
            pick.choice(GLOBS),
            start,
            end,
            pick.choice([None, None, "cond", "uncond"]),
            pick.choice([0, 0, 16, 64]),
        )


@pytest.mark.parametrize("seed", range(3))
def test_the_first_rule_that_matches_is_found(seed):
    rules = tuple(some_rules(seed))
    lookup = Lookup(rules)
    for layer in LAYERS:
        named = tuple(i for i, r in enumerate(rules) if r.matches(layer, r.start, r.branch))
        assert lookup.named(layer) == named
        for progress in (-0.1, 0.0, 0.2, 0.21, 0.5, 0.99, 1.0, 1.5, float("nan")):
            for branch in (None, "cond", "uncond"):
                for tokens in (None, 0, 16, 63, 64):
                    call = layer, progress, branch, tokens
                    first = next((rule.spec for rule in rules if rule.matches(*call)), None)
                    assert lookup.find(*call) == first


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_plan_that_has_resolved_is_copied_without_what_it_remembers(copied):
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", "a.*", end=0.5), Rule("int8/int8", "a.*")))
    size = len(pickle.dumps(plan))
    for i in range(1000):
        plan.resolve(LayerName(f"a.{i}", "unet"), 0.7)
    again = copied(plan)
    assert again == plan and len(pickle.dumps(plan)) == size
    assert str(again.resolve("a.1", 0.7)) == "int8/int8"


@pytest.mark.parametrize("seed", range(3))
def test_what_can_never_apply_is_what_a_pair_of_rules_says(seed):
    rules = tuple(some_rules(seed, 60))
    covered = [
        (i, next(j for j in range(i) if rules[j].covers(rules[i])))
        for i in range(len(rules))
        if any(rules[j].covers(rules[i]) for j in range(i))
    ]
    assert covered and Lookup(rules).shadowed() == covered
    kept = without_shadowed(rules)
    assert len(kept) == len(rules) - len(covered) and not Lookup(kept).shadowed()


def test_a_glob_is_wider_only_if_it_matches_all_of_the_other():
    assert wider("a.*", "a.b.*") and wider("*", "?") and wider("a*", "a**")
    assert not wider("a?b", "a*b")  # its text is matched, what it matches is not
    assert not wider("[*]x", "*x")
    PrecisionPlan("fp16", (Rule("int8/fp8", "a.?.b"), Rule("int4/int8", "a.*.b")))


def test_an_index_matches_as_fnmatch_does():
    texts = ("", "a", "a.1", "b.10", "[", "unet.a.0", "a*", "x" * 300)
    index = GlobIndex((*GLOBS, "[]x", "[]]", "a[", "x*"))
    for text in texts:
        for glob in (*GLOBS, "[]x", "[]]", "a[", "x*"):
            assert index.match(text, glob) == fnmatchcase(text, glob)
            assert glob in index.candidates(text) or not fnmatchcase(text, glob)


def spans(k):
    return {"start": k / 50, "end": (k + 1) / 50, "spec": SPECS[k % 2]}


THOUSANDS = {
    "layers and steps": [
        {"layers": f"blocks.{i}.*", **spans(k)} for i in range(120) for k in range(50)
    ],
    "steps": [
        {"start": k / 6000, "end": (k + 1) / 6000, "spec": SPECS[k % 2]} for k in range(6000)
    ],
    "globs": [{"layers": f"*.{i}.a?t*", "spec": SPECS[i % 2]} for i in range(6000)],
    "letters": [
        {"layers": "".join("?" if i >> k & 1 else "[ab]" for k in range(13)), "spec": SPECS[i % 2]}
        for i in range(6000)
    ],
    "sizes": [{"min_tokens": 6000 - i, "spec": SPECS[i % 2]} for i in range(6000)],
}


@pytest.mark.parametrize("kind", THOUSANDS)
def test_six_thousand_rules_load_and_resolve_quickly(kind):
    text = json.dumps({"version": 1, "default": "fp16", "rules": THOUSANDS[kind]})
    with at_most(2000):  # 100 to 300 measured; every pair took minutes
        plan = PrecisionPlan.from_json(text)
    layers = [f"blocks.{i}.attn" for i in range(30)]
    for layer in layers:
        plan.resolve(layer, 0.5, tokens=64)
    with at_most(100):  # 4 measured
        for step in range(200):
            for layer in layers:
                plan.resolve(layer, step / 199, tokens=64)
    with at_most(1000):
        plan.unmatched(layers)
        assert all(plan.may_quantize(layer) for layer in layers) == (kind != "letters")


def test_the_last_of_six_thousand_rules_that_never_applies_is_named():
    rules = [Rule("int8/fp8", f"blocks.{i}.*") for i in range(6000)]
    with pytest.raises(PlanError, match=r"rules\[6000\] can never apply: rules\[17\] covers it"):
        PrecisionPlan("fp16", (*rules, Rule("fp16", "blocks.17.attn", 0.2)))


def test_thousands_of_globs_of_wildcards_alone_are_refused_quickly():
    """Where they have a star, each would have to be tried on each."""
    pick = random.Random(0)
    rules = [
        Rule("int8/fp8", "".join(pick.choice(["[ab]", "[bc]", "?"]) for _ in range(12)) + "*")
        for _ in range(6000)
    ]
    message = "at most 200 different globs of wildcards alone, got 5"
    with at_most(5000), pytest.raises(PlanError, match=message):
        PrecisionPlan("fp16", tuple(rules))
    few = [Rule("int8/fp8", "?" * n) for n in range(1, 200)]
    assert PrecisionPlan("fp16", tuple(few)).resolve("abc", 0.5).quantized
