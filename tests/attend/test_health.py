"""What a session learns a step late: NaN that came in or was made, verdicts read by count."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from broken import HUGE, made_nan  # noqa: F401

from sage_diffusion import AttentionSession, PrecisionPlan, Rule
from sage_diffusion.attend import finite
from sage_diffusion.attend import health as verdicts_module
from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.health import LOOK_EVERY, POLL_EVERY, NonFiniteOutput
from sage_diffusion.kernels.spec import LADDER


def qkv(length=40):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, 64, generator=generator) for _ in range(3)]


# ---------------------------------------------------------------------- NaN that comes in
@pytest.mark.parametrize("spec", [name for name in LADDER if name != "fp16"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_that_comes_in_comes_out_and_is_named(spec, which, bad):
    tensors = qkv()
    tensors["qkv".index(which)][0, 1, 7, 3] = bad
    session = AttentionSession(spec)
    session.start(2)
    out = session.attend("x", *tensors)
    assert torch.equal(out, F.scaled_dot_product_attention(*tensors)) or out.isnan().any()
    assert not out.isfinite().all()
    session.begin_step(1)
    (layer,) = session.summary().layers
    assert (layer.came_in, layer.non_finite) == ((0,), ())
    assert layer.stepped_up == ()  # quantization is not to blame
    assert "NaN CAME IN at steps 0" in str(session.summary())


def test_a_layer_that_nan_came_into_is_quantized_again_in_the_next_run():
    q, k, v = qkv()
    session = AttentionSession("int8/fp8")
    for value in (k * float("nan"), k):
        session.start(2)
        for step in range(2):
            session.begin_step(step)
            session.attend("x", q, value, v)
        session.finish()
    (layer,) = session.summary().layers
    assert layer.ran == {("fp16", "native"): 1, ("int8/fp8", "reference"): 2}
    assert list(layer.declined.values()) == [1]


def test_strict_raises_for_what_came_in_at_the_next_step():
    q, k, v = qkv()
    session = AttentionSession("int8/fp8", strict=True)
    session.start(2)
    session.attend("x", q * float("nan"), k, v)
    with pytest.raises(NonFiniteOutput, match="came into the attention of x"):
        session.begin_step(1)


def test_on_a_gpu_a_call_in_eight_is_looked_into_and_nobody_waits(monkeypatch):
    monkeypatch.setattr(finite, "reads_at_once", lambda x: False)
    q, k, v = qkv()
    looked = []
    session = AttentionSession("int8/fp8")
    monkeypatch.setattr(
        session.verdicts.inputs, "look", lambda name, step, x: looked.append((name, step))
    )
    session.start(LOOK_EVERY)
    for step in range(LOOK_EVERY):
        session.begin_step(step)
        for name in ("a", "b"):
            session.attend(name, q, k, v)
    assert looked == [("b", 6)] * 3 + [("a", 7)] * 3


def test_what_is_known_late_runs_natively_until_the_run_is_over(monkeypatch):
    """As on a GPU: the quantized output hid the NaN, from then on the model's own shows it."""
    monkeypatch.setattr(finite, "reads_at_once", lambda x: False)
    monkeypatch.setattr(verdicts_module, "LOOK_EVERY", 1)
    q, k, v = qkv()
    k[0, 0, 3, 3] = float("nan")
    session = AttentionSession("int8/fp8")
    session.start(3)
    found = []
    for step in range(3):
        session.begin_step(step)
        found.append(bool(session.attend("x", q, k, v).isfinite().all()))
    assert found == [True, False, False]
    assert session.summary().layers[0].came_in == (0,)


# ---------------------------------------------------------------------- nothing piles up
def test_verdicts_are_read_by_count_where_nobody_steps():
    session = AttentionSession("int8/fp16")
    layer, q = session.layer("x"), torch.randn(1, 1, 16, 16)
    most = 0
    for _ in range(600):
        layer(q, q, q)
        most = max(most, len(session.watch) + len(session.verdicts.inputs))
    assert most < POLL_EVERY + 4


