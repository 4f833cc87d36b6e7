import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from broken import HUGE, made_nan  # noqa: F401

from sage_diffusion import AttentionSession, PrecisionPlan, Rule, attention
from sage_diffusion.attend.health import NonFiniteOutput
from sage_diffusion.attend.layer import AttentionRefused


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(1, 2, 40, 64) for _ in range(3))


def test_the_plan_decides_by_layer_and_progress(qkv):
    plan = PrecisionPlan("int8/fp8", (Rule("fp16", "a", end=0.5), Rule("int4/int8", "b")))
    session = AttentionSession(plan)
    a, b = session.layer("a"), session.layer("b")
    session.start(3)
    for step in range(3):
        session.begin_step(step)
        a(*qkv)
        b(*qkv)
    summary = session.summary()
    assert {layer.name: dict(layer.ran) for layer in summary.layers} == {
        "a": {("fp16", "native"): 1, ("int8/fp8", "reference"): 2},
        "b": {("int4/int8", "reference"): 3},
    }
    assert (summary.calls, summary.quantized) == (6, 5)
    assert "int4/int8 50%" in str(summary)


def test_results_are_attention_of_the_spec(qkv):
    session = AttentionSession("int8/fp8")
    expected = attention(*qkv, "int8/fp8", backend="reference")
    assert torch.equal(session.attend("x", *qkv), expected)
    session.plan = "fp16"
    assert torch.equal(session.attend("x", *qkv), F.scaled_dot_product_attention(*qkv))


def test_at_sets_and_restores_the_place(qkv):
    session = AttentionSession(PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),)))
    session.attend("x", *qkv)
    with session.at(0.7, step=5):
        assert session.where.step == 5
        session.attend("x", *qkv)
    assert (session.where.step, session.where.progress) == (-1, 0.0)
    assert session.summary().specs == {"fp16": 1, "int8/fp8": 1}


def test_branches(qkv):
    session = AttentionSession(PrecisionPlan("fp16", (Rule("int8/fp8", branch="uncond"),)))
    for branch in ("cond", "uncond", None):
        session.set_branch(branch)
        session.attend("x", *qkv)
    assert session.summary().specs == {"fp16": 2, "int8/fp8": 1}


def test_a_plan_with_a_schedule_is_looked_up_by_sigma():
    session = AttentionSession(
        PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),), schedule=(1.0, 0.5, 0.0))
    )
    session.start(11)
    session.begin_step(1, sigma=0.4)
    assert session.where.progress == pytest.approx(0.6)
    assert str(session.spec_for("x", 64)) == "int8/fp8"


def test_what_cannot_be_served_runs_natively_and_is_counted(qkv, caplog):
    q, k, v = qkv
    session = AttentionSession("int8/fp8")
    wide = torch.randn(1, 2, 8, 320)
    for _ in range(2):
        out = session.attend("x", wide, wide, wide)
    assert torch.equal(out, F.scaled_dot_product_attention(wide, wide, wide))
    assert session.summary().declined == {"head_dim must be between 1 and 256, got 320": 2}
    assert len(caplog.records) == 1  # one logged reason, however many calls
    session.attend("x", q.requires_grad_(), k, v)
    assert any("gradients" in reason for reason in session.summary().declined)


def test_strict_raises_instead():
    session = AttentionSession("int8/fp8", strict=True)
    wide = torch.randn(1, 2, 8, 320)
    with pytest.raises(AttentionRefused, match="x: head_dim must be between 1 and 256"):
        session.attend("x", wide, wide, wide)


def test_a_named_backend_does_not_fall_back_to_another(qkv):
    session = AttentionSession("int8/fp8", backend="triton")
    session.attend("x", *qkv)
    (reason,) = session.summary().declined
    assert reason == "needs a CUDA or ROCm device, the tensors are on cpu (int8/fp8 on triton)"
    with pytest.raises(ValueError, match="backend must be one of auto"):
        AttentionSession("int8/fp8", backend="magic")


