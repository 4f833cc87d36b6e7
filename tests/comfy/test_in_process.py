"""Sage Attention inside ComfyUI's own samplers, on tiny models of five families."""

from __future__ import annotations

import pytest
import torch

from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.comfy import attached, patch, without
from sage_diffusion.integrations.comfy.layers import layer_names
from sage_diffusion.integrations.comfy.model import KEY, OVERRIDE
from sage_diffusion.plan import PlanError, PrecisionPlan, Rule

LAYERS = {
    "sd3": ["double.00", "double.01"],
    "flux": ["double.00", "double.01", "single.00", "single.01"],
    "wan": ["double.00", "double.00.1", "double.01", "double.01.1"],
    "hyvid": [
        "txt_in.individual_token_refiner.blocks.00",
        "txt_in.individual_token_refiner.blocks.01",
        "double.00",
        "double.01",
        "single.00",
        "single.01",
    ],
    "sd15": [
        f"{block}.0.attn{n}"
        for block in (
            "input.01",
            "input.03",
            "middle.00",
            "output.00",
            "output.01",
            "output.02",
            "output.03",
        )
        for n in (1, 2)
    ],
}


class Calls:
    """Observer that remembers where every call stood."""

    def __init__(self):
        self.seen = []

    def observe(self, event):
        self.seen.append((event.layer, event.step, event.branch, str(event.spec)))


def error(actual, exact):
    return float((actual - exact).norm() / exact.norm())


def test_pass_through_is_bit_identical_and_knows_every_layer(family):
    plain = family.sample()
    patched = patch(family.model, "fp16")
    assert torch.equal(family.sample(patched), plain)
    report = attached(patched).last
    assert [layer.name for layer in report.summary.layers] == LAYERS[family.name]
    assert layer_names(family.model.model.diffusion_model) == LAYERS[family.name]  # before a run
    assert report.forwards == 3
    assert report.summary.specs == {"fp16": 3 * len(LAYERS[family.name])}
    assert not report.alarms


@pytest.mark.parametrize(("spec", "bound"), [("int8/fp16", 0.01), ("int4/int8", 0.08)])
def test_quantized_stays_within_a_bound_and_is_not_a_copy(family, spec, bound):
    plain = family.sample()
    patched = patch(family.model, spec)
    quantized = family.sample(patched)
    report = attached(patched).last
    assert report.summary.quantized == report.summary.calls == 3 * len(LAYERS[family.name])
    assert not report.summary.declined
    assert 0 < error(quantized, plain) < bound


def test_the_input_model_is_untouched_and_removal_restores(family):
    plain = family.sample()
    patched = patch(family.model, "int4/int8")
    assert attached(family.model) is None
    assert OVERRIDE not in family.model.model_options["transformer_options"]
    family.sample(patched)
    assert torch.equal(family.sample(), plain)
    bare = without(patched)
    assert torch.equal(family.sample(bare), plain)
    assert attached(bare) is None
    assert KEY not in bare.wrappers.get("apply_model", {})
    for module in family.model.model.diffusion_model.modules():
        assert "forward" not in module.__dict__


def test_step_layer_and_branch_decide_as_the_plan_says(families):
    sd3 = families("sd3")
    rules = (
        Rule("int4/int8", "double.01", 0.5, 1.0),
        Rule("int8/int8", "double.00", branch="uncond"),
    )
    calls = Calls()
    plan = PrecisionPlan("int8/fp16", rules)
    patched = patch(sd3.model, plan, observers=[calls])
    # Prompts of different lengths do not fit one batch, so cond and uncond run apart.
    width, _, pooled = 4096, 77, 2048
    longer = [[torch.zeros(1, 154, width), {"pooled_output": torch.zeros(1, pooled)}]]
    before, sd3.negative = sd3.negative, longer
    try:
        sd3.sample(patched, steps=4)
    finally:
        sd3.negative = before
    expected = []
    for step in range(4):
        progress = step / 3
        for branch in ("cond", "uncond"):
            late = progress >= 0.5
            first = "int8/int8" if branch == "uncond" else "int8/fp16"
            expected.append(("double.00", step, branch, first))
            expected.append(("double.01", step, branch, "int4/int8" if late else "int8/fp16"))
    assert sorted(calls.seen) == sorted(expected)


