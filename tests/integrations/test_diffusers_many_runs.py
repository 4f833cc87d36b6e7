"""Many sampling runs with changing plans, sizes, pipelines and interruptions.

No tensor of a call outlives it, weights go with their pipeline although Python's cycle collector is
off, and the process stays as large as it was.  ``--pipeline-runs 1000`` prints the figures.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import Tiny, build

from sage_diffusion import enable
from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.integrations.diffusers import apply
from sage_diffusion.plan import PrecisionPlan, Rule

PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "int8": ("int8/fp16", {}),
    "int4, guarded": ("int4/int8", {"guard": Guard(every=1, limit=0.01)}),
    "steps": (PrecisionPlan("int8/int8", (Rule("int4/fp8-fast", start=0.5),)), {}),
    "branches": (PrecisionPlan("fp16", (Rule("int8/fp8", branch="uncond"),)), {}),
    "declined": ("int8/fp16", {"backend": "triton"}),
    "refused": ("int8/fp16", {"backend": "triton", "strict": True}),
    "strict": ("int8/fp8", {"strict": True}),
    "fp16": ("fp16", {}),
}
HOW = ("applied", "context", "enabled", "replaced", "cancelled", "fails", "again", "removed")

NAMES = ("sd15", "sdxl", "sd3", "wan", "pixart")

#: Whose weights wait for the collector even unpatched: a cycle of diffusers' own.
CYCLES = ("wan",)


class Stop(Exception):
    """A user who cancels, or a callback that fails."""


@pytest.fixture
def seen(monkeypatch):
    """Weak references to what sessions were called with and to what they gave back."""
    tensors: list[weakref.ref[Any]] = []
    serve = AttentionSession.serve

    def watched(self, layer, call, native):
        out = serve(self, layer, call, native)
        tensors.extend(weakref.ref(x) for x in (*call[:3], out))
        return out

    monkeypatch.setattr(AttentionSession, "serve", watched)
    gc.collect()
    gc.freeze()
    yield tensors
    gc.unfreeze()


def stop(pipe, step, timestep, kwargs):
    if step:
        raise Stop
    return kwargs


def use(tiny: Tiny, how: str, kind: str, rng: random.Random) -> None:
    """Sample in some way; whoever calls holds nothing of it afterwards."""
    plan, settings = PLANS[kind]
    side = rng.choice((16, 32, 48))
    size = {"height": side, "width": side} if "height" in tiny.kwargs else {}
    more = {"steps": rng.randint(2, 3), **size}
    if how in ("cancelled", "fails"):
        more["callback_on_step_end"] = stop
    try:
        if how == "context":
            with apply(tiny.pipe, AttentionSession(plan, **settings)):
                tiny(**more)
            return
        if how in ("enabled", "replaced"):
            enable(tiny.pipe, plan, **settings)
        else:
            patch = apply(tiny.pipe, AttentionSession(plan, **settings))
        if how == "replaced":
            tiny(**more)
            tiny.pipe.set_attn_processor("int8/fp16")
        tiny(**more)
        if how == "again":
            tiny(**more)
        if how == "removed":
            patch.remove()
            tiny(**more)
    except Stop:
        assert how in ("cancelled", "fails")
    except AttentionRefused:
        assert kind == "refused"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_nothing_of_a_run_stays(seen, request):
    runs = request.config.getoption("--pipeline-runs")
    rng, kinds, sizes = random.Random(0), Counter(), []
    calls = dropped = 0
    kept = {name: build(name) for name in NAMES}
    for i in range(runs):
        name, how, kind = rng.choice(NAMES), rng.choice(HOW), rng.choice(sorted(PLANS))
        fresh = rng.random() < 0.3 and name not in CYCLES
        gc.disable()
        try:
            tiny = build(name) if fresh else kept[name]
            weights = [weakref.ref(p) for p in tiny.denoiser.parameters()]
            use(tiny, how, kind, rng)
            calls += len(seen) // 4
            alive = sum(ref() is not None for ref in seen)
            seen.clear()
            assert alive == 0, f"run {i} ({how}, {kind}, {name}): {alive} tensors are alive"
            if fresh:
                del tiny
                left = sum(ref() is not None for ref in weights)
                assert left == 0, f"run {i} ({how}, {kind}, {name}): {left} weights are alive"
                dropped += 1
        finally:
            gc.enable()
        if i % 10 == 0:
            gc.collect()
        kinds[how] += 1
        sizes.append(resident())
    early, late = sizes[runs // 4 : runs // 2], sizes[-(runs // 4) :]
    growth = sum(late) / len(late) / (sum(early) / len(early)) - 1
    print(
        f"\n{runs} runs ({', '.join(f'{n} {how}' for how, n in sorted(kinds.items()))}), "
        f"{calls} attention calls: 0 tensors of a call alive after a run; {dropped} pipelines "
        f"dropped with the collector off: 0 weights alive; resident memory {growth:+.2%} from the "
        "second quarter to the last"
    )
    assert calls and dropped and growth < 0.03
