"""What a patched MODEL keeps alive: no tensor of a call, no module of a model that is gone.

Python's cycle collector is off in all of them: nothing may wait for it.
"""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_comfy_patch import OVERRIDE, Executor, Network, Patcher, comfy, host  # noqa: F401
from torch import nn

from sage_diffusion.attend.guard import Guard
from sage_diffusion.integrations.comfy import attached, patch, without
from sage_diffusion.integrations.comfy.accuracy import check
from sage_diffusion.integrations.comfy.kv_inside import inside
from sage_diffusion.plan import PrecisionPlan, Rule

optimized_attention = host


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watched(nn.Module):
    """A block that remembers its q, k and v weakly; ``silent`` asks for no override."""

    def __init__(self, seen, silent=False):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.seen, self.silent = seen, silent
        self.attention = Silent() if silent else None

    def forward(self, x, options):
        parts = [part.clone() for part in self.qkv(x).chunk(3, -1)]
        self.seen.extend(weakref.ref(part) for part in parts)
        if self.silent:
            return x + self.attention(*parts)
        override = options.get(OVERRIDE)
        if override is None:
            return x + host(*parts, 2, transformer_options=options)
        return x + override(host, *parts, 2, transformer_options=options)


class Silent(nn.Module):
    def forward(self, q, k, v):
        return optimized_attention(q, k, v, 2)


class Counting(Network):
    """Eight blocks; notes how many of their tensors are alive when the model call ends."""

    def __init__(self, silent=False):
        super().__init__()
        self.seen, self.alive = [], []
        self.blocks = nn.ModuleList([Watched(self.seen, silent) for _ in range(8)])

    def forward(self, x, options):
        x = super().forward(x, options)
        self.alive.append(sum(ref() is not None for ref in self.seen))
        return x


def model_of(network):
    return Patcher(SimpleNamespace(diffusion_model=network, model_config=type("M", (), {})()))


KINDS = {
    "quantized": ("int8/fp8", {}),
    "some layers": (PrecisionPlan("fp16", (Rule("int8/fp8", "double.03"),)), {}),
    "guarded": ("int4/int8", {"guard": Guard(every=1, limit=1e-9)}),
    "declined": ("int8/fp8", {"backend": "triton"}),
    "branches": (PrecisionPlan("fp16", (Rule("int8/fp8", branch="cond"),)), {}),
}


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_keeps_its_tensors(kind, silent):
    plan, settings = KINDS[kind]
    network = Counting(silent)
    patched = patch(model_of(network), plan, **settings)
    with torch.no_grad():
        patched.sample(steps=2)
    assert len(network.seen) == 2 * 8 * 3
    assert network.alive == [0, 0]
    assert attached(patched).last.summary.calls == 16