def test_a_batch_of_both_branches_is_served_in_parts(families):
    sd3, calls = families("sd3"), Calls()
    plan = PrecisionPlan("fp16", (Rule("int8/int8", branch="uncond"),))
    sd3.sample(patch(sd3.model, plan, observers=[calls]), steps=2)
    assert {(branch, str(spec)) for _, _, branch, spec in calls.seen} == {
        ("cond", "fp16"),
        ("uncond", "int8/int8"),
    }


def test_second_order_samplers_belong_to_the_step_they_refine(families):
    sd3, calls = families("sd3"), Calls()
    sd3.sample(patch(sd3.model, "fp16", observers=[calls]), steps=4, sampler="dpm_2")
    steps = [step for layer, step, _, _ in calls.seen if layer == "double.00"]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3}
    assert len(steps) == 2 * 7  # two calls a step, one in the last; each of both branches


def test_a_sampler_with_steps_of_its_own_moves_through_the_plans(families):
    """dpm_adaptive calls the model wherever it likes, and often within one step of the schedule."""
    sd3, calls = families("sd3"), Calls()
    plan = PrecisionPlan("int8/fp16", (Rule("int4/int8", start=0.5),))
    patched = patch(sd3.model, plan, observers=[calls])
    sd3.sample(patched, steps=4, sampler="dpm_adaptive")
    steps = [
        step for layer, step, branch, _ in calls.seen if (layer, branch) == ("double.00", "cond")
    ]
    assert len(steps) > 4
    specs = {(step, spec) for _, step, _, spec in calls.seen}
    assert specs == {(0, "int8/fp16"), (1, "int8/fp16"), (2, "int4/int8")}  # it ends at that sigma
    assert not attached(patched).last.alarms


def test_a_run_that_never_moved_is_a_warning(families):
    """A sampler that holds the model at the first sigma, as a node with a loop of its own may."""
    import comfy.samplers

    sd3 = families("sd3")
    patched = patch(sd3.model, "int8/fp16")

    def still(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for _ in range(len(sigmas)):
            model(x, sigmas[:1], **extra_args)
        return x

    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(sd3.positive, sd3.negative)
    guider.set_cfg(4.0)
    sampler = comfy.samplers.KSAMPLER(still)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    with torch.no_grad():
        guider.sample(sd3.noise, sd3.latent, sampler, sigmas, disable_pbar=True, seed=1)
    (alarm,) = attached(patched).last.alarms
    assert "never left step 0 of 4 although the model was called 5 times" in alarm


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "uni_pc", "lcm"])
def test_samplers_of_all_kinds_run(families, sampler):
    sd3 = families("sd3")
    patched = patch(sd3.model, "int8/fp16")
    assert torch.isfinite(sd3.sample(patched, sampler=sampler)).all()
    assert attached(patched).last.summary.quantized > 0


def test_a_previous_override_gets_the_declined_calls(families):
    sd3 = families("sd3")
    seen = []

    def other(func, *args, **kwargs):
        seen.append(kwargs["transformer_options"].get("block_index"))
        return func(*args, **kwargs)

    model = sd3.model.clone()
    model.model_options["transformer_options"][OVERRIDE] = other
    plain = sd3.sample()
    plan = PrecisionPlan("int8/fp16", (Rule("fp16", "double.00"),))
    patched = patch(model, plan)
    sd3.sample(patched)
    assert len(seen) == 3  # double.00 of three steps; double.01 is ours
    assert "other" in str(attached(patched).last)
    seen.clear()
    assert torch.equal(sd3.sample(without(patched)), plain)
    assert len(seen) == 6


def test_stays_on_top_of_a_node_placed_after_it(families):
    sd3 = families("sd3")
    patched = patch(sd3.model, "int8/fp16")
    seen = []

    def selfish(func, *args, **kwargs):  # as some packs do: replaces, and does not chain
        seen.append(1)
        return func(*args, **kwargs)

    later = patched.clone()
    later.model_options["transformer_options"][OVERRIDE] = selfish
    sd3.sample(later)
    assert attached(patched).last.summary.quantized == 6
    assert not seen
    attached(patched).plan = PrecisionPlan("fp16")
    sd3.sample(later)
    assert len(seen) == 6  # it serves what we leave alone


