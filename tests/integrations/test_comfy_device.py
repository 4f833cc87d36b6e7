"""Where sampling stands, and which layer is called, without ComfyUI."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sage_diffusion.integrations.comfy import ModelAttention
from sage_diffusion.integrations.comfy.device import Halves, branch_of, step_of
from sage_diffusion.integrations.comfy.layers import (
    DIRECT,
    FOREIGN,
    LayerCursor,
    ModulePatch,
    blocks_of,
    layer_names,
    reach_of,
)
from sage_diffusion.plan import PrecisionPlan, Rule

FLOW = [1.0, 0.9, 0.6, 0.3, 0.0]


@pytest.mark.parametrize(
    ("sigma", "schedule", "step"),
    [
        (1.0, FLOW, 0),
        (0.9, FLOW, 1),
        (0.3, FLOW, 3),
        (0.45, FLOW, 2),  # a second-order sampler between two steps
        (0.95, FLOW, 0),
        (0.01, FLOW, 3),
        (0.90001, FLOW, 1),  # rounded up on the way through a half type
        (20.0, FLOW, 0),
        (14.6, [14.6, 3.0, 0.0], 0),
        (0.3, [0.0, 0.3, 0.6, 0.9], 1),  # un-sampling
        (0.45, [0.0, 0.3, 0.6, 0.9], 1),
        (1.0, [1.0, 0.0], 0),
    ],
)
def test_steps_by_interval(sigma, schedule, step):
    assert step_of(sigma, schedule) == step


@pytest.mark.parametrize(
    ("chunks", "branch"),
    [([0], "cond"), ([1], "uncond"), ([0, 0], "cond"), ([1, 0], None), ([2], None), (None, None)],
)
def test_branches(chunks, branch):
    assert branch_of(chunks) == branch


def names(*calls):
    cursor = LayerCursor()
    cursor.reset()
    return [cursor.name(options, cross) for options, cross in calls]


def test_names_from_what_the_host_says():
    double = {"block_type": "double", "block_index": 7}
    single = {"block_type": "single", "block_index": 0}
    assert names((double, False), (double, True), (single, False)) == [
        "double.07",
        "double.07.1",
        "single.00",
    ]


def test_names_of_a_unet_survive_a_replaced_first_attention():
    block = {"block": ("input", 4), "block_index": 1}
    assert names((block, False), (block, True)) == ["input.04.1.attn1", "input.04.1.attn2"]
    assert names((block, True)) == ["input.04.1.attn2"]


def test_calls_outside_every_block_are_numbered_and_start_anew():
    cursor = LayerCursor()
    for _ in range(2):
        cursor.reset()
        assert [cursor.name({}), cursor.name({})] == ["call.00", "call.01"]


class Block(nn.Module):
    def __init__(self, calls=1):
        super().__init__()
        self.calls = calls

    def forward(self, x, attention):
        for _ in range(self.calls):
            x = attention(x)
        return x


class Dit(nn.Module):
    def __init__(self):
        super().__init__()
        self.joint_blocks = nn.ModuleList([Block(), Block(2)])
        self.refiner = nn.Module()
        self.refiner.blocks = nn.ModuleList([Block()])

    def forward(self, x, attention, skip=()):
        x = attention(x)
        x = self.refiner.blocks[0](x, attention)
        for i, block in enumerate(self.joint_blocks):
            if i not in skip:
                x = block(x, attention)
        return x


def nobody(*args):
    raise AssertionError("no attention hides here")


def met(model, cursor, **kwargs):
    seen = []

    def attention(x):
        seen.append(cursor.name({}))
        return x

    cursor.reset()
    model(torch.zeros(1), attention, **kwargs)
    return seen


def test_names_from_the_modules_where_the_host_says_nothing():
    model, cursor = Dit(), LayerCursor()
    patch = ModulePatch(model, cursor, {})
    with patch.applied(nobody):
        whole = met(model, cursor)
        skipped = met(model, cursor, skip=(0,))
    assert whole == ["call.00", "refiner.blocks.00", "double.00", "double.01", "double.01.1"]
    # Skipping a block (skip-layer guidance) renames nothing.
    assert skipped == ["call.00", "refiner.blocks.00", "double.01", "double.01.1"]
    assert met(model, cursor) == [f"call.{i:02d}" for i in range(5)]
    assert all("forward" not in module.__dict__ for module in model.modules())


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_modules_are_restored_after_an_error():
    model = Dit()
    patch = ModulePatch(model, LayerCursor(), {})
    with pytest.raises(RuntimeError, match="stop"), patch.applied(nobody):
        assert len(hooks(model)) == 3
        raise RuntimeError("stop")
    assert not hooks(model)


def test_a_forward_of_somebody_else_is_left_alone_whenever_it_comes_and_goes():
    model, cursor = Dit(), LayerCursor()
    patch = ModulePatch(model, cursor, {})
    blocks = model.joint_blocks
    blocks[0].forward = before = blocks[0].forward
    with patch.applied(nobody):
        blocks[1].forward = during = blocks[1].forward
        assert met(model, cursor)[2:] == ["double.00", "double.01", "double.01.1"]
        del blocks[0].forward
    assert before is not during
    assert "forward" not in blocks[0].__dict__
    assert blocks[1].__dict__["forward"] is during


def test_replaced_blocks_and_other_models_are_noticed():
    model, other = Dit(), Dit()
    patch = ModulePatch(model, LayerCursor(), {})
    assert patch.fits(model)
    assert not patch.fits(other)
    model.joint_blocks[1] = Block()
    assert not patch.fits(model)


def test_a_patch_keeps_no_module_alive():
    model = Pixels()
    patch = ModulePatch(model, LayerCursor(), {})
    gc.collect()
    gc.disable()
    try:
        with patch.applied(lambda name, func, a, k: func(*a, **k)):
            model.blocks[0]["attn"](torch.zeros(1))
        alive = [weakref.ref(module) for module in model.modules()]
        del model
        assert not any(ref() is not None for ref in alive)
        with patch.applied(nobody):
            pass
    finally:
        gc.enable()


def optimized_attention(x):
    """The name that ComfyUI's model files import."""
    return x + 1


