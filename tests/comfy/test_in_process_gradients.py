"""The end-to-end stage by gradients, on real models of ComfyUI."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny_models
import torch

from sage_diffusion.adapt.backward import Rating
from sage_diffusion.adapt.calibrate import calibrate as measure
from sage_diffusion.adapt.sampling import Replayer, planned
from sage_diffusion.integrations.comfy.accuracy import KSampling
from sage_diffusion.integrations.comfy.sampler import ComfySampler, Prompt
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan, Rule

SPECS = ("int4/int8",)


def sampler_of(family, **more):
    given = {"steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"} | more
    sampling = KSampling(family.positive, family.negative, {"samples": family.latent}, 1, **given)
    return ComfySampler(family.model, sampling)


def measured(family, sampler, **more):
    prompts = [Prompt(family.positive), Prompt(family.negative)]
    with torch.inference_mode():  # as ComfyUI runs its nodes
        return measure(sampler, prompts, (1,), specs=SPECS, share=1, **more)


def test_every_family_is_rated_by_gradients(family):
    sampler = sampler_of(family)
    assert isinstance(sampler, Replayer)
    table = measured(family, sampler, sensitivity=1, method="gradient")
    effect = np.array(table.sensitivity["effect"], dtype=float)
    assert effect.shape == (*table.shape, 1)
    assert (effect > 0).all()  # of the prompt's own layers, too


def test_a_cells_effect_is_what_running_it_in_that_spec_does(families):
    family = families("sd3")
    sampler = sampler_of(family)
    table = measured(family, sampler)
    specs, probes = [AttentionSpec.parse(name) for name in SPECS], 32
    rating = Rating(sampler.session, table, specs, probes, torch.Generator().manual_seed(0))
    prompt = Prompt(family.positive)
    exact = sampler.sample(prompt, 1)
    with planned(sampler.session, table.unquantized):
        sampler.replay((prompt, 1), rating.replay)
    into = family.model.model.process_latent_in
    assert torch.allclose(rating.final, into(exact), atol=1e-4)
    predicted = np.square(rating.found[0]).mean(0)[..., 0]
    for i, layer in enumerate(table.layers):
        for step, branch in ((0, "cond"), (1, "cond"), (0, "uncond")):
            rule = Rule(SPECS[0], layer, max(step - 0.1, 0.0), min(step + 0.1, 1.0), branch)
            with planned(sampler.session, PrecisionPlan("fp16", (rule,))):
                changed = sampler.sample(prompt, 1)
            found = float((into(changed) - into(exact)).square().sum())
            here = predicted[i, step, table.branches.index(branch)]
            assert abs(10 * np.log10(here / found)) < 2.5


def test_a_model_that_was_loaded_in_inference_mode(families, request):
    import comfy.model_management
    import comfy.sd

    family = families("sd3")
    path = tiny_models.write(request.config.getoption("--models"), "sd3")
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path))
    weights = dict(model.model.named_parameters())
    assert any(p.is_inference() for p in weights.values())
    usual, here = sampler_of(family), sampler_of(family)
    here = ComfySampler(model, here.sampling)
    tables = [measured(family, s, sensitivity=1, method="gradient") for s in (usual, here)]
    assert tables[0].sensitivity["effect"] == tables[1].sensitivity["effect"]
    after = dict(model.model.named_parameters())
    assert all(after[name] is weights[name] for name in weights)
    assert not comfy.model_management.in_training


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral", "heun", "uni_pc", "euler_cfg_pp"])
def test_samplers_are_differentiated_as_they_are(families, name):
    family, found = families("sd3"), []
    sampler = sampler_of(family, sampler_name=name, steps=3)

    def use(final, calls):
        found.append(final.detach())
        (grad,) = torch.autograd.grad(final.sum(), calls[-1].output, retain_graph=True)
        assert grad.any() and len(calls) >= 3
        for before, after in itertools.pairwise(calls):
            (grad,) = torch.autograd.grad(after.input.sum(), before.output, retain_graph=True)
            assert grad.any()

    exact = sampler.sample(Prompt(family.positive), 1)
    sampler.replay((Prompt(family.positive), 1), use)
    wanted = family.model.model.process_latent_in(exact)
    assert torch.allclose(found[0], wanted, rtol=2e-3, atol=1e-3)  # uni_pc ends at a sigma of 0.001


def test_a_masked_latent_is_rated_too(families):
    family = families("sd3")
    sampler = sampler_of(family)
    with torch.inference_mode():
        mask = torch.zeros(1, 8, 8)
        mask[:, :4] = 1
        sampler.sampling.latent = {"samples": family.latent.clone(), "noise_mask": mask}
    table = measured(family, sampler, sensitivity=1, method="gradient")
    assert (np.array(table.sensitivity["effect"], dtype=float) > 0).all()
