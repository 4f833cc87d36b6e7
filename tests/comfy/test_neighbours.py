"""Other nodes beside ours: in FP16 the result is theirs bit for bit, in INT8 within a budget, and
steps, branches and names stay right."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch

from sage_diffusion.integrations.comfy import attached, patch
from sage_diffusion.plan import PrecisionPlan, Rule

STEPS = 2

#: What a step calls of both halves of guidance, and what a neighbour adds to it: cond, uncond.
CALLS = {"sd15": 14, "sd3": 2, "flux": 4}
UNET = {
    "PAG": ("nodes_pag.PerturbedAttentionGuidance", {"scale": 3.0}, (13, 0)),
    # Its own attention replaces one of ours in both halves, and in its call of the negative prompt.
    "SAG": ("nodes_sag.SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}, (-1, 12)),
    "FreeU": ("nodes_freelunch.FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}, (0, 0)),
    "HyperTile": (
        "nodes_hypertile.HyperTile",
        {"tile_size": 32, "swap_size": 2, "max_depth": 1, "scale_depth": False},
        (0, 0),
    ),
    "deep shrink": (
        "nodes_model_downscale.PatchModelAddDownscale",
        {
            "block_number": 1,
            "downscale_factor": 2.0,
            "start_percent": 0.0,
            "end_percent": 0.35,
            "downscale_after_skip": True,
            "downscale_method": "bicubic",
            "upscale_method": "bicubic",
        },
        (0, 0),
    ),
    "ToMe": ("nodes_tomesd.TomePatchModel", {"ratio": 0.3}, (0, 0)),
}
SKIP = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "double_layers": "1"}
DIT = {
    "NAG": ("nodes_nag.NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}, (0, 0)),
    "SLG": ("nodes_slg.SkipLayerGuidanceDiT", SKIP, (1, 0)),
}
FAMILY = dict.fromkeys(UNET, "sd15") | {"NAG": "flux", "SLG": "sd3"}


class Calls:
    """Observer that counts calls by step, branch and spec."""

    def __init__(self):
        self.seen = Counter()

    def observe(self, event):
        self.seen[event.step, event.branch, str(event.spec)] += 1


def error(actual, exact):
    return float((actual - exact).norm() / exact.norm())


def sample(family, model, **more):
    torch.manual_seed(0)  # HyperTile and ToMe draw from the global generator
    return family.sample(model, **({"steps": STEPS, "cfg": 4.0} | more))


def result(output):
    """The MODEL of a node, whatever kind of output it has."""
    return output[0] if isinstance(output, tuple) else output.args[0]


@pytest.mark.parametrize("name", FAMILY)
def test_a_neighbours_result_stays_its_own(families, monkeypatch, name):
    place, settings, (cond, uncond) = (UNET | DIT)[name]
    module, node = place.split(".")
    execute = getattr(importlib.import_module(f"comfy_extras.{module}"), node).execute
    family = families(FAMILY[name])
    if name == "FreeU":  # it looks for blocks of 4 and 2 times the first one's width
        monkeypatch.setitem(family.model.model.model_config.unet_config, "model_channels", 80)
    theirs = sample(family, result(execute(family.model, **settings)))
    assert error(theirs, sample(family, family.model)) > 1e-4, "it does nothing here"

    exact = result(execute(patch(family.model, "fp16"), **settings))
    assert torch.equal(sample(family, exact), theirs)
    assert not attached(exact).last.alarms

    calls, mine = Calls(), CALLS[FAMILY[name]]
    plan = PrecisionPlan("int8/fp16", (Rule("int8/int8", branch="uncond"),))
    after = patch(result(execute(family.model, **settings)), plan, observers=[calls])
    assert 0 < error(sample(family, after), theirs) < 0.03
    assert not attached(after).last.alarms
    expected = {}
    for step in range(STEPS):
        expected[step, "cond", "int8/fp16"] = mine + cond
        expected[step, "uncond", "int8/int8"] = mine + uncond
    assert calls.seen == expected


def test_regional_prompts_are_one_branch(families):
    """Areas run apart where their sizes differ, masks in one batch: all of them are cond."""
    sd15, calls = families("sd15"), Calls()
    (tensor, more), (other, _) = sd15.positive[0], sd15.negative[0]
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    regions = [
        [tensor, {**more, "area": (4, 8, 0, 0), "strength": 1.0}],
        [other, {**more, "area": (8, 4, 0, 4), "strength": 1.0}],
        [tensor + other, {**more, "mask": left, "mask_strength": 0.7}],
        [tensor - other, {**more, "mask": 1 - left, "mask_strength": 0.7}],
    ]
    plan = PrecisionPlan("int8/fp16", (Rule("int8/int8", branch="uncond"),))
    before, sd15.positive = sd15.positive, regions
    try:
        exact = sample(sd15, sd15.model)
        assert torch.equal(sample(sd15, patch(sd15.model, "fp16")), exact)
        patched = patch(sd15.model, plan, observers=[calls])
        assert 0 < error(sample(sd15, patched), exact) < 0.03
    finally:
        sd15.positive = before
    assert not attached(patched).last.alarms
    expected = {}
    for step in range(STEPS):
        expected[step, "cond", "int8/fp16"] = 14 * 4
        # ComfyUI gives the negative prompt the areas of the positive ones, beside the whole.
        expected[step, "uncond", "int8/int8"] = 14 * 3
    assert calls.seen == expected


def test_two_stages_with_a_model_each(families):
    """Wan 2.2: one MODEL samples the first steps, another the rest; each has plan and report."""
    wan = families("wan")
    steps, switch = 4, 2

    def stages(high, low):
        first = dict(steps=steps, last_step=switch, force_full_denoise=False)
        half = sample(wan, high, **first)
        kept, wan.latent = wan.latent, half
        noise, wan.noise = wan.noise, torch.zeros_like(wan.noise)
        try:
            return sample(
                wan,
                low,
                steps=steps,
                start_step=switch,
                disable_noise=True,
                force_full_denoise=True,
            )
        finally:
            wan.latent, wan.noise = kept, noise

    exact = stages(wan.model, wan.model)
    assert torch.equal(stages(patch(wan.model, "fp16"), patch(wan.model, "fp16")), exact)
    import comfy.samplers

    sigmas = comfy.samplers.KSampler(
        wan.model, steps, torch.device("cpu"), "euler", "simple"
    ).sigmas.tolist()[:-1]
    # A plan that knows its sigmas means the same place of the whole schedule in both stages.
    last = (Rule("int8/int8", start=0.9),)
    plan = PrecisionPlan("int8/fp16", last, schedule=tuple(sigmas))
    seen = Calls(), Calls()
    high, low = (patch(wan.model, plan, observers=[calls]) for calls in seen)
    assert 0 < error(stages(high, low), exact) < 0.02
    for model, calls in zip((high, low), seen, strict=True):
        report = attached(model).last
        assert report.forwards == switch and not report.alarms
        late = "int8/int8" if model is low else "int8/fp16"
        for branch in ("cond", "uncond"):
            assert calls.seen[0, branch, "int8/fp16"] == calls.seen[1, branch, late] == 4


def test_a_cache_skips_the_same_steps(families):
    from comfy_extras.nodes_easycache import EasyCacheNode

    flux = families("flux")

    def cached(model):
        return result(EasyCacheNode.execute(model, 10.0, 0.15, 0.95, False))

    theirs = sample(flux, cached(flux.model), steps=6)
    exact = cached(patch(flux.model, "fp16"))
    assert torch.equal(sample(flux, exact, steps=6), theirs)
    calls = Calls()
    quantized = cached(patch(flux.model, "int8/fp16", observers=[calls]))
    assert 0 < error(sample(flux, quantized, steps=6), theirs) < 0.03
    made = [attached(model).last.summary.calls for model in (exact, quantized)]
    assert 0 < made[0] == made[1] < 6 * CALLS["flux"]
    assert len({step for step, *_ in calls.seen}) * CALLS["flux"] == made[1]


def test_a_sampler_with_steps_of_its_own_is_left_as_it_is(families):
    sd3 = families("sd3")
    theirs = sample(sd3, sd3.model, steps=4, sampler="dpm_adaptive")
    patched = patch(sd3.model, "fp16")
    assert torch.equal(sample(sd3, patched, steps=4, sampler="dpm_adaptive"), theirs)
    assert not attached(patched).last.alarms
