"""Beside other people's patches: on blocks, on hidden attention, around our override."""

import pytest
import torch
from test_comfy_patch import KEY, OVERRIDE, Executor, Patcher, comfy, host  # noqa: F401
from torch import nn

from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.integrations.comfy import attached, patch, without
from sage_diffusion.plan import PrecisionPlan, Rule


class Loading(Patcher):
    """Puts object patches on inside OUTER_SAMPLE, as ComfyUI does when it loads the model.

    A model carries those of the MODEL that was loaded last.
    """

    def __init__(self, model=None):
        super().__init__(model)
        self.object_patches = {}

    def clone(self):
        new = Loading(self.model)
        vars(new).update(vars(super().clone()))
        new.object_patches = dict(self.object_patches)
        return new

    def load(self):
        for owner, name, before in reversed(getattr(self.model, "backup", ())):
            setattr(owner, name, before)
        self.model.backup = []
        for (owner, name), value in self.object_patches.items():
            self.model.backup.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    def sample(self, steps=3):
        def inside():
            self.load()
            outer, self.wrappers["outer_sample"] = self.wrappers.get("outer_sample", {}), {}
            try:
                return Patcher.sample(self, steps)
            finally:
                self.wrappers["outer_sample"] = outer

        return Executor(self.all(self.wrappers, "outer_sample"), inside)()


def halved(model):
    """Another node's patch on every block's ``forward``."""
    new = model.clone()
    for block in new.model.diffusion_model.blocks:
        inner = block.forward
        new.object_patches[block, "forward"] = lambda *a, _f=inner, **k: _f(*a, **k) * 0.5
    return new


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, options):
        return self.inner(x, options) * 2


def replaced(model):
    """Another node puts a block of its own in one's place."""
    new = model.clone()
    blocks = new.model.diffusion_model.blocks
    new.object_patches[blocks, "1"] = Doubled(blocks[1])
    return new


def once(model):
    """Another node's patch on the first block that takes itself off at its first call."""
    new = model.clone()
    block = new.model.diffusion_model.blocks[0]

    def put_on(executor, x, *args):
        def forward(*a, **k):
            del block.__dict__["forward"]
            return block(*a, **k) * 3

        block.forward = forward
        return executor(x, *args)

    new.add_wrapper_with_key("apply_model", "once", put_on)
    return new


NODES = {"halved": halved, "replaced": replaced, "once": once}


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("first", ["sage", "other"])
def test_another_nodes_patch_has_its_effect_and_stays_where_it_was(node, first):
    """fp16 quantizes nothing, so that every picture must be bit-equal."""
    other, model = NODES[node], Loading()
    base, wanted = model.sample(), other(model).sample()
    assert torch.equal(model.sample(), base)
    sage = patch(model, "fp16")
    both = other(sage) if first == "sage" else patch(other(model), "fp16")
    for _ in range(2):
        assert torch.equal(sage.sample(), base)
        assert torch.equal(both.sample(), wanted)
        assert torch.equal(model.sample(), base)
        assert torch.equal(other(model).sample(), wanted)
    model.sample()
    for module in model.model.diffusion_model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("node", NODES)
def test_layers_keep_their_names_beside_another_nodes_patch(node):
    both = NODES[node](patch(Loading(), "int8/fp16"))
    both.sample()
    layers = attached(both).last.summary.layers
    assert [layer.name for layer in layers] == ["double.00", "double.01"]
    assert [layer.quantized for layer in layers] == [3, 3]


# ---------------------------------------------------------------------- hidden attention
optimized_attention = host


class Silent(nn.Module):
    def forward(self, x):
        return optimized_attention(x, x, x, 2)


