"""What stands on a node: always of the last thing that happened, never of an earlier run."""

import pytest
import torch
from test_comfy_patch import Patcher, comfy  # noqa: F401

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy import attached, marked_off, patch, status
from sage_diffusion.plan import PrecisionPlan, Rule


class InterruptProcessingException(Exception):
    """ComfyUI's name for the button on the page."""


def stops(model, error):
    """A clone whose sampling breaks off in its first model call."""

    def apply(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise error

    new = model.clone()
    new.add_wrapper_with_key("apply_model", "stops", apply)
    return new


def states_of(model):
    """The states that a node is told, in order."""
    seen = []
    attached(model).reporters.append(lambda news: seen.append(news.state))
    return seen


def test_a_run_goes_from_ready_to_done():
    model = patch(Patcher(), "int8/fp16")
    seen = states_of(model)
    assert status(model).state == "ready"
    model.sample()
    assert seen == ["sampling", "done"]
    assert str(status(model)).startswith("int8/fp16: 6 of 6 attention calls\n")


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (InterruptProcessingException(), "cancelled", "cancelled while sampling"),
        (RuntimeError("out of\nmemory"), "failed", "RuntimeError: out of memory"),
    ],
)
def test_a_run_that_is_broken_off_keeps_nothing_of_the_run_before(error, state, words):
    model = patch(Patcher(), "int8/fp16")
    model.sample()
    with pytest.raises(type(error)):
        stops(model, error).sample()
    assert attached(model).last is None
    assert status(model).state == state
    assert words in str(status(model))
    model.sample()
    assert status(model).state == "done"
    assert attached(model).last.summary.calls == 6


def test_a_verdict_at_the_end_of_a_strict_run_is_a_failure_too(monkeypatch):
    model = patch(Patcher(), "int8/fp16", strict=True)

    def finish(self, judge=True):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(AttentionSession, "finish", finish)
    with pytest.raises(FloatingPointError):
        model.sample()
    assert status(model).state == "failed"


def test_nothing_quantized_is_a_cause_and_a_remedy():
    model = patch(Patcher(), PrecisionPlan("fp16", (Rule("int8/fp16", min_tokens=128),)))
    model.sample()
    state, first, second = status(model)
    assert state == "nothing"
    assert first == "NOT QUANTIZED: min_tokens is 128, and the longest call has 24 keys"
    assert second == "Remedy: lower min_tokens, or sample a larger picture"
    data = attached(model).last.to_dict()
    assert (data["state"], data["headline"]) == (state, [first, second])


def test_a_plan_that_quantizes_nothing_says_so_calmly():
    model = patch(Patcher(), "fp16")
    model.sample()
    assert status(model)[:2] == ("done", "fp16, as planned: 6 attention calls")


def test_a_warning_takes_the_second_line():
    rules = (Rule("int8/fp16", "double.*"), Rule("int8/fp16", "nothing.here"))
    model = patch(Patcher(), PrecisionPlan("fp16", rules))
    model.sample()
    state, first, second = status(model)
    assert (state, first) == ("warning", "int8/fp16: 6 of 6 attention calls")
    assert second.startswith("WARNING: ")
    assert str(attached(model).last).count("WARNING") == 1


def test_another_node_that_samples_is_named():
    model = patch(Patcher(), "int8/fp16")
    model.sample()
    attached(model).sampled_by("Attention Accuracy Check")
    assert attached(model).last is None
    assert status(model)[:2] == ("elsewhere", "sampled by Attention Accuracy Check")


def test_off_and_missing_are_told_apart():
    model = Patcher()
    off = marked_off(model)
    assert off is not model
    assert off.model_options == model.model_options
    assert torch.equal(off.sample(), model.sample())
    assert status(off).state == "off"
    assert status(model).state == "nothing"
    assert status(patch(off, "int8/fp16")).state == "ready"
