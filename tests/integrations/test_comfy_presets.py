"""Plans as ComfyUI users meet them."""

import pytest

from sage_diffusion.integrations.comfy.presets import PRESETS, preset
from sage_diffusion.plan import PlanError


def spec_at(plan, layer="double.00", progress=0.5, tokens=4096):
    return str(plan.resolve(layer, progress, tokens=tokens))


@pytest.mark.parametrize(
    ("name", "first", "middle"),
    [
        ("quality", "fp16", "int8/fp16"),
        ("balanced", "int8/fp16", "int8/fp8"),
        ("fast", "int8/fp8", "int4/fp8-fast"),
    ],
)
def test_presets(name, first, middle):
    plan = preset(name)
    assert spec_at(plan, progress=0.0) == first
    assert spec_at(plan) == spec_at(plan, progress=1.0) == middle
    assert spec_at(plan, tokens=77) == "fp16"
    assert set(PRESETS) == {"quality", "balanced", "fast"}


def test_presets_choose_what_the_machine_runs(monkeypatch):
    from sage_diffusion.integrations.comfy import presets

    def automatic(call):
        return None if "8/fp8" in str(call.spec) or "int4" in str(call.spec) else "triton"

    monkeypatch.setattr(presets.backends, "automatic", automatic)
    presets.preset.cache_clear()
    try:
        assert spec_at(presets.preset("fast")) == "int8/int8"
        assert spec_at(presets.preset("balanced")) == "int8/int8"
    finally:
        presets.preset.cache_clear()


def test_an_unknown_preset():
    with pytest.raises(PlanError, match="quality, balanced, fast, got 'best'"):
        preset("best")
