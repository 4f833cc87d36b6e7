"""CUDA graphs: what may be captured, and what an operator that decides in Python does instead."""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sage_diffusion import AttentionSession, Guard, PrecisionPlan, Rule, attention
from sage_diffusion.attend import finite, guard, session
from sage_diffusion.attend.layer import AttentionRefused

CHANGING = PrecisionPlan("int8/fp8", (Rule("fp16", end=0.3), Rule("int4/int8", start=0.3, end=0.6)))


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(1, 2, 40, 64) for _ in range(3))


@pytest.fixture
def captured(monkeypatch):
    """The calls are captured in a graph."""
    for module in (finite, guard, session):
        monkeypatch.setattr(module, "capturing", lambda x: True)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch has no tag")
def test_what_decides_in_python_says_so():
    operators = torch.ops.sage_diffusion
    unsafe = {
        name: torch.Tag.cudagraph_unsafe in getattr(operators, name).default.tags
        for name in ("attention", "layer_attention", "bypass")
    }
    assert unsafe == {"attention": False, "layer_attention": True, "bypass": True}


@pytest.fixture
def graphs():
    """Inductor partitions as for a GPU, whose graphs are this: names of what entered and left."""
    utils = pytest.importorskip("torch._inductor.utils")
    if not hasattr(utils, "set_customized_partition_wrappers"):
        pytest.skip("this PyTorch's inductor doesn't partition")
    from torch._inductor import config, scheduler

    log = []

    def wrap(partition, metadata):
        def run(args):
            log.append("capture")
            out = partition(args)
            log.append("end")
            return out

        return run

    torch._dynamo.reset()
    node = scheduler.BaseSchedulerNode
    with (
        mock.patch.object(node, "is_gpu", lambda self: True),
        config.patch(force_disable_caches=True, graph_partition=True),
    ):
        utils.set_customized_partition_wrappers(wrap)
        try:
            yield log
        finally:
            utils.set_customized_partition_wrappers(None)
            torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_reduce_overhead_captures_around_a_layer_and_its_precision_changes(graphs, qkv):
    class Watch:
        def observe(self, event):
            graphs.append(str(event.spec))

    found = AttentionSession(CHANGING)
    layer, weight = found.layer("x"), torch.randn(64, 64) / 8

    def block(q, k, v):
        return layer((q.flatten(0, 2) @ weight).view_as(q), k, v).flatten(0, 2) @ weight

    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    found.start(4)
    with torch.no_grad():
        for step in range(4):
            found.begin_step(step)
            want = block(*qkv)
            found.observers = [Watch()]
            assert torch.equal(compiled(*qkv), want)
            found.observers = []
    specs = ("fp16", "int4/int8", "int8/fp8", "int8/fp8")
    assert graphs == [x for spec in specs for x in ("capture", "end", spec, "capture", "end")]


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_reduce_overhead_captures_a_spec_that_is_fixed(graphs, qkv):
    weight = torch.randn(64, 64) / 8

    def block(q, k, v):
        rows = (q.flatten(0, 2) @ weight).view_as(q)
        return attention(rows, k, v, "int8/fp8").flatten(0, 2) @ weight

    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        assert torch.equal(compiled(*qkv), block(*qkv))
    assert graphs == ["capture", "end"]


@pytest.mark.usefixtures("captured")
def test_a_call_whose_precision_changes_is_not_captured_with_one(qkv):
    found = AttentionSession(CHANGING)
    for progress in (0.0, 0.4, 0.9):  # also where the step's own spec is fp16
        with found.at(progress):
            assert torch.equal(found.attend("x", *qkv), F.scaled_dot_product_attention(*qkv))
    reason = "a CUDA graph is captured, which would repeat this step's precision"
    assert found.summary().declined == {reason: 3}
    with pytest.raises(AttentionRefused, match="CUDA graph"):
        AttentionSession(CHANGING, strict=True).attend("x", *qkv)


@pytest.mark.parametrize(
    "plan",
    [
        PrecisionPlan("int8/fp8"),
        PrecisionPlan("int8/fp8", (Rule("fp16", "other", end=0.5),)),
        PrecisionPlan("int8/fp8", (Rule("int4/int8", min_tokens=64, start=0.5),)),
        PrecisionPlan("fp16", (Rule("int8/fp8", "x", end=0.5), Rule("int8/fp8", "x", start=0.5))),
    ],
)
def test_a_steady_plan_is_captured_and_not_looked_at(plan, qkv, request):
    plan = dataclasses.replace(plan, sign_seed=None)  # as of the call below
    found = AttentionSession(plan, guard=Guard(every=1, limit=1e-6))
    found.attend("x", *qkv)  # warms up
    found.reset_counts()
    request.getfixturevalue("captured")
    found.start(2)
    out = found.attend("x", *qkv)
    assert torch.equal(out, attention(*qkv, "int8/fp8"))
    found.begin_step(1)
    found.finish()
    (layer,) = found.summary().layers
    assert layer.ran == {("int8/fp8", "reference"): 1} and not layer.declined
    assert layer.drift is None and not layer.stepped_up


@pytest.mark.usefixtures("captured")
def test_a_rule_for_one_branch_is_not_steady(qkv):
    found = AttentionSession(PrecisionPlan("int8/fp8", (Rule("fp16", branch="cond"),)))
    found.attend("x", *qkv)
    assert found.summary().quantized == 0


def test_nothing_is_captured_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not finite.capturing(torch.zeros(1))
