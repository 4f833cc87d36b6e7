"""Patching a MODEL, with a stand-in for ComfyUI's ``ModelPatcher``: wrappers, clones, removal."""

import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sage_diffusion.accuracy.compare import Generation
from sage_diffusion.accuracy.records import Limits
from sage_diffusion.integrations.comfy import attached, patch, without
from sage_diffusion.integrations.comfy.accuracy import (
    CallSampling,
    as_images,
    as_pictures,
    check,
    heat_map,
    side_by_side,
)
from sage_diffusion.integrations.comfy.model import KEY, OVERRIDE
from sage_diffusion.integrations.comfy.timing import HostClock
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule

APPLY, OUTER, PREPARE = "apply_model", "outer_sample", "on_prepare_state"
ASK = "calc_cond_batch"


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    """The names that the adapter takes from ComfyUI."""
    extension = types.ModuleType("comfy.patcher_extension")
    extension.WrappersMP = SimpleNamespace(
        APPLY_MODEL=APPLY, OUTER_SAMPLE=OUTER, CALC_COND_BATCH=ASK
    )
    extension.CallbacksMP = SimpleNamespace(ON_PREPARE_STATE=PREPARE)
    package = types.ModuleType("comfy")
    package.patcher_extension = extension
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)


def host(q, k, v, heads, **kwargs):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def forward(self, x, options):
        override = options.get(OVERRIDE)
        call = (lambda *a, **k: override(host, *a, **k)) if override else host
        return x + call(x, x, x, 2, transformer_options=options)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, options):
        for block in self.blocks:
            x = block(x, options)
        return x


class Executor:
    """Calls wrappers from the outside in, as ComfyUI's does."""

    def __init__(self, wrappers, original, owner=None):
        self.wrappers, self.original, self.class_obj = wrappers, original, owner

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        rest = Executor(self.wrappers[1:], self.original, self.class_obj)
        return self.wrappers[0](rest, *args, **kwargs)


class Patcher:
    """What the adapter uses of a ``ModelPatcher``, and a sampler."""

    def __init__(self, model=None):
        if model is None:
            config = type("SD3", (), {})()
            model = SimpleNamespace(diffusion_model=Network(), model_config=config)
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks, self.attachments = {}, {}, {}

    def clone(self):
        new = Patcher(self.model)
        new.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        for name in ("wrappers", "callbacks"):
            mine = getattr(self, name).items()
            setattr(new, name, {k: {key: list(f) for key, f in v.items()} for k, v in mine})
        new.attachments = dict(self.attachments)
        return new

    def get_model_object(self, name):
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda percent: 1 - percent)

    def add_wrapper_with_key(self, kind, key, function):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(function)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind, key, function):
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(function)

    def remove_callbacks_with_key(self, kind, key):
        self.callbacks.get(kind, {}).pop(key, None)

    def set_attachments(self, key, value):
        self.attachments[key] = value

    def get_attachment(self, key):
        return self.attachments.get(key)

    def remove_attachments(self, key):
        self.attachments.pop(key, None)

    def all(self, kinds, kind):
        return [f for functions in kinds.get(kind, {}).values() for f in functions]

    def sample(self, steps=3):
        sigmas = torch.linspace(1, 0, steps + 1)
        options = {"transformer_options": dict(self.model_options["transformer_options"])}
        inner = self.model.diffusion_model

        def apply_model(x, t, c_concat, c_crossattn, control, transformer_options):
            return inner(x, transformer_options)

        def run():
            x = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))
            for sigma in sigmas[:-1]:
                for callback in self.all(self.callbacks, PREPARE):
                    callback(self, sigma, options)
                given = options["transformer_options"] | {
                    "sigmas": sigma[None],
                    "sample_sigmas": sigmas,
                    "cond_or_uncond": [0],
                }
                executor = Executor(self.all(self.wrappers, APPLY), apply_model, self.model)
                x = executor(x, sigma, None, None, None, given)
            return x

        return Executor(self.all(self.wrappers, OUTER), run)()


def test_a_clone_is_patched_and_the_model_untouched():
    model = Patcher()
    plain = model.sample()
    patched = patch(model, "int8/fp16")
    out = patched.sample()
    assert 0 < float((out - plain).norm() / plain.norm()) < 0.02
    assert torch.equal(model.sample(), plain)
    assert model.wrappers == {} and model.attachments == {}
    report = attached(patched).last
    assert report.model == "SD3"
    assert [layer.name for layer in report.summary.layers] == ["double.00", "double.01"]
    assert report.summary.specs == {"int8/fp16": 6}


def test_removal_leaves_what_others_did():
    model = Patcher()
    seen = []

    def other(func, *args, **kwargs):
        seen.append(1)
        return func(*args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE] = other
    model.add_wrapper_with_key(APPLY, "else", lambda executor, *args: executor(*args))
    plain = model.sample()
    patched = patch(model, PrecisionPlan("fp16", (Rule("int8/fp16", "double.01"),)))
    seen.clear()
    patched.sample()
    assert len(seen) == 3
    bare = without(patched)
    assert torch.equal(bare.sample(), plain)
    others = {APPLY: {"else": model.wrappers[APPLY]["else"]}, OUTER: {}, ASK: {}}
    assert bare.wrappers == others
    assert KEY not in bare.attachments
    assert bare.model_options["transformer_options"][OVERRIDE] is other


