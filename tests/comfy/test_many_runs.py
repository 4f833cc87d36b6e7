"""Many sampling runs with changing plans, sizes, models, neighbours and interruptions.

No tensor of a call outlives it, weights go with their MODEL although Python's cycle collector is
off, and the process stays as large as it was.  ``--sampling-runs 1000`` prints the figures.
"""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.integrations.comfy import attached, patch, without
from sage_diffusion.integrations.comfy import model as adapter
from sage_diffusion.integrations.comfy.call import parse_call
from sage_diffusion.integrations.comfy.model import OVERRIDE
from sage_diffusion.plan import PrecisionPlan, Rule

PLANS = {
    "int8": ("int8/fp16", {}),
    "int4, guarded": ("int4/int8", {"guard": Guard(every=1, limit=0.01)}),
    "steps": (PrecisionPlan("int8/int8", (Rule("int4/fp8-fast", start=0.5),)), {}),
    "branches": (PrecisionPlan("fp16", (Rule("int8/fp8", branch="uncond"),)), {}),
    "one layer": (PrecisionPlan("fp16", (Rule("int8/fp8", "*.01"),)), {"keep_cross": True}),
    "declined": ("int8/fp16", {"backend": "triton"}),
    "refused": ("int8/fp16", {"backend": "triton", "strict": True}),
    "strict": ("int8/fp8", {"strict": True}),
    "fp16": ("fp16", {}),
}
# In both the last one keeps even a plain MODEL: a patched `forward` and this sampler are cycles.
HOW = ("whole", "whole", "whole", "cancelled", "fails", "again", "wrapped", "neighbour")
SAMPLERS = ("euler", "heun", "dpmpp_2m_sde", "uni_pc", "dpm_adaptive")


class Failed(Exception):
    """A node's own error in mid-run."""


@dataclass
class Ledger:
    """Weak references to what a run must not leave behind."""

    tensors: list[weakref.ref[Any]] = field(default_factory=list)
    calls: int = 0

    def call(self, args: Any, kwargs: Any) -> Any:
        found = parse_call(args, kwargs)
        held = (*args[:3], found.q, found.k, found.v, kwargs["transformer_options"]["sigmas"])
        self.tensors += [weakref.ref(x) for x in held]
        self.calls += 1
        return found

    def alive(self) -> int:
        left = sum(ref() is not None for ref in self.tensors)
        self.tensors.clear()
        return left


@pytest.fixture
def ledger(monkeypatch):
    found = Ledger()
    monkeypatch.setattr(adapter, "parse_call", found.call)
    gc.freeze()  # collecting is quick then
    yield found
    gc.unfreeze()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def neighbour(model: Any) -> Any:
    """Another node's object patch on every block."""
    new = model.clone()
    for i, block in enumerate(new.model.diffusion_model.joint_blocks):
        inner = block.forward
        name = f"diffusion_model.joint_blocks.{i}.forward"
        new.add_object_patch(name, lambda *a, _f=inner, **k: _f(*a, **k))
    return new


def wrapping(model: Any) -> Any:
    """Another node that wraps the override, before ours is replaced."""
    new = model.clone()
    options = new.model_options["transformer_options"]
    inner = options[OVERRIDE]
    options[OVERRIDE] = lambda func, *args, **kwargs: inner(func, *args, **kwargs)
    return new


class Stopping:
    """A callback of the sampler that ends the run at its second step."""

    def __init__(self, error: type[Exception]):
        self.error = error  # an instance would hold its own traceback

    def __call__(self, step: int, denoised: Any, x: Any, total: int) -> None:
        if step:
            raise self.error


def one_run(family: Any, model: Any, fresh: bool, rng: random.Random) -> str:
    """A run of some kind; every reference to anything of it is gone afterwards."""
    from comfy.model_management import InterruptProcessingException

    last = -1 if fresh else None
    how, kind = rng.choice(HOW[:last]), rng.choice(sorted(PLANS))
    plan, settings = PLANS[kind]
    if how == "neighbour" and family.name != "sd3":
        how = "whole"
    patched = patch(model, plan, **settings)
    if how == "neighbour":
        patched = neighbour(patched)
    if how == "wrapped":
        patched = patch(wrapping(patched), "int8/fp16")
    shape = list(family.latent.shape)
    shape[-2] = rng.choice((8, 12, 16))
    sized = replace(
        family, latent=torch.zeros(shape), noise=torch.randn(shape, generator=torch.Generator())
    )
    more: dict[str, Any] = {"steps": rng.randint(2, 3), "sampler": rng.choice(SAMPLERS[:last])}
    if how in ("cancelled", "fails"):
        error = InterruptProcessingException if how == "cancelled" else Failed
        more["callback"] = Stopping(error)
    try:
        sized.sample(patched, **more)
        if how == "again":
            sized.sample(patched.clone(), **more)
            sized.sample(without(patched), **more)
    except (InterruptProcessingException, Failed):
        assert how in ("cancelled", "fails")
    except AttentionRefused:
        assert kind == "refused"
    else:
        if how != "wrapped" and kind not in ("refused", "fp16", "branches"):
            assert attached(patched).last.summary.calls
    return how


def test_nothing_of_a_run_stays(families, ledger, request):
    import comfy.sd
    import tiny_models

    runs = request.config.getoption("--sampling-runs")
    rng = random.Random(0)
    chosen = [families(name) for name in ("sd3", "flux", "wan")]
    kinds: dict[str, int] = {}
    sizes, kept, dropped = [], 0, 0
    for i in range(runs):
        family = rng.choice(chosen)
        if i % 10 == 0:
            gc.collect()  # what ComfyUI's samplers leave
        gc.disable()
        try:
            fresh = rng.random() < 0.3
            model = family.model
            if fresh:
                path = tiny_models.write(request.config.getoption("--models"), family.name)
                model = comfy.sd.load_diffusion_model(str(path))
            weights = [weakref.ref(p) for p in model.model.diffusion_model.parameters()]
            how = one_run(family, model, fresh, rng)
            left = ledger.alive()
            assert left == 0, f"run {i} ({how}, {family.name}): {left} tensors of calls are alive"
            if fresh:
                del model
                kept += sum(ref() is not None for ref in weights)
                dropped += 1
                assert kept == 0, f"run {i} ({how}, {family.name}): {kept} weights are alive"
        finally:
            gc.enable()
        kinds[how] = kinds.get(how, 0) + 1
        sizes.append(resident())
    early, late = sizes[runs // 4 : runs // 2], sizes[-runs // 4 :]
    growth = sum(late) / len(late) / (sum(early) / len(early)) - 1
    print(
        f"\n{runs} runs ({', '.join(f'{n} {how}' for how, n in sorted(kinds.items()))}), "
        f"{ledger.calls} attention calls: 0 tensors of a call alive after a run; "
        f"{dropped} MODELs dropped with the collector off: {kept} weights alive; "
        f"resident memory {growth:+.2%} from the second quarter to the last"
    )
    assert growth < 0.03
    assert set(kinds) == set(HOW) or runs < 40