class Hiding(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Silent()

    def forward(self, x, options):
        return x + self.attention(x)


def hiding():
    model = Loading()
    model.model.diffusion_model.blocks[0] = Hiding()
    return model


def patched_attention(model):
    new = model.clone()
    attention = model.model.diffusion_model.blocks[0].attention
    new.object_patches[attention, "forward"] = lambda x, _f=attention.forward: _f(x) * 0.5
    return new


def test_hidden_attention_that_another_node_patched_is_left_alone_and_told():
    wanted = patched_attention(hiding()).sample()
    both = patched_attention(patch(hiding(), PrecisionPlan("fp16", (Rule("int8/fp16", "*.01"),))))
    exact = patched_attention(patch(hiding(), "fp16"))
    assert torch.equal(exact.sample(), wanted)
    both.sample()
    (alarm,) = attached(both).last.alarms
    assert "1 modules (double.00.attention) is not reached: another node's patch" in alarm
    assert attached(both).last.to_dict()["warnings"] == [alarm]


def test_attention_that_is_not_reached_stops_a_strict_run():
    model = patched_attention(patch(hiding(), "int8/fp16", strict=True))
    with pytest.raises(AttentionRefused, match=r"double.00.attention can't be reached: another"):
        model.sample()
    patched_attention(patch(hiding(), "fp16", strict=True)).sample()


class Direct(nn.Module):
    def forward(self, x, options):
        return x + torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_that_calls_torch_is_told_where_it_runs_only():
    model = Loading()
    model.model.diffusion_model.blocks[1] = Direct()
    model.model.diffusion_model.unused = Direct()
    patched = patch(model, "int8/fp16")
    patched.sample()
    (alarm,) = attached(patched).last.alarms
    assert "the attention of 1 modules (double.01) is not reached: it calls PyTorch's" in alarm


# ---------------------------------------------------------------------- around our override
def wrapped(model, log):
    """Another node wraps whatever override a MODEL has."""
    new = model.clone()
    options = new.model_options["transformer_options"]
    inner = options.get(OVERRIDE)

    def override(func, *args, **kwargs):
        log.append(1)
        return inner(func, *args, **kwargs) if inner else func(*args, **kwargs)

    options[OVERRIDE] = override
    return new


def test_a_node_between_two_of_ours_does_not_keep_the_older_plan_alive():
    model, log = Patcher(), []
    old = patch(model, "int4/int8")
    new = patch(wrapped(old, log), PrecisionPlan("fp16", (Rule("int8/fp16", "double.01"),)))
    exact = patch(model, PrecisionPlan("fp16", (Rule("int8/fp16", "double.01"),))).sample()
    assert torch.equal(new.sample(), exact)
    assert len(log) == 3  # double.00, which the new plan leaves alone, goes through it
    assert attached(new).last.summary.specs == {"fp16": 3, "int8/fp16": 3}
    assert attached(old).devices[torch.device("cpu")].session.summary().calls == 0


def test_two_nodes_between_three_of_ours():
    model, log = Patcher(), []
    chain = patch(model, "int4/int8")
    for plan in ("int8/int8", "fp16"):
        chain = patch(wrapped(chain, log), plan)
    assert torch.equal(chain.sample(), model.sample())
    assert len(log) == 2 * 6


def test_removal_below_a_node_that_wraps_the_override():
    model, log = Patcher(), []
    bare = without(wrapped(patch(model, "int4/int8"), log))
    assert torch.equal(bare.sample(), model.sample())
    assert len(log) == 6
    again = patch(bare, "int8/fp16")
    assert torch.equal(again.sample(), patch(model, "int8/fp16").sample())
    assert attached(bare) is None


def test_an_override_below_the_oldest_of_ours_is_still_asked():
    log = []
    chain = patch(wrapped(Patcher(), log), "int4/int8")
    assert torch.equal(patch(wrapped(chain, []), "fp16").sample(), Patcher().sample())
    assert len(log) == 6


def test_both_plans_count_where_both_models_are_sampled():
    """A branch of the workflow before the other node, and one after it."""
    model, log = Patcher(), []
    old = patch(model, "int4/int8")
    new = patch(wrapped(old, log), "int8/fp16")
    for _ in range(2):
        old.sample()
        new.sample()
        assert attached(old).last.summary.specs == {"int4/int8": 6}
        assert attached(new).last.summary.specs == {"int8/fp16": 6}


def test_calls_outside_of_a_model_call_do_not_make_layers_without_end():
    """A node that calls the network itself."""
    model = patch(Patcher(), "int8/fp16")
    options = model.model_options["transformer_options"]
    for _ in range(20):
        model.model.diffusion_model(torch.randn(1, 24, 16), options)
    (layer,) = attached(model).report().summary.layers
    assert (layer.name, layer.calls) == ("call.00", 40)


# ---------------------------------------------------------------------- nothing quantized
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule("int8/fp16", min_tokens=128), "min_tokens is 128, and the longest call has 24 keys"),
        (Rule("int8/fp16", start=0.6, end=0.9), "none of them where the plan quantizes"),
        (Rule("int8/fp16", branch="uncond"), "name a branch of guidance, and this run had none"),
    ],
)
def test_a_run_that_quantized_nothing_says_why(rule, words):
    plan = PrecisionPlan("fp16", (rule,))
    patched = patch(Patcher(), plan)
    patched.sample()
    (alarm,) = attached(patched).last.alarms
    assert alarm.startswith("nothing was quantized in 6 calls: ")
    assert words in alarm
    strict = patch(Patcher(), plan, strict=True)
    with pytest.raises(AttentionRefused, match="nothing was quantized"):
        strict.sample()
    assert attached(strict).last is not None


class Deaf(nn.Module):
    def forward(self, x, options):
        return x


def test_a_model_without_attention_stops_a_strict_run():
    model = Patcher()
    model.model.diffusion_model.blocks = nn.ModuleList([Deaf()])
    patched = patch(model, "int8/fp16")
    patched.sample()
    (alarm,) = attached(patched).last.alarms
    assert "no attention call of SD3 was intercepted" in alarm
    with pytest.raises(AttentionRefused, match="no attention call was intercepted"):
        patch(model, "int8/fp16", strict=True).sample()