calls = 0


class Silent(nn.Module):
    def forward(self, x, *, twice=2):
        global calls
        calls += 1
        return optimized_attention(x) * twice


class Loud(nn.Module):
    def forward(self, x, transformer_options=None):
        return optimized_attention(x, transformer_options=transformer_options)


class Closed(nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Silent(), "other": Loud()})])
        self.pool = Closed()


def test_attention_that_asks_nobody_is_found_and_reported_from_what_is_out_of_reach():
    reach = reach_of(Pixels())
    assert list(reach.hidden) == ["double.00.attn"]
    assert list(reach.closed) == ["pool"]


def test_attention_that_asks_nobody_is_reached_and_restored():
    model, seen = Pixels(), []

    def call(name, func, args, kwargs):
        seen.append(name)
        return func(*args, **kwargs) + 100

    silent = model.blocks[0]["attn"]
    x = torch.zeros(1)
    with ModulePatch(model, LayerCursor(), {}).applied(call):
        assert float(silent(x, twice=3)) == 303
        wrapped = silent.forward
    assert seen == ["double.00.attn"]
    assert float(silent(x)) == 2
    assert float(wrapped(x)) == 2  # kept by somebody, it is the module's own again
    assert seen == ["double.00.attn"]
    assert optimized_attention(x) == 1  # the name in its module is untouched


def test_the_code_of_hidden_attention_runs_on_its_modules_own_globals(monkeypatch):
    """It counts in a global, and another pack replaces the attention of the whole module."""
    model = Pixels()
    monkeypatch.setitem(globals(), "calls", 0)
    with ModulePatch(model, LayerCursor(), {}).applied(lambda name, func, a, k: func(*a, **k)):
        model.blocks[0]["attn"](torch.zeros(1))
        monkeypatch.setitem(globals(), "optimized_attention", lambda x: x + 50)
        assert float(model.blocks[0]["attn"](torch.zeros(1))) == 100
    assert calls == 2