@pytest.mark.usefixtures("made_nan")
def test_non_finite_outputs_are_reported_at_the_next_step(qkv, caplog):
    q, k, v = qkv
    session = AttentionSession("int8/fp16")
    layer, other = session.layer("bad"), session.layer("good")
    session.start(3)
    layer(q, k, v * HUGE)
    other(q, k, v)
    assert session.summary().layers[0].non_finite == ()  # nothing is read back during a step
    session.begin_step(1)
    assert session.summary().layers[0].non_finite == (0,)
    assert "non-finite attention output in bad" in caplog.text
    session.begin_step(2)
    assert session.summary().layers[0].non_finite == (0,)
    strict = AttentionSession("int8/fp16", strict=True)
    strict.start(2)
    strict.attend("bad", q, k, v * HUGE)
    with pytest.raises(NonFiniteOutput, match="bad"):
        strict.begin_step(1)


@pytest.mark.usefixtures("made_nan")
def test_finish_reports_the_last_step(qkv):
    q, k, v = qkv
    session = AttentionSession("int8/fp16")
    session.start(1)
    session.attend("bad", q, k, v * HUGE)
    session.finish()
    assert session.summary().layers[0].non_finite == (0,)


def test_observers_see_every_served_call(qkv):
    class Record:
        def __init__(self):
            self.events = []

        def observe(self, event):
            self.events.append((event.layer, event.step, str(event.spec), event.out.shape))

    record = Record()
    session = AttentionSession(PrecisionPlan("fp16", (Rule("int8/fp8", "b"),)), observers=[record])
    session.start(2)
    session.attend("a", *qkv)
    session.attend("b", *qkv)
    shape = (1, 2, 40, 64)
    assert record.events == [("a", 0, "fp16", shape), ("b", 0, "int8/fp8", shape)]


def test_a_deep_copy_is_a_session_of_its_own(qkv):
    session = AttentionSession("int8/fp8")
    layer = session.layer("x")
    twin = copy.deepcopy({"layer": layer, "session": session})
    assert twin["layer"].session is twin["session"] is not session
    assert twin["session"].layers["x"] is twin["layer"]
    twin["layer"](*qkv)
    assert session.summary().calls == 0 and twin["session"].summary().calls == 1
    assert pickle.loads(pickle.dumps(layer)).name == "x"


def test_compiled_code_neither_breaks_nor_recompiles_while_precision_changes(qkv):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    rules = Rule("fp16", end=0.3), Rule("int4/int8", start=0.3, end=0.6)
    session = AttentionSession(PrecisionPlan("int8/fp8", rules, sign_seed=None))
    layers = [session.layer(f"blocks.{i}") for i in range(3)]

    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, q, k, v):
            return self.layer(q, k, v) + 1

    torch._dynamo.reset()
    blocks = [torch.compile(Block(x), fullgraph=True, backend=count) for x in layers]
    session.start(4)
    with torch.no_grad():
        for step in range(4):
            session.begin_step(step)
            for block in blocks:
                out = block(*qkv)
    assert torch.equal(out, attention(*qkv, "int8/fp8", backend="reference") + 1)
    assert len(graphs) == 1
    assert session.summary().specs == {"int8/fp8": 6, "fp16": 3, "int4/int8": 3}


def test_bad_arguments():
    session = AttentionSession("fp16")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        session.start(0)
    with pytest.raises(ValueError, match=r"one sigma a step \(3\), got 2"):
        session.start(3, (1.0, 0.5))
    assert "no attention call was intercepted" in str(session.summary())


def test_a_call_that_is_served_in_parts_is_one_call(qkv):
    q, k, v = (x.repeat(2, 1, 1, 1) for x in qkv)
    rules = (Rule("int8/int8", branch="uncond"), Rule("int8/fp16", "both", branch="cond"))
    session = AttentionSession(PrecisionPlan("fp16", rules))
    session.start(2)
    for step in range(2):
        session.begin_step(step)
        session.set_branch(None, ("uncond", "cond"))
        for name in ("half", "both"):
            session.attend(name, q, k, v)
    assert session.finish().calls == 4
    summary = session.summary()
    assert (summary.calls, summary.quantized) == (4, 4)
    assert [(layer.calls, layer.quantized) for layer in summary.layers] == [(2, 2), (2, 2)]
    assert summary.shares == {"int8/int8": 0.5, "fp16": 0.25, "int8/fp16": 0.25}
    session.reset_counts()
    assert session.summary().calls == 0
