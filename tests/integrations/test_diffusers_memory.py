"""A deleted pipeline frees its weights at once: Python's cycle collector is off in these tests."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny_pipelines import sd15

from sage_diffusion import SageAttnProcessor, enable
from sage_diffusion.integrations.diffusers import apply


@pytest.fixture(autouse=True)
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def weights_of(tiny):
    return [weakref.ref(parameter) for parameter in tiny.denoiser.parameters()]


class Stop(Exception):
    """As a user who cancels."""


def use(tiny, how):
    """Use a pipeline in some way; nothing of it is held afterwards."""
    pipe = tiny.pipe
    if how == "marker":
        marker = SageAttnProcessor("int8/fp8")
        tiny.denoiser.set_attn_processor(marker)
    elif how == "applied":
        apply(pipe, "int8/fp8")
    elif how == "context":
        with apply(pipe, "int8/fp8"):
            tiny()
    else:
        enable(pipe)
    if how in ("set", "sampled", "unset", "replaced", "cancelled"):
        pipe.set_attn_processor("int8/fp8")
    if how == "replaced":
        tiny()
        pipe.set_attn_processor("int4/int8")
    if how == "cancelled":
        with pytest.raises(Stop):
            tiny(callback_on_step_end=cancel)
    elif how != "set":
        tiny()
    if how == "unset":
        pipe.set_attn_processor(None)


def cancel(pipe, step, timestep, kwargs):
    raise Stop


WAYS = (
    "enabled",
    "set",
    "sampled",
    "unset",
    "replaced",
    "cancelled",
    "applied",
    "context",
    "marker",
)


@pytest.mark.parametrize("how", WAYS)
def test_weights_go_with_the_pipeline(how):
    tiny = sd15()
    weights = weights_of(tiny)
    with torch.no_grad():
        use(tiny, how)
    del tiny
    assert not any(ref() is not None for ref in weights)


def test_what_a_user_holds_does_not_hold_the_pipeline():
    tiny = sd15()
    weights = weights_of(tiny)
    patch = enable(tiny.pipe).set_attn_processor("int8/fp8")
    with torch.no_grad():
        tiny()
    session = patch.session
    del tiny
    assert not any(ref() is not None for ref in weights)
    assert patch.target is None
    assert patch.summary().quantized == session.summary().quantized > 0
    patch.remove()


def test_a_patch_that_nobody_holds_still_follows_the_scheduler():
    tiny, steps = sd15(), []
    session = apply(tiny.pipe, "int8/fp8").session

    class Watch:
        def observe(self, event):
            steps.append(event.step)

    session.observers.append(Watch())
    with torch.no_grad():
        tiny(steps=3)
    assert set(steps) == {0, 1, 2}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_have_a_patch_of_their_own_and_go_as_well(way):
    tiny = sd15()
    enable(tiny.pipe).set_attn_processor("int8/fp8")
    gc.enable()
    twin = sd15()
    twin.pipe = way(tiny.pipe)
    gc.collect()
    gc.disable()
    assert twin.pipe.sage.pipe is twin.pipe
    assert twin.pipe.sage.patch.target is twin.pipe
    weights = weights_of(twin)
    with torch.no_grad():
        twin()
    assert twin.pipe.sage.summary().quantized > 0
    assert tiny.pipe.sage.summary().calls == 0
    del twin
    assert not any(ref() is not None for ref in weights)