def test_what_is_not_reached_is_told_with_the_reason():
    model, unreached = Pixels(), {}
    patch = ModulePatch(model, LayerCursor(), unreached)
    silent = model.blocks[0]["attn"]
    silent.forward = silent.forward
    x = torch.zeros(1, 1, 4, 4)
    with patch.applied(nobody):
        silent(x)  # not ours to touch
    assert unreached == {FOREIGN: {"double.00.attn"}}
    del silent.forward
    with patch.applied(nobody):
        model.pool(x)
    assert unreached[DIRECT] == {"pool"}


def test_layer_names_before_a_run():
    assert layer_names(Dit()) == ["double.00", "double.01", "refiner.blocks.00"]
    unet = nn.Module()
    attention = nn.Module()
    attention.transformer_blocks = nn.ModuleList([nn.Module(), nn.Module()])
    unet.input_blocks = nn.ModuleList([nn.Module(), nn.Sequential(attention)])
    unet.middle_block = nn.Sequential(attention)
    unet.output_blocks = nn.ModuleList([])
    assert layer_names(unet) == [
        "input.01.0.attn1",
        "input.01.0.attn2",
        "input.01.1.attn1",
        "input.01.1.attn2",
        "middle.00.0.attn1",
        "middle.00.0.attn2",
        "middle.00.1.attn1",
        "middle.00.1.attn2",
    ]
    assert blocks_of(nn.Linear(1, 1)) == {}


def test_numbered_dicts_are_blocks_too():
    cosmos = nn.Module()
    cosmos.blocks = nn.ModuleDict({f"block{i}": nn.Identity() for i in range(11)})
    cosmos.embedders = nn.ModuleDict({"time": nn.Identity()})
    assert list(blocks_of(cosmos)) == [f"double.{i:02d}" for i in range(11)]


# ---------------------------------------------------------------------- a run
def options(step, chunks, schedule=FLOW, **more):
    return {
        "sigmas": torch.tensor([schedule[step]]),
        "sample_sigmas": torch.tensor(schedule),
        "cond_or_uncond": chunks,
        **more,
    }


def attend(attention, given, batch=1):
    q = torch.randn(batch, 8, 8)
    return attention.override(lambda *a, **k: q, q, q, q, 2, transformer_options=given)


CPU = torch.device("cpu")


def test_a_plan_follows_the_steps_and_branches_of_a_run():
    rules = (Rule("int4/int8", start=0.5, branch="cond"), Rule("int8/int8", branch="uncond"))
    attention = ModelAttention(PrecisionPlan("int8/fp16", rules))
    attention.begin_run()
    for step in range(4):
        for chunks in ([0], [1], [1, 0]):
            given = options(step, chunks, block_type="double", block_index=0)
            with attention.forward(SimpleNamespace(), CPU, given):
                attend(attention, given)
    assert attention.end_run().summary.specs == {"int8/fp16": 6, "int8/int8": 4, "int4/int8": 2}


def test_a_batch_of_both_branches_runs_in_parts_where_they_differ():
    rules = (Rule("int8/int8", branch="uncond", end=0.5),)
    attention = ModelAttention(PrecisionPlan("int8/fp16", rules))
    attention.begin_run()
    for step in range(4):
        given = options(step, [1, 0], block_type="double", block_index=0)
        with attention.forward(SimpleNamespace(), CPU, given):
            attend(attention, given, batch=2)
    assert attention.end_run().summary.specs == {"int8/fp16": 2 + 2, "int8/int8": 2}


def test_outside_a_sampler_the_models_own_noise_levels_count():
    attention = ModelAttention(PrecisionPlan("fp16", (Rule("int8/fp16", start=0.5),)))
    attention.percents = (1.0, 0.75, 0.5, 0.25, 0.0)
    for sigma in (0.9, 0.2):
        given = {"sigmas": torch.tensor([sigma])}
        with attention.forward(SimpleNamespace(), CPU, given):
            attend(attention, given)
    assert attention.report().summary.specs == {"fp16": 1, "int8/fp16": 1}


