"""Where sampling stands: every scheduler, its copies, its state put back, loops that end early."""

from __future__ import annotations

import bisect
import copy
import functools
import inspect
import math
import pickle
from collections import Counter

import diffusers
import pytest
import torch
from integrations.tiny_models import build as build_model
from integrations.tiny_pipelines import Tiny, build, wan

from sage_diffusion import AttentionSession, PrecisionPlan, Rule, enable
from sage_diffusion.integrations.diffusers import apply


class Watcher:
    """Where each call was made."""

    def __init__(self):
        self.places = []

    def observe(self, event):
        self.places.append((event.step, event.progress))

    @property
    def progress(self):
        return list(dict.fromkeys(progress for _, progress in self.places))


# ---------------------------------------------------------------------- one plan, many samplers
def flow_unipc():
    return diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )


SAMPLERS = {
    "DDIM": diffusers.DDIMScheduler,
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "Euler": diffusers.EulerDiscreteScheduler,
    "DPM++": diffusers.DPMSolverMultistepScheduler,
    "DPM++ Karras": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow UniPC": flow_unipc,
}
STEPS = 12


def log_snr(scheduler):
    """Log signal-to-noise ratio at every entry of a schedule, from the scheduler itself."""
    values = []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        if "Flow" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
            s = float(scheduler.sigmas[i])
            values.append(2 * math.log((1 - s) / s) if s < 1 else -math.inf)
        elif hasattr(scheduler, "sigmas"):
            values.append(-2 * math.log(float(scheduler.sigmas[i])))
        else:
            a = float(scheduler.alphas_cumprod[int(t)])
            values.append(math.log(a / (1 - a)))
    return values


class Loop:
    """The least that a pipeline is: a model, a scheduler, and a loop over its timesteps."""

    def __init__(self, scheduler):
        self.components = {
            "scheduler": scheduler,
            "transformer": build_model("DiTTransformer2DModel"),
        }

    def __call__(self, steps=STEPS):
        scheduler = self.components["scheduler"]
        scheduler.set_timesteps(steps)
        latents = torch.zeros(1, 4, 8, 8)
        for t in scheduler.timesteps:
            self.components["transformer"](
                latents, timestep=torch.tensor([1]), class_labels=torch.tensor([0])
            )
            latents = scheduler.step(torch.zeros_like(latents), t, latents).prev_sample


def sampled(name, plan):
    """A run's places in a plan, step by step, and what the patch says of its schedule."""
    pipe, watcher = Loop(SAMPLERS[name]()), Watcher()
    patch = apply(pipe, AttentionSession(plan, observers=[watcher]))
    with torch.no_grad():
        pipe()
    assert not patch.summary().warnings
    by_step = dict(watcher.places)
    return [by_step[i] for i in sorted(by_step)], patch, pipe.components["scheduler"]


@pytest.fixture(scope="module")
def made():
    """A plan's schedule under every sampler: values, unit and log-SNR."""
    found = {}
    for name in SAMPLERS:
        _, patch, scheduler = sampled(name, PrecisionPlan("fp16"))
        levels = sorted(set(log_snr(scheduler)))
        found[name] = patch.schedule, patch.schedule_unit, levels
    return found


def test_schedules_say_in_which_unit_they_are(made):
    assert {name: unit for name, (_, unit, _) in made.items()} == {
        "DDIM": "sigmas",  # of its model's noise: its timesteps would mean nothing to a flow
        "PNDM": "sigmas",
        "Euler": "sigmas",
        "DPM++": "sigmas",
        "DPM++ Karras": "sigmas",
        "flow Euler": "flow-sigmas",
        "flow UniPC": "flow-sigmas",
    }


@pytest.mark.parametrize("stored", ["unit", "no unit"])
def test_plans_moved_between_samplers_land_where_they_belong(made, stored, capsys):
    """At most one step of the plan away from the step with the same share of noise."""
    table = [f"{'made under':<14}" + "".join(f"{name:>15}" for name in SAMPLERS)]
    for source, (schedule, unit, levels) in made.items():
        row = f"{source:<14}"
        plan = PrecisionPlan("fp16", schedule=schedule, schedule_unit=unit)
        if stored == "no unit":
            if max(schedule) <= 1:
                continue  # a flow's sigmas can't be told from the end of another sampler's
            plan = PrecisionPlan("fp16", schedule=schedule)
        for target in SAMPLERS:
            places, _, scheduler = sampled(target, plan)
            away = []
            for level, place in zip(log_snr(scheduler), places, strict=True):
                after = min(bisect.bisect_left(levels, level), len(levels) - 1)
                before = max(after - 1, 0) if levels[after] != level else after
                at = place * (len(schedule) - 1)
                away.append(max(before - at, at - after, 0.0))
            row += f"{max(away):15.2f}"
            assert max(away) <= 1, (source, target, places)
        table.append(row)
    with capsys.disabled():
        print(
            "\nsteps between where a plan's steps land and where they belong\n" + "\n".join(table)
        )


