"""Calibration of diffusers pipelines with caches and schedulers of their own kind."""

import diffusers
import numpy as np
import pytest
from adapt_host import LOOPS
from tiny_pipelines import build

from sage_diffusion.adapt.calibrate import calibrate
from sage_diffusion.adapt.complete import complete
from sage_diffusion.adapt.planner import make_plan
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

SPECS = ("int8/fp8-fast", "int4/fp8-fast")


@pytest.fixture
def flux():
    """A tiny Flux whose first-block cache skips all other blocks after the first step."""
    tiny = build("flux")
    tiny.denoiser.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    arguments = dict(tiny.kwargs)
    embeds = arguments.pop("prompt_embeds")
    arguments["num_inference_steps"] = 8
    return PipelineSampler(tiny.pipe, arguments, "prompt_embeds"), [embeds, embeds / 2]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", ["gradient", "groups"])
def test_first_block_cache(flux, method):
    sampler, prompts = flux
    options = {"sensitivity": 1, "method": method, "bar_db": 1e9}
    table = calibrate(sampler, prompts, specs=SPECS, share=1, rows=8, **options)
    first, *others = range(len(table.layers))
    assert table.layers[first] == "transformer_blocks.0.attn"
    assert table.steps == len(table.schedule) == 8
    assert table.measured[first].all()
    assert table.measured[others, 0].all()
    assert not table.measured[others, 1:].any()
    assert table.exists.all()
    assert (table.filled_work() > 0).all()
    assert (complete(table).error > 0).all()
    planned = make_plan(table, budget=0.3, costs=LOOPS)
    assert 0 < planned.time <= 0.3
    assert np.isfinite(planned.quality)


def test_a_schedule_with_repeated_sigmas_is_not_kept():
    """As Heun's and PNDM's: nothing can be looked up in it, but a plan is made all the same."""
    tiny = build("sd15")
    tiny.pipe.scheduler = diffusers.HeunDiscreteScheduler()
    arguments = dict(tiny.kwargs)
    embeds = arguments.pop("prompt_embeds")
    sampler = PipelineSampler(tiny.pipe, arguments | {"num_inference_steps": 3}, "prompt_embeds")
    table = calibrate(sampler, [embeds, embeds / 2], specs=SPECS, share=1, rows=8)
    assert (table.steps, table.schedule) == (5, None)
    assert make_plan(table, budget=0.3, costs=LOOPS).plan.schedule is None