def test_an_override_that_also_climbs_on_top_does_not_recurse(families):
    from comfy.patcher_extension import CallbacksMP

    sd3 = families("sd3")
    patched = patch(sd3.model, "fp16")
    below = {}

    def rival(func, *args, **kwargs):
        if below.get("f") is not None:
            return below["f"](func, *args, **kwargs)
        return func(*args, **kwargs)

    def climb(patcher, timestep, model_options):
        options = model_options["transformer_options"]
        if options.get(OVERRIDE) is not rival:
            below["f"] = options.get(OVERRIDE)
            options[OVERRIDE] = rival

    later = patched.clone()
    later.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "rival", climb)
    assert torch.equal(sd3.sample(later), sd3.sample())
    assert attached(patched).last.summary.calls == 6


def test_object_patches_of_another_node_come_and_go(families):
    """ComfyUI puts them on when it loads the model, which is after our run has begun."""
    sd3 = families("sd3")

    def halved(model):
        new = model.clone()
        for i, block in enumerate(model.model.diffusion_model.joint_blocks):
            name = f"diffusion_model.joint_blocks.{i}.forward"

            def forward(*args, _block=block, **kwargs):
                context, x = type(_block).forward(_block, *args, **kwargs)
                return context, x * 0.5

            new.add_object_patch(name, forward)
        return new

    base, wanted = sd3.sample(), sd3.sample(halved(sd3.model))
    assert not torch.equal(base, wanted)
    sage = patch(sd3.model, "fp16")
    both, quantized = halved(sage), halved(patch(sd3.model, "int8/fp16"))
    for _ in range(2):
        assert torch.equal(sd3.sample(sage), base)
        assert torch.equal(sd3.sample(both), wanted)
        assert torch.equal(sd3.sample(), base)
        assert 0 < error(sd3.sample(quantized), wanted) < 0.01
    layers = attached(quantized).last.summary.layers
    assert [layer.name for layer in layers] == LAYERS["sd3"]
    sd3.sample()


def test_a_node_between_two_of_ours_does_not_keep_the_older_plan_alive(families):
    sd3 = families("sd3")
    between = patch(sd3.model, "int4/int8").clone()
    options = between.model_options["transformer_options"]
    inner = options[OVERRIDE]
    options[OVERRIDE] = lambda func, *args, **kwargs: inner(func, *args, **kwargs)
    assert torch.equal(sd3.sample(patch(between, "fp16")), sd3.sample())
    assert torch.equal(sd3.sample(without(between)), sd3.sample())


def test_patching_again_replaces_the_plan(families):
    sd3 = families("sd3")
    twice = patch(patch(sd3.model, "int4/int8"), "int8/fp16")
    sd3.sample(twice)
    assert attached(twice).last.summary.specs == {"int8/fp16": 6}


def test_counts_start_anew_with_every_run_of_a_shared_clone(families):
    sd3 = families("sd3")
    patched = patch(sd3.model, "int8/fp16")
    clone = patched.clone()
    sd3.sample(patched)
    sd3.sample(clone, steps=2)
    assert attached(clone).last.summary.calls == 4
    assert attached(clone).last.forwards == 2


def test_keep_cross_attention_leaves_calls_with_other_keys_alone(families):
    wan = families("wan")
    patched = patch(wan.model, "int8/fp16", keep_cross=True)
    wan.sample(patched)
    by_layer = {layer.name: dict(layer.ran) for layer in attached(patched).last.summary.layers}
    assert set(by_layer["double.00"]) == {("int8/fp16", "reference")}
    assert set(by_layer["double.00.1"]) == {("fp16", "native")}


def test_a_plan_for_another_model_warns_and_stops_where_strict(families):
    sd3 = families("sd3")
    plan = PrecisionPlan("fp16", (Rule("int8/fp16", "transformer_blocks.*"),))
    patched = patch(sd3.model, plan)
    assert torch.equal(sd3.sample(patched), sd3.sample())
    assert "another model" in str(attached(patched).last)
    with pytest.raises(PlanError, match="another model"):
        sd3.sample(patch(sd3.model, plan, strict=True))


def test_a_fingerprint_of_another_model_warns(families):
    sd3 = families("sd3")
    plan = PrecisionPlan("int8/fp16", fingerprint={"model": "Flux", "layers": ["double.00"]})
    patched = patch(sd3.model, plan)
    sd3.sample(patched)
    assert "does not belong to this model" in str(attached(patched).last)