class Waits(torch.Tensor):
    """Counts how often a value is read back from the device."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.tolist):
            cls.reads += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_sigma_is_read_once_a_step_and_never_by_an_attention_call():
    attention = ModelAttention("fp16")
    attention.begin_run()
    schedule = torch.tensor(FLOW).as_subclass(Waits)
    Waits.reads = 0
    for step in range(4):
        sigmas = torch.tensor([FLOW[step]]).as_subclass(Waits)
        for chunks in ([0], [1]):  # two model calls of one step share the tensor
            given = {"sigmas": sigmas, "sample_sigmas": schedule, "cond_or_uncond": chunks}
            with attention.forward(SimpleNamespace(), CPU, given):
                for _ in range(10):
                    attend(attention, given)
    assert Waits.reads == 1 + 4  # the schedule, and four sigmas


def test_a_run_without_calls_is_a_warning_and_one_without_the_model_too():
    attention = ModelAttention("int8/fp16")
    attention.model_name = "PixArt"
    attention.begin_run()
    assert "the model was not called" in str(attention.end_run())
    attention.begin_run()
    with attention.forward(SimpleNamespace(), CPU, options(0, [0])):
        pass
    assert "NOT QUANTIZED: no attention call of PixArt was intercepted" in str(attention.end_run())


def test_reporters_hear_of_every_run():
    heard = []
    attention = ModelAttention("int8/fp16", reporters=[heard.append])
    for _ in range(2):
        attention.begin_run()
        given = options(0, [0])
        with attention.forward(SimpleNamespace(), CPU, given):
            attend(attention, given)
        attention.end_run()
    assert [news.state for news in heard] == ["sampling", "done"] * 2
    assert [report.summary.calls for report in heard[1::2]] == [1, 1]
    assert heard[1].to_dict()["specs"] == {"int8/fp16": 1}


def test_devices_run_side_by_side_without_mixing_branches():
    """Multi-GPU: one thread per device, cond on one and uncond on the other."""
    attention = ModelAttention(PrecisionPlan("fp16", (Rule("int8/fp16", branch="cond"),)))
    attention.begin_run()
    meta = torch.device("meta")
    gate = threading.Barrier(2)
    specs = {}

    def work(device, chunks):
        with attention.forward(SimpleNamespace(), device, options(0, chunks)):
            gate.wait(60)
            session = attention.devices[device].session
            specs[chunks[0]] = str(session.spec_for("double.00", 100))
            gate.wait(60)

    threads = [
        threading.Thread(target=work, args=arguments) for arguments in ((CPU, [0]), (meta, [1]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert specs == {0: "int8/fp16", 1: "fp16"}
    assert attention.report().forwards == 2


def test_an_unknown_backend_is_an_error_before_sampling():
    with pytest.raises(ValueError, match="backend must be one of"):
        ModelAttention("int8/fp16", backend="fastest")


def test_a_negative_prompt_that_is_asked_for_alone_is_known():
    halves = Halves()
    positive, negative = [{"uuid": 1}], [{"uuid": 2}]
    both, single = {"cond_or_uncond": [1, 0]}, {"cond_or_uncond": [0], "sigmas": 1}
    with halves.asked([positive, negative]):
        assert halves.corrected(both) is both
        with halves.asked([positive]):  # while another request runs
            assert halves.corrected(single) is single
        assert halves.corrected(both) is both
    with halves.asked([negative]):
        assert halves.corrected(single) == {"cond_or_uncond": [1], "sigmas": 1}
    halves.forget()
    with halves.asked([negative]):
        assert halves.corrected(single) is single


def test_a_second_attention_of_a_block_keeps_its_number():
    block = {"block_type": "double", "block_index": 0}
    cursor = LayerCursor()
    for _ in range(2):
        cursor.reset()
        assert cursor.name(block, False, (64, 64)) == "double.00"
        assert cursor.name(block, True, (64, 16)) == "double.00.1"  # cross
        assert cursor.name(block, False, (16, 64)) == "double.00.2"  # sound that looks at frames
        assert cursor.name(block, False, (16, 80)) == "double.00.3"
