"""Processors that people write: state in module globals, decorators, slots, frozen dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from integrations.tiny_pipelines import build

from sage_diffusion import enable
from sage_diffusion.integrations.diffusers import apply
from sage_diffusion.integrations.diffusers.processors import is_routed

CALLS = 8  # of one forward of the tiny U-Net
count, write, bank = 0, True, {}


def projected(attn, hidden_states, encoder_hidden_states=None):
    other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    parts = attn.to_q(hidden_states), attn.to_k(other), attn.to_v(other)
    return [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts]


def finished(attn, out):
    return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class Stateful:
    """Counts in a global, and does something else once another global says so (StoryDiffusion)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        global count
        count += 1
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        if not write:
            k, v = k.flip(1) * 2, v * 0.5
        return finished(attn, F.scaled_dot_product_attention(q, k, v))


def remember(v):
    """A function of the module that is not rebuilt, and sees the same globals."""
    global count
    count += 1
    bank[count] = v.detach().mean().item()
    return sum(bank.values()) / len(bank)


class Remembering:
    """Keeps a bank in a global, filled by a function of its module."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        v = v + remember(v)
        return finished(attn, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def attention(q, k, v, depth=2):
    return F.scaled_dot_product_attention(q, k, v) if depth == 0 else again(q, k, v, depth)


def again(q, k, v, depth):
    return attention(q, k, v, depth - 1)


class Helped:
    """Reaches attention through helpers that call each other, beside an attribute of their name."""

    attention = "an attribute"

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        assert self.attention == "an attribute"
        return finished(attn, attention(*projected(attn, hidden_states, encoder_hidden_states)))


class Spelled:
    """Calls the dispatcher by way of its modules, in a function inside of a function."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (x.transpose(1, 2) for x in projected(attn, hidden_states, encoder_hidden_states))

        def run():
            if q.shape[1] % 2:
                return diffusers.models.attention_dispatch.dispatch_attention_fn(q, k, v)
            return attention_dispatch.dispatch_attention_fn(q, k, v)

        return finished(attn, run().transpose(1, 2))


def logged(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        global count
        count += 1
        return function(self, *args, **kwargs)

    return wrapper


class Decorated:
    """Its call is wrapped, by a decorator of this module and one of PyTorch's."""

    @torch.no_grad()
    @logged
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        return finished(attn, F.scaled_dot_product_attention(q, k, v))


class Slotted:
    """Has no dictionary."""

    __slots__ = ("__secret", "scale", "unset")

    def __init__(self):
        self.scale = 0.5
        self.__secret = 2.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        return finished(attn, F.scaled_dot_product_attention(q, k, v * self.scale * self.__secret))


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Can't be assigned to."""

    scale: float = 0.5

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        return finished(attn, F.scaled_dot_product_attention(q, k, v * self.scale))


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotted:
    """Neither, and with a state of its own for pickles."""

    scale: float = 0.5

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        return finished(attn, F.scaled_dot_product_attention(q, k, v * self.scale))


KINDS = (
    Stateful,
    Remembering,
    Helped,
    Spelled,
    Decorated,
    Slotted,
    Frozen,
    FrozenSlotted,
)


@pytest.fixture(autouse=True)
def fresh_globals():
    global count, write
    count, write = 0, True
    bank.clear()


def with_processors(cls):
    tiny = build("sd15")
    tiny.denoiser.set_attn_processor({key: cls() for key in tiny.denoiser.attn_processors})
    return tiny


def processors(model):
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


def phases(tiny):
    """Pictures of a run before and after the global switch, and what the globals are then."""
    global count, write
    count, write = 0, True
    bank.clear()
    first = tiny(steps=2)
    write = False
    return first, tiny(steps=2), count, dict(bank)


@pytest.mark.parametrize("cls", KINDS)
def test_they_run_as_they_did_on_their_module_s_own_globals(cls):
    tiny = with_processors(cls)
    before, own = phases(tiny), processors(tiny.denoiser)
    patch = enable(tiny.pipe).set_attn_processor("fp16")
    for expected, got in zip(before, phases(tiny), strict=True):
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected
    assert patch.summary().calls == 4 * CALLS

    patch = tiny.pipe.set_attn_processor("int8/fp8")
    assert not torch.equal(phases(tiny)[0], before[0])
    assert patch.summary().quantized == 4 * CALLS

    tiny.pipe.set_attn_processor(None)
    assert all(a is b for a, b in zip(processors(tiny.denoiser), own, strict=True))
    assert torch.equal(phases(tiny)[1], before[1])


def test_switching_a_global_changes_the_pictures():
    first, second, calls, _ = phases(with_processors(Stateful))
    assert not torch.equal(first, second)
    assert calls == 4 * CALLS


@pytest.mark.parametrize("cls", KINDS)
def test_they_are_copied_and_pickled_with_their_state(cls):
    tiny = with_processors(cls)
    apply(tiny.pipe, "fp16")
    routed = processors(tiny.denoiser)[0]
    for other in (copy.copy(routed), copy.deepcopy(routed), pickle.loads(pickle.dumps(routed))):
        assert type(other) is type(routed) and is_routed(other)
        assert getattr(other, "scale", None) == getattr(routed, "scale", None)


def test_what_a_host_sets_on_a_processor_without_a_place_for_it_is_dropped():
    tiny = with_processors(Slotted)
    with apply(tiny.pipe, "fp16"):
        for processor in processors(tiny.denoiser):
            processor.scale = 0.25
            processor._attention_backend = None
    assert {p.scale for p in processors(tiny.denoiser)} == {0.25}
    assert not hasattr(processors(tiny.denoiser)[0], "_attention_backend")


class Story:
    """The same as Stateful, without a counter: a compiled graph can't follow that."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        if not write:
            k, v = k.flip(1) * 2, v * 0.5
        return finished(attn, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("cls", [Story, Helped, Spelled, Frozen])
def test_compiled_models_follow_the_globals_too(cls):
    global write
    torch._dynamo.reset()
    tiny = with_processors(cls)
    expected = phases(tiny)[:2]
    patch = apply(tiny.pipe, "fp16")
    graphs = []
    tiny.denoiser.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    write = True
    torch.testing.assert_close(tiny(steps=2), expected[0])
    assert len(graphs) == 1
    write = False
    torch.testing.assert_close(tiny(steps=2), expected[1])
    assert len(graphs) == (2 if cls is Story else 1)  # a changed global is another program
    assert patch.summary().calls == 4 * CALLS
    torch._dynamo.reset()