def test_the_override_climbs_above_what_came_later():
    patched = patch(Patcher(), "int8/fp16")
    patched.model_options["transformer_options"][OVERRIDE] = lambda func, *a, **k: func(*a, **k)
    patched.sample()
    assert attached(patched).last.summary.quantized == 6


def sampled(patcher):
    out = patcher.sample()
    picture = (out.reshape(1, 1, 24, 16) / 8 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
    return Generation(picture, (out,))


def test_a_check_runs_with_and_without_the_plan():
    done = check(patch(Patcher(), "int4/int8"), sampled, rows=8)
    assert len(done.report.quantized) == 6
    assert done.report.end_to_end.final_cosine > 0.9
    verdict = done.verdict(Limits(cosine=0.5))
    assert verdict.passed, verdict.why
    word, why = done.verdict(Limits(psnr=200.0))
    assert word == "FAILED"
    assert "must be at least 200" in why
    assert as_images(done.exact).shape == (1, 24, 16, 3)
    assert done.quantized == {"double.00": 3, "double.01": 3}
    assert "6 of 6 quantized calls compared" in done.brief()
    assert "halves" not in done.brief()  # this host's calls have one each
    assert "for accuracy, not for speed" in done.brief()
    assert "PSNR" in done.brief()
    assert side_by_side(done).shape == (1, 24, 32, 3)


def test_a_check_of_live_calls_needs_one_run():
    runs = []

    def sample(patcher):
        runs.append(1)
        return sampled(patcher)

    done = check(Patcher(), sample, PrecisionPlan("int8/fp16"), both=False, rate=0.0)
    assert len(runs) == 1
    assert done.exact is None
    assert not done.report.quantized
    word, why = done.verdict(Limits())
    assert word == "NOT PROVEN"
    assert "no quantized call was compared" in why
    assert as_images(done.exact) is None
    assert heat_map(done.report).shape[3] == 3  # a note
    assert side_by_side(done).shape == (1, 24, 16, 3)


def test_a_check_without_a_plan_says_what_to_connect():
    with pytest.raises(PlanError, match="connect a MODEL that went through Sage Attention"):
        check(Patcher(), sampled)


def test_a_share_of_the_calls_is_looked_at_and_all_that_ran_as_fp16():
    seen = []
    spoiled = []
    watcher = CallSampling(
        SimpleNamespace(observe=seen.append), 0.25, looked=lambda: spoiled.append(1)
    )
    quantized = SimpleNamespace(spec=SimpleNamespace(quantized=True), layer="a")
    for _ in range(400):
        watcher.observe(quantized)
    assert 60 < len(seen) < 140
    assert len(spoiled) == len(seen)
    assert watcher.quantized == {"a": 400}
    seen.clear()
    watcher.observe(SimpleNamespace(spec=SimpleNamespace(quantized=False)))
    assert len(seen) == 1
    for i in range(50):
        watcher.observe(SimpleNamespace(spec=SimpleNamespace(quantized=True), layer=str(i)))
    assert len(seen) == 51  # every layer once
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        CallSampling(watcher, 2)


def test_too_few_compared_calls_prove_nothing():
    model = patch(Patcher(), "int8/fp16")

    def sample(patcher):
        return Generation(None, (patcher.sample(12),))

    done = check(model, sample, rate=0.01)
    word, why = done.verdict(Limits(cosine=0.5))
    assert word == "NOT PROVEN"
    assert why == "2 of 24 quantized calls were compared, at least 16 must be: raise rate"
    whole = check(model, sample)
    assert whole.verdict(Limits(cosine=0.5)).passed
    word, why = whole.verdict(Limits(psnr=20.0))
    assert (word, why.split(":")[0]) == ("NOT PROVEN", "no psnr was measured")


def test_a_layer_that_was_never_compared_is_missed():
    done = check(patch(Patcher(), "int8/fp16"), sampled)
    rows = tuple(row for row in done.report.rows if row.layer == "double.00")
    less = replace(done, report=replace(done.report, rows=rows))
    word, why = less.verdict(Limits(cosine=0.5))
    assert word == "NOT PROVEN"
    assert "no call of 1 layers was compared" in why


def test_both_runs_are_timed_and_comparing_is_no_part_of_it(monkeypatch):
    class Clock(HostClock):
        compares = True

    monkeypatch.setattr("sage_diffusion.integrations.comfy.model.clock_of", lambda device: Clock())
    done = check(patch(Patcher(), "int8/fp16"), sampled, rate=0.01)
    timing = done.timing
    assert timing.attention_before > 0
    assert timing.attention > 0
    assert timing.step_before - timing.step == pytest.approx(
        (timing.attention_before - timing.attention) / 3
    )
    assert " -> " in done.brief()


def test_videos_are_pictures_in_a_row():
    assert as_pictures(torch.rand(2, 5, 8, 6, 3)).shape == (10, 3, 8, 6)
    assert as_pictures(torch.rand(2, 8, 6, 4)).shape == (2, 3, 8, 6)
