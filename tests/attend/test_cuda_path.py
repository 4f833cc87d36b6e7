"""What a call does on its way to a GPU, seen without one: the current card, and waiting for it."""

import dataclasses

import pytest
import torch
from recording import FakeCards, recorded
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_diffusion import AttentionSession, AttentionSpec, Guard, Rope
from sage_diffusion.attend import backends, execution, finite
from sage_diffusion.attend.backends import Backend
from sage_diffusion.attend.calls import AttentionCall, Call

SPEC = AttentionSpec.parse("int8/fp8")


def test_any_backend_runs_on_its_tensors_card_and_leaves_the_current_one(monkeypatch):
    """Other packages' launches don't look where their tensors are, or change the current card."""
    seen = []

    def theirs(call, *arguments):
        seen.append(FakeCards.current)
        FakeCards.current = 7
        return torch.empty_like(call.q), None

    record = Backend("theirs", "", lambda call: None, lambda: theirs)
    monkeypatch.setattr(backends, "BACKENDS", (record,))
    backends.select.cache_clear()
    asked = AttentionCall.typical(SPEC, "sm_89", 64, 8)
    with FakeTensorMode(), recorded():
        q = torch.empty(1, 2, 8, 64, dtype=torch.float16, device="cuda:1")
        execution.run(Call(q, q, q), asked, "auto")
    backends.select.cache_clear()
    assert seen == [1] and FakeCards.current == 0


class UnderWay:
    """The event behind a copy that never arrives."""

    def query(self):
        return False

    def synchronize(self):
        raise AssertionError("waited")


@pytest.mark.parametrize("chunks", [(), ("cond", "uncond")])
def test_a_session_starts_its_calls_and_waits_for_nothing(monkeypatch, chunks):
    """Watched, guarded, masked, rotated, and by somebody else's kernel; a step's end included."""
    theirs = tuple(dataclasses.replace(record, finite=False) for record in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", theirs)
    backends.select.cache_clear()
    monkeypatch.setattr(finite, "reads_at_once", lambda x: False)
    monkeypatch.setattr(finite, "copy_to_host", lambda values: (values, UnderWay()))
    q, k, v = torch.randn(3, 2, 2, 40, 64).unbind()
    rope = Rope(*torch.randn(2, 40, 64))
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    session = AttentionSession("int8/fp8", guard=Guard(every=1))
    session.start(3)
    session.set_branch(None, chunks)
    layers = [session.layer(name) for name in ("a", "b")]
    with recorded() as found:
        for step in range(3):
            session.begin_step(step)
            session.attend(layers[0], q, k, v, mask=mask, rope_q=rope, rope_k=rope)
            session.attend(layers[1], q, k, v, is_causal=True)
    backends.select.cache_clear()
    assert session.summary().quantized == 6
    assert found.torch.count("nan_to_num") == 6
    assert found.waits == []