@pytest.mark.parametrize("where", ["at", "begin_step"])
def test_drift_checks_are_read_by_count_too(where):
    """A server's loop that says which step it is at and nothing else."""
    session = AttentionSession("int4/int8", guard=Guard(every=1, limit=10.0))
    q = torch.randn(1, 1, 16, 16)
    if where == "begin_step":
        session.begin_step(0)
    for _ in range(300):
        if where == "at":
            with session.at(0.0, step=0):
                session.attend("x", q, q, q)
        else:
            session.attend("x", q, q, q)
    assert len(session.guard) < POLL_EVERY
    assert session.summary().layers[0].drift > 0


@pytest.mark.usefixtures("made_nan")
def test_a_bad_layer_is_booked_once_a_step_however_long_a_server_runs():
    q, k, v = (x[:, :, :8] for x in qkv())
    session = AttentionSession("int8/fp16", guard=Guard(step_up=False))
    for _ in range(3 * POLL_EVERY):
        session.attend("x", q, k, v * HUGE)
    session.finish()
    assert session.verdicts.non_finite == {"x": [-1]}


# ---------------------------------------------------------------------- runs that break off
@pytest.mark.usefixtures("made_nan")
def test_verdicts_of_a_broken_off_run_are_not_booked_on_the_next(caplog):
    q, k, v = qkv()
    session = AttentionSession("int8/fp16", strict=True, guard=Guard(every=1, limit=1e-9))
    session.start(4)
    session.attend("x", q, k, v * HUGE)  # and then Ctrl-C
    session.start(2)
    for step in range(2):
        session.begin_step(step)
        session.attend("x", q, k, v)
    assert "x was not finite at step 0 of a run that was broken off" in caplog.text
    (layer,) = session.summary().layers
    assert layer.non_finite == ()
    assert [reason.split(" at ")[1] for reason in layer.stepped_up] == ["step 0"]


def test_breaking_off_forgets_where_sampling_stood():
    q, k, v = qkv()
    session = AttentionSession("int8/fp16")
    session.start(4)
    session.begin_step(2)
    session.set_branch(None, ("uncond", "cond"))
    session.attend("x", q, k, v)
    session.break_off()
    assert (session.where.step, session.where.progress, session.where.chunks) == (-1, 0.0, ())
    assert len(session.watch) == 0


# ---------------------------------------------------------------------- nothing is kept alive
class Look:
    def observe(self, event):
        event.out.sum()


CASES = {
    "quantized": {},
    "guarded and observed": {"guard": Guard(every=1, limit=1e-9), "observers": [Look()]},
    "strict": {"strict": True},
    "declined": {"backend": "triton"},
}


@pytest.mark.usefixtures("made_nan")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [None, "nan", "huge"])
def test_no_tensor_of_a_call_outlives_it(case, bad):
    """With Python's cycle collector off: a call leaves no cycle behind either."""
    if case == "strict" and bad:
        pytest.skip("raises at the next step")
    plan = PrecisionPlan("int8/fp8", (Rule("int4/int8", branch="cond"), Rule("fp16", "y")))
    session = AttentionSession(plan, **CASES[case])
    alive = []

    def call(name, *shape):
        tensors = [torch.randn(*shape) for _ in range(3)]
        if bad:
            tensors[2] = tensors[2] * (float("nan") if bad == "nan" else HUGE)
        mask = torch.ones(shape[-2], shape[-2], dtype=torch.bool)
        out = session.attend(name, *tensors, mask=mask)
        alive.extend(weakref.ref(x) for x in (*tensors, mask, out))

    gc.collect()
    gc.disable()
    try:
        session.start(2)
        for step, chunks in itertools.product(range(2), ((), ("uncond", "cond"))):
            session.begin_step(step)
            session.set_branch(None, chunks)
            for name in ("x", "y"):
                call(name, 2, 1, 16, 64)
                assert not any(ref() is not None for ref in alive)
        if case != "strict":
            call("x", 1, 1, 4, 320)  # a head_dim that nobody has
        session.finish()
    finally:
        gc.enable()
    assert len(alive) >= 40
    assert not any(ref() is not None for ref in alive)
