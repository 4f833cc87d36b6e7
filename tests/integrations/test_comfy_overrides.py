"""ComfyUI 0.31 and newer, by their contracts: containers, a backend of their own, checkpoints that
name an attention for a layer."""

import itertools

import pytest
import torch
from test_comfy_patch import OVERRIDE, Patcher, comfy, host  # noqa: F401
from torch import nn

from sage_diffusion.integrations.comfy import attached, patch
from sage_diffusion.integrations.comfy.overrides import beside, preferred_of
from sage_diffusion.plan import PrecisionPlan, Rule


class Container:
    """Of a tensor that is given away once."""

    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "taken twice"
        return tensor


def optimized_attention(*args, preferred_attention=None, **kwargs):
    """As newer cores wrap their attention: an override first, then the checkpoint's function."""
    options = kwargs["transformer_options"]
    kwargs["_inside_attn_wrapper"] = True
    override = options.get(OVERRIDE)
    if override is not None and hasattr(override, "container_function"):
        return override.container_function(*args, **kwargs)
    args = (*(x.take() for x in args[:3]), *args[3:])
    if override is not None:
        return override(host, *args, **kwargs)
    if preferred_attention is not None and preferred_attention.function is not None:
        return preferred_attention.function(*args, **kwargs)
    return host(*args, **kwargs)


class ComfyAttention(nn.Module):
    """The module that carries a checkpoint's choice."""

    function = None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.comfy_attention = ComfyAttention()

    def forward(self, x, options):
        q, k, v = (Container(x) for _ in range(3))
        return x + optimized_attention(
            q, k, v, 2, transformer_options=options, preferred_attention=self.comfy_attention
        )


def newer_model():
    model = Patcher()
    model.model.diffusion_model.blocks = nn.ModuleList([Block(), Block()])
    return model


class ModelPatcher:
    """What its method of this name does to the options."""

    def set_model_optimized_attention(self, optimized_attention):
        def optimized_attention_override(_, *args, **kwargs):
            return optimized_attention(*args, **kwargs)

        container = getattr(optimized_attention, "container_function", None)
        if container is not None:
            optimized_attention_override.container_function = container
        self.model_options["transformer_options"][OVERRIDE] = optimized_attention_override


class Kitchen:
    """An attention of the core's own, halved so that one sees who computed."""

    __name__ = "attention_comfy_kitchen_int8"

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return 0.5 * host(*args, **kwargs)

    def container_function(self, *args, **kwargs):
        return self(*(x.take() for x in args[:3]), *args[3:], **kwargs)


def choose(model, attention):
    """The core's node *Model Attention Backend*."""
    new = model.clone()
    ModelPatcher.set_model_optimized_attention(new, attention)
    return new


HALF = PrecisionPlan("int8/fp16", (Rule("fp16", "double.00"),))


def test_containers_are_opened_before_our_override_sees_them():
    model = newer_model()
    patched = patch(model, "int8/fp16")
    override = patched.model_options["transformer_options"][OVERRIDE]
    assert not hasattr(override, "container_function")  # it wants the host's function as well
    assert override.memory_efficient  # or scores' memory would be reserved
    plain = model.sample()
    out = patched.sample()
    assert 0 < float((out - plain).norm() / plain.norm()) < 0.02
    assert attached(patched).last.summary.specs == {"int8/fp16": 6}
    assert torch.equal(patch(model, "fp16").sample(), plain)


@pytest.mark.parametrize("after", [False, True])
def test_the_cores_own_backend_node_is_named_and_no_warning(after):
    kitchen, model = Kitchen(), newer_model()
    both = choose(patch(model, HALF), kitchen) if after else patch(choose(model, kitchen), HALF)
    both.sample()
    report = attached(both).last
    assert kitchen.calls == 3  # of the layer that is left alone
    assert report.summary.quantized == 3
    assert not report.alarms and report.state == "done"
    (note,) = report.notes
    assert "Model Attention Backend says (attention_comfy_kitchen_int8)" in note
    assert note in str(report) and report.to_dict()["notes"] == [note]
    assert "another node" not in str(report)


def test_another_nodes_override_is_a_warning_still():
    def selfish(func, *args, **kwargs):
        return func(*args, **kwargs)

    alarms, notes = beside(selfish, [])
    assert "selfish" in alarms[0] and not notes
    assert beside(None, [0]) == ((), ())


def test_layers_left_alone_run_what_their_checkpoint_names():
    kitchen, model = Kitchen(), newer_model()
    blocks = model.model.diffusion_model.blocks
    blocks[0].comfy_attention.function = kitchen
    plain = model.sample()
    assert kitchen.calls == 3
    assert torch.equal(patch(model, "fp16").sample(), plain)
    patched = patch(model, HALF)
    kitchen.calls = 0
    patched.sample()
    assert kitchen.calls == 3
    assert attached(patched).last.summary.quantized == 3
    (note,) = attached(patched).last.notes
    assert note.startswith("the checkpoint names an attention of its own for 1 layers: it computes")
    everything = patch(model, "int8/fp16")
    everything.sample()
    assert kitchen.calls == 3  # a plan that quantizes the layer takes its place


def test_a_block_with_two_such_attentions_does_not_say_which():
    block = Block()
    block.second = ComfyAttention()
    block.comfy_attention.function = block.second.function = host
    assert preferred_of({"double.00": block}) == {}


def test_all_parts_of_one_attention_have_its_name():
    """Qwen-Image 2.1: text, reference, text, picture one by one; later the picture alone."""

    class Parts(nn.Module):
        def forward(self, x, options):
            cuts = (0, 4, 9, 12, 24) if options.get("whole") else (12, 24)
            outs = []
            for start, end in itertools.pairwise(cuts):
                q, k, v = Container(x[:, start:end]), Container(x[:, :end]), Container(x[:, :end])
                outs.append(optimized_attention(q, k, v, 2, transformer_options=options))
            return torch.cat([x[:, : cuts[0]], *outs], 1)

    names = {}
    for whole in (True, False):
        model = Patcher()
        model.model.diffusion_model.blocks = nn.ModuleList([Parts(), Parts()])
        model.model_options["transformer_options"]["whole"] = whole
        patched = patch(model, "int8/fp16")
        patched.sample(steps=1)
        summary = attached(patched).last.summary
        names[whole] = [layer.name for layer in summary.layers]
        assert summary.quantized == (8 if whole else 2)
    assert names[True] == names[False] == ["double.00", "double.01"]