class Stop(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("error", [Stop, ValueError])
def test_a_run_that_breaks_off_keeps_nothing(error):
    network = Counting()
    patched = patch(model_of(network), "int8/fp8", guard=Guard(every=1))
    sigmas = []

    def stop(executor, *args):
        sigmas.append([weakref.ref(args[5]["sigmas"]), weakref.ref(args[5]["sample_sigmas"])])
        if len(sigmas) == 2:
            raise error
        return executor(*args)

    patched.add_wrapper_with_key("apply_model", "stop", stop)
    with torch.no_grad(), pytest.raises(error):
        patched.sample()
    assert not any(ref() is not None for ref in network.seen)
    assert not any(ref() is not None for pair in sigmas for ref in pair)
    state = attached(patched).devices[torch.device("cpu")]
    assert len(state.session.watch) == len(state.session.guard) == 0
    assert state.session.where.step == -1
    assert attached(patched).last is None


def test_a_broken_off_runs_verdicts_do_not_fail_the_next():
    """Strict: NaN of a run that the user cancelled is not the next run's."""
    network = Counting()
    patched = patch(model_of(network), "int8/fp8", strict=True)

    def spoil(executor, x, *args):
        if spoiled.pop():
            executor(x * float("nan"), *args)
            raise Stop
        return executor(x, *args)

    spoiled = [False, False, False, True]
    patched.add_wrapper_with_key("apply_model", "spoil", spoil)
    with torch.no_grad():
        with pytest.raises(Stop):
            patched.sample()
        assert patched.sample().isfinite().all()
    assert not attached(patched).last.alarms


def dropped(patched, how):
    """Use a MODEL in some way; nobody holds anything of it afterwards."""
    with torch.no_grad():
        if how == "sampled":
            patched.sample()
        elif how == "cloned, sampled twice and unpatched":
            clone = patched.clone()
            clone.sample()
            patched.sample()
            without(clone).sample()
        elif how == "patched again":
            patch(patched, "int4/int8").sample()
        elif how == "wrapped by another node, patched again":
            inner = patched.model_options["transformer_options"][OVERRIDE]
            options = patched.model_options["transformer_options"]
            options[OVERRIDE] = lambda func, *args, **kwargs: inner(func, *args, **kwargs)
            patch(patched, "int4/int8").sample()
        elif how == "cancelled":
            patched.add_wrapper_with_key("apply_model", "stop", stop)
            with pytest.raises(Stop):
                patched.sample()
        elif how == "called outside of a run":
            attention = attached(patched)
            options = dict(patched.model_options["transformer_options"])
            with attention.forward(patched.model, torch.device("cpu"), options):
                patched.model.diffusion_model(torch.randn(1, 24, 16), options)
        elif how == "checked":
            from sage_diffusion.accuracy.compare import Generation

            check(patched, lambda model: Generation(None, (model.sample(),)))


def stop(executor, *args):
    executor(*args)
    raise Stop


@pytest.mark.parametrize(
    "how",
    [
        "never used",
        "sampled",
        "cloned, sampled twice and unpatched",
        "patched again",
        "wrapped by another node, patched again",
        "cancelled",
        "called outside of a run",
        "checked",
    ],
)
@pytest.mark.parametrize("silent", [False, True])
def test_weights_go_with_the_model(how, silent):
    network = Counting(silent)
    weights = [weakref.ref(parameter) for parameter in network.parameters()]
    patched = patch(model_of(network), "int8/fp8")
    attention = weakref.ref(attached(patched))
    dropped(patched, how)
    del network, patched
    assert not any(ref() is not None for ref in weights)
    assert attention() is None


def test_weights_go_while_the_report_stays():
    network = Counting()
    weights = weakref.ref(network.blocks[0].qkv.weight)
    patched = patch(model_of(network), "int8/fp8")
    with torch.no_grad():
        patched.sample()
    report, attention = attached(patched).last, attached(patched)
    del network, patched
    assert weights() is None
    assert report.summary.quantized == attention.last.summary.quantized == 24


class Writer(nn.Module):
    """A language model that reads a text's letters."""

    def init_kv_cache(self):
        raise AssertionError("nothing is generated")

    def generate(self, embeds, **options):
        raise AssertionError("another stands in its place")


class Clip:
    """A CLIP whose patches stay on its modules after a run, as those that ComfyUI has loaded."""

    def __init__(self, model):
        self.cond_stage_model = model

    @property
    def patcher(self):
        return self

    def clone(self):
        return Clip(self.cond_stage_model)

    def add_object_patch(self, name, value):
        path, _, attribute = name.rpartition(".")
        setattr(self.cond_stage_model.get_submodule(path), attribute, value)

    def tokenize(self, text):
        return torch.tensor([[float(ord(letter)) for letter in text]])[..., None]

    def generate(self, tokens, **options):
        return self.cond_stage_model.writer.generate(tokens, **options)


@pytest.mark.parametrize("error", [None, Stop])
def test_nothing_of_a_run_inside_a_clip_stays_on_it(error, monkeypatch):
    management = SimpleNamespace(should_use_bf16=lambda device: False)
    monkeypatch.setattr(sys.modules["comfy"], "model_management", management, raising=False)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    model = nn.Module()
    model.writer = Writer()
    alive = [weakref.ref(model.writer)]

    def measure(clip):
        seen = torch.zeros(3)
        alive.append(weakref.ref(seen))

        def run(module, embeds):
            assert module is alive[0]() and embeds.flatten().tolist() == [97, 98]
            seen[0] = 1
            if error is not None:
                raise error
            alive.append(weakref.ref(found := torch.ones(2)))
            return found

        if error is not None:
            with pytest.raises(error):
                inside(clip, "ab", run)
        else:
            assert torch.equal(inside(clip, "ab", run), torch.ones(2))

    measure(Clip(model))
    assert "generate" in vars(model.writer)
    assert alive[0]() is model.writer and not any(ref() is not None for ref in alive[1:])
    del model
    assert alive[0]() is None