# ---------------------------------------------------------------------- copies, and state put back
def sky_reels():
    sizes = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 1,
        "rope_max_seq_len": 32,
        "inject_sample_info": False,
    }
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan().pipe.vae,
        transformer=diffusers.SkyReelsV2Transformer3DModel(**sizes),
        scheduler=flow_unipc(),
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    arguments = {
        "prompt": None,
        "prompt_embeds": text,
        "negative_prompt_embeds": -text,
        "height": 16,
        "width": 16,
        "base_num_frames": 5,
        "num_inference_steps": 4,
        "output_type": "latent",
    }
    return pipe, arguments


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({"num_frames": 5}, [0, 1, 2, 3]),
        (
            {"num_frames": 9, "base_num_frames": 9, "ar_step": 1, "causal_block_size": 1},
            [0, 1, 2, 3],
        ),
        ({"num_frames": 13, "base_num_frames": 9, "overlap_history": 5}, [0, 1, 2, 3] * 2),
    ],
    ids=["together", "staggered", "long"],
)
def test_schedulers_that_are_copied_for_every_frame_are_followed(more, steps):
    pipe, arguments = sky_reels()
    watcher = Watcher()
    enable(pipe).set_attn_processor(AttentionSession("fp16", observers=[watcher]))
    pipe(**arguments | more, generator=torch.Generator().manual_seed(0))
    seen = [step for step, _ in watcher.places]
    assert [s for i, s in enumerate(seen) if i == 0 or s != seen[i - 1]] == steps
    assert pipe.sage.session.where.step == -1
    assert not pipe.sage.summary().warnings


def test_what_a_scheduler_s_copies_do_beside_it_does_not_count():
    class Sound(Loop):
        def __call__(self, steps=STEPS):
            scheduler = self.components["scheduler"]
            scheduler.set_timesteps(steps)
            sound = copy.deepcopy(scheduler)
            sound.set_timesteps(2 * steps)
            x = torch.zeros(1, 4, 8, 8)
            for t in scheduler.timesteps:
                self.components["transformer"](
                    x, timestep=torch.tensor([1]), class_labels=torch.tensor([0])
                )
                x = scheduler.step(x, t, x).prev_sample
                sound.step(x, sound.timesteps[sound.step_index or 0], x)
            assert sound.step_index == steps

    pipe, watcher = Sound(diffusers.FlowMatchEulerDiscreteScheduler()), Watcher()
    apply(pipe, AttentionSession("fp16", observers=[watcher]))
    with torch.no_grad():
        pipe(4)
    assert watcher.progress == pytest.approx([0, 1 / 3, 2 / 3, 1])


def panorama():
    tiny = build("sd15")
    pipe = diffusers.StableDiffusionPanoramaPipeline(
        **{k: v for k, v in tiny.pipe.components.items() if k != "safety_checker"},
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=True)
    arguments = tiny.kwargs | {"height": 64, "width": 128}
    return Tiny(pipe, arguments)


def test_a_scheduler_s_state_may_be_saved_and_put_back():
    expected = panorama()(steps=3)
    tiny, watcher = panorama(), Watcher()
    patch = apply(tiny.pipe, AttentionSession("fp16", observers=[watcher]))
    assert torch.equal(tiny(steps=3), expected)
    assert len(set(watcher.progress)) == len(tiny.pipe.scheduler.timesteps)
    assert max(watcher.progress) == 1 and not patch.summary().warnings

    scheduler = tiny.pipe.scheduler
    saved = copy.deepcopy(vars(scheduler))
    patch.remove()
    vars(scheduler).update(saved)
    assert type(scheduler) is diffusers.PNDMScheduler
    assert not [x for x in vars(scheduler).values() if "sage" in type(x).__module__]
    assert torch.equal(tiny(steps=3), expected)