def test_the_guard_steps_layers_up_and_the_report_says_so(families):
    sd3 = families("sd3")
    patched = patch(sd3.model, "int4/int8", guard=Guard(every=1, limit=1e-6))
    sd3.sample(patched)
    report = attached(patched).last
    assert all(len(layer.stepped_up) == 3 for layer in report.summary.layers)  # last: too late
    assert "double.00 stepped up: relative L1" in str(report)
    ran = [list(layer.ran) for layer in report.summary.layers]
    assert ran == [[(spec, "reference") for spec in ("int4/int8", "int8/int8", "int8/fp16")]] * 2


def test_a_backend_that_cannot_is_reported_and_stops_where_strict(families):
    sd3 = families("sd3")
    patched = patch(sd3.model, "int8/fp16", backend="triton")
    assert torch.equal(sd3.sample(patched), sd3.sample())
    report = str(attached(patched).last)
    assert "6 declined" in report
    assert "needs a CUDA or ROCm device" in report
    with pytest.raises(AttentionRefused, match="CUDA"):
        sd3.sample(patch(sd3.model, "int8/fp16", backend="triton", strict=True))


def test_lora_beside_it(families):
    sd3 = families("sd3")
    patched = patch(sd3.model, "int8/fp16")
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    weight = sd3.model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight
    lora = patched.clone()
    assert lora.add_patches({key: (torch.full_like(weight, 0.01),)}, 1.0)
    changed = sd3.sample(lora)
    assert not torch.equal(changed, sd3.sample(patched))
    assert attached(lora).last.summary.quantized == 6


def test_controlnet_beside_it(families):
    """The control net runs outside of the model's forward: its calls are not ours to name."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    sd15 = families("sd15")
    net = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        hint_channels=3,
        model_channels=320,
        num_res_blocks=[1, 1],
        channel_mult=[1, 1],
        transformer_depth=[1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        legacy=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
        operations=comfy.ops.disable_weight_init,
    )
    generator = torch.Generator().manual_seed(2)
    for weight in net.parameters():
        fan_in = max(weight[0].numel(), 1)
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5 / fan_in**0.5
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    control = control.copy().set_cond_hint(torch.rand(1, 3, 64, 64, generator=generator), 1.0)
    patched = patch(sd15.model, "int8/fp16")
    free = sd15.sample(patched)
    before = sd15.positive
    more = {"control": control, "control_apply_to_uncond": True}
    sd15.positive = [[before[0][0], {**before[0][1], **more}]]
    try:
        exact = sd15.sample(patch(sd15.model, "fp16"))
        steered = sd15.sample(patched)
    finally:
        sd15.positive = before
    assert error(steered, free) > 0.01  # the control net does steer
    assert 0 < error(steered, exact) < 0.02
    summary = attached(patched).last.summary
    assert [layer.name for layer in summary.layers] == LAYERS["sd15"]
    assert summary.quantized == summary.calls == 3 * len(LAYERS["sd15"])


def test_easycache_beside_it(families):
    from comfy_extras.nodes_easycache import EasyCacheNode

    flux = families("flux")
    calls = Calls()
    session = AttentionSession("int8/fp16", observers=[calls])
    patched = patch(flux.model, session)
    cached = EasyCacheNode.execute(patched, 10.0, 0.15, 0.95, False).args[0]
    flux.sample(cached, steps=6)
    summary = attached(cached).last.summary
    assert 0 < summary.calls < 6 * len(LAYERS["flux"])  # skipped steps call nothing
    assert summary.quantized == summary.calls
    assert len({step for _, step, _, _ in calls.seen}) == len(calls.seen) / len(LAYERS["flux"])
    assert len(session.where.schedule) == 6


def test_compiled_models_run_and_are_counted(families):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    sd3 = families("sd3")
    patched = patch(sd3.model, "int8/fp16")
    eager = sd3.sample(patched)
    compiled = patched.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    out = sd3.sample(compiled)
    assert attached(compiled).last.summary.quantized == 6
    assert [layer.name for layer in attached(compiled).last.summary.layers] == LAYERS["sd3"]
    assert error(out, eager) < 1e-5


def test_rules_of_the_models_family_fit_it(family):
    from sage_diffusion.integrations.comfy.families import plan_for

    chosen = plan_for(family.model, "cpu")
    assert "not calibrated" in chosen.plan.name
    assert not chosen.origin
    assert chosen.plan.check(LAYERS[family.name]) == []
