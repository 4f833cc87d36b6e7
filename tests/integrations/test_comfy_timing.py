"""Seconds with a plan and without it: marks, calls made both ways, and what a report says."""

import pytest
import torch
from test_comfy_patch import Patcher, comfy  # noqa: F401

from sage_diffusion.integrations.comfy import attached, patch
from sage_diffusion.integrations.comfy.timing import (
    BOTH_WAYS,
    NATIVE,
    PARTS,
    HostClock,
    Stopwatch,
    Timing,
)
from sage_diffusion.plan import PrecisionPlan, Rule


class Card:
    """A clock whose work takes what the test says."""

    compares = True

    def __init__(self):
        self.now, self.begun = 0.0, 0

    def work(self, seconds, out=None):
        def run():
            self.now += seconds
            return out

        return run

    def mark(self):
        return self.now

    def wait(self):
        pass

    def seconds(self, span):
        return span[1] - span[0]

    def peak(self):
        return 3 << 30

    def begin(self):
        self.begun += 1


def sampled(watch, card, steps=5, layers=4, native=2.0, ours=0.5, first=30.0):
    """A run whose very first quantized call compiles its kernel."""
    watch.begin_run()
    for step in range(steps):
        with watch.forward(step):
            card.now += 1.0  # everything but attention
            for i in range(layers):
                cost = first if step == i == 0 else ours
                watch.ours("a", "int8/fp16", card.work(cost), card.work(native))
    return watch.read()


def test_attention_and_step_before_and_after_leave_warming_up_aside():
    card = Card()
    watch = Stopwatch(card, compare=True)
    found = sampled(watch, card)
    assert found.attention == pytest.approx(20 * 0.5)
    assert found.attention_before == pytest.approx(20 * 2.0)
    assert found.step == pytest.approx(1.0 + 4 * 0.5)
    assert found.step_before == pytest.approx(1.0 + 4 * 2.0)
    assert found.both_ways == BOTH_WAYS
    assert found.brief() == "attention 40 -> 10 s, step 9 -> 3 s, peak 3.0 GB"
    again = sampled(watch, card)  # kernels are there, and what native calls take is known
    assert again.both_ways == 0
    assert again.attention_before == pytest.approx(20 * 2.0)
    assert card.begun == 2


def test_switched_off_only_what_ran_is_told():
    card = Card()
    found = sampled(Stopwatch(card, compare=False), card)
    assert (found.attention_before, found.step_before, found.both_ways) == (None, None, 0)
    assert found.brief() == "attention 10 s, step 3 s, peak 3.0 GB"


def test_calls_that_a_plan_leaves_alone_are_the_baseline():
    card = Card()
    watch = Stopwatch(card, compare=True)
    watch.begin_run()
    for _ in range(BOTH_WAYS):
        watch.native("a", card.work(2.0))
    watch.ours("a", "int8/fp16", card.work(0.5), card.work(99.0))
    found = watch.read()
    assert found.both_ways == 0
    assert (found.attention_before, found.attention) == (8.0, 6.5)
    assert found.step is None


def test_a_kind_that_nobody_made_natively_leaves_the_total_unknown():
    card = Card()
    watch = Stopwatch(card, compare=True)
    watch.begin_run()
    watch.ours("a", "int8/fp16", card.work(0.5), None)
    assert watch.read().attention_before is None


def test_a_call_that_fell_back_counts_as_the_models_own():
    card = Card()
    watch = Stopwatch(card, compare=True)
    watch.begin_run()

    def declined():
        watch.fall_back()
        card.now += 2.0

    for _ in range(4):
        watch.ours("a", "int8/fp16", declined, card.work(99.0))
    assert watch._counts == {("a", "int8/fp16"): 0, ("a", NATIVE): 4}
    watch.ours("a", PARTS, declined, None)  # half of it was quantized
    found = watch.read()
    assert (found.attention, found.attention_before, found.both_ways) == (10.0, 10.0, 0)


def test_more_calls_than_are_timed_are_taken_to_be_alike(monkeypatch):
    card = Card()
    monkeypatch.setattr("sage_diffusion.integrations.comfy.timing.MOST_SPANS", 5)
    watch = Stopwatch(card, compare=False)
    watch.begin_run()
    for _ in range(100):
        watch.ours("a", "int8/fp16", card.work(0.5), None)
    assert watch.read().attention == pytest.approx(50.0)


def test_a_run_without_calls_has_no_times():
    assert Stopwatch(Card(), compare=True).read() is None


def test_a_cpu_says_that_the_twin_is_for_accuracy():
    model = patch(Patcher(), "int8/fp16", compare_speed=True)
    model.sample()
    report = attached(model).last
    assert report.headline.second == "on a CPU the twin is for accuracy, not for speed"
    assert report.timing.both_ways == 0
    assert report.timing.attention > 0
    assert report.timing.step > 0
    seconds = report.to_dict()["seconds"]
    assert (seconds["attention_before"], seconds["tells_of_speed"]) == (None, False)


class ComparingClock(HostClock):
    compares = True


def on_a_card(monkeypatch):
    monkeypatch.setattr(
        "sage_diffusion.integrations.comfy.model.clock_of", lambda device: ComparingClock()
    )


def test_a_patched_model_makes_a_few_calls_both_ways_once(monkeypatch):
    on_a_card(monkeypatch)
    plain = patch(Patcher(), "int8/fp16").sample()
    model = patch(Patcher(), "int8/fp16", compare_speed=True)
    assert torch.equal(model.sample(), plain)
    report = attached(model).last
    assert report.timing.both_ways == BOTH_WAYS  # both layers are of one kind
    assert report.summary.calls == 6  # and they count nowhere else
    assert "attention " in report.headline.second
    assert " -> " in report.headline.second
    assert torch.equal(model.sample(), plain)
    assert attached(model).last.timing.both_ways == 0
    assert " -> " in attached(model).last.headline.second


def test_another_nodes_override_is_asked_once_per_call(monkeypatch):
    on_a_card(monkeypatch)
    seen = []

    def other(func, *args, **kwargs):
        seen.append(1)
        return func(*args, **kwargs)

    model = Patcher()
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    plan = PrecisionPlan("int8/fp16", (Rule("fp16", "double.00"),))
    patched = patch(model, plan, compare_speed=True)
    patched.sample()
    assert len(seen) == 3
    assert attached(patched).last.timing.both_ways == 0


def test_a_batch_of_two_specs_is_timed_as_one_call(monkeypatch):
    on_a_card(monkeypatch)
    plan = PrecisionPlan("fp16", (Rule("int8/int8", branch="uncond"),))
    model = patch(Patcher(), plan, compare_speed=True)
    session = attached(model).devices[torch.device("cpu")].session
    state = attached(model).devices[torch.device("cpu")]
    session.start(2)
    session.set_branch(None, ("uncond", "cond"))
    x = torch.randn(2, 24, 16)
    options = {"transformer_options": {}}
    attached(model).override(lambda q, k, v, heads, **_: q, x, x, x, 2, **options)
    assert [spec for _, spec in state.watch._counts] == [PARTS]


def test_what_a_timing_says_where_little_is_known():
    timing = Timing(1.41, 3.12, None, None, None, 3)
    assert timing.brief() == "attention 3.12 -> 1.41 s"