def test_nothing_stays_on_schedulers_or_their_copies():
    tiny = build("flux")
    plain = vars(copy.deepcopy(tiny.pipe.scheduler)).keys()
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    scheduler = tiny.pipe.scheduler
    assert vars(scheduler).keys() == plain
    assert scheduler.__class__ is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(scheduler) == diffusers.FlowMatchEulerDiscreteScheduler  # noqa: E721
    assert "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    assert type(scheduler.__class__.from_config(scheduler.config)) is scheduler.__class__
    copies = [copy.deepcopy(scheduler), copy.copy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    patch.remove()
    for each in (scheduler, *copies):
        assert type(each) is diffusers.FlowMatchEulerDiscreteScheduler
        each.set_timesteps(3)
    assert patch.session.where.step == -1


def test_what_others_put_on_a_scheduler_is_called_and_stays():
    tiny, seen = build("flux"), Counter()
    scheduler = tiny.pipe.scheduler

    def wrapped(name):
        own = getattr(scheduler, name)

        @functools.wraps(own)
        def wrapper(*args, **kwargs):
            seen[name] += 1
            return own(*args, **kwargs)

        return wrapper

    scheduler.step = before = wrapped("step")
    watcher = Watcher()
    patch = apply(tiny.pipe, AttentionSession("fp16", observers=[watcher]))
    scheduler.set_timesteps = after = wrapped("set_timesteps")
    tiny(steps=3)
    assert seen == {"step": 3, "set_timesteps": 1}
    assert watcher.progress == [0, 0.5, 1]
    patch.remove()
    assert vars(scheduler)["step"] is before and vars(scheduler)["set_timesteps"] is after
    del scheduler.step, scheduler.set_timesteps
    with pytest.raises(AttributeError):
        del scheduler.step


# ---------------------------------------------------------------------- several, and early ends
def test_every_scheduler_of_a_pipe_is_followed():
    class Combined(Loop):
        """As Kandinsky's and Stable Cascade's: a prior and a decoder, each with its own."""

        def __init__(self):
            super().__init__(diffusers.DDPMScheduler())
            self.components["prior_scheduler"] = diffusers.UnCLIPScheduler(clip_sample=False)

        def __call__(self):
            own = self.components["scheduler"]
            try:
                self.components["scheduler"] = self.components["prior_scheduler"]
                super().__call__(3)
            finally:
                self.components["scheduler"] = own
            super().__call__(5)

    pipe, watcher = Combined(), Watcher()
    patch = apply(pipe, AttentionSession("fp16", observers=[watcher]))
    with torch.no_grad():
        pipe()
    assert [p for _, p in watcher.places] == [
        *(0, 0.5, 1),
        *(0, 0.25, 0.5, 0.75, 1),
    ]
    assert patch.session.where.step == -1
    patch.remove()
    assert type(pipe.components["prior_scheduler"]) is diffusers.UnCLIPScheduler


def test_the_end_of_denoising_ends_a_run():
    tiny, watcher = build("sdxl"), Watcher()
    patch = enable(tiny.pipe).set_attn_processor(AttentionSession("fp16", observers=[watcher]))
    tiny.pipe(**tiny.kwargs, num_inference_steps=8, denoising_end=0.5, output_type="latent")
    assert {step for step, _ in watcher.places} == {0, 1, 2, 3}
    assert patch.session.where.step == -1
    tiny(steps=2)
    assert patch.session.where.steps == 2 and not patch.summary().warnings


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_loop_that_is_broken_off_ends_its_run(error):
    def stop(pipe, step, timestep, kwargs):
        raise error

    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    with pytest.raises(error):
        tiny(steps=4, callback_on_step_end=stop)
    assert patch.session.where.step == -1
    tiny(steps=2)
    assert not patch.summary().warnings


def test_bars_that_iterate_end_a_run_too():
    class Iterating(Loop, diffusers.DiffusionPipeline):
        def __init__(self, scheduler, transformer):
            diffusers.DiffusionPipeline.__init__(self)
            self.register_modules(scheduler=scheduler, transformer=transformer)
            self.set_progress_bar_config(disable=True)

        def __call__(self, steps, stop):
            self.scheduler.set_timesteps(steps)
            x = torch.zeros(1, 4, 8, 8)
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
                if i == stop:
                    break
                self.transformer(x, timestep=torch.tensor([1]), class_labels=torch.tensor([0]))
                x = self.scheduler.step(x, t, x).prev_sample

    model = build_model("DiTTransformer2DModel")
    pipe = Iterating(diffusers.FlowMatchEulerDiscreteScheduler(), model)
    patch = apply(pipe, AttentionSession("fp16"))
    with torch.no_grad():
        pipe(4, 2)
    assert patch.session.where.step == -1
    assert patch.session.layers["transformer_blocks.0.attn1"].ran.total() == 2


def test_runs_that_never_move_are_warned_of():
    class Own(Loop):
        """Steps by itself after all."""

        def __call__(self, steps):
            self.components["scheduler"].set_timesteps(steps)
            for _ in range(steps):
                self.components["transformer"](
                    torch.zeros(1, 4, 8, 8),
                    timestep=torch.tensor([1]),
                    class_labels=torch.tensor([0]),
                )

    pipe = Own(diffusers.DDIMScheduler())
    plan = PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),))
    patch = apply(pipe, AttentionSession(plan))
    with torch.no_grad():
        pipe(6)
        pipe(6)
    [warning] = [w for w in patch.summary().warnings if "never left step" in w]
    assert "called 6 times" in warning
