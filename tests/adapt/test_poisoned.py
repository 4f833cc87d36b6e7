"""A layer of the bundled model with outlier channels: calibration finds it, so does the guard."""

import json

import numpy as np
import pytest
import torch
from adapt_host import LOOPS

from sage_diffusion import AttentionSession, Guard, enable
from sage_diffusion.adapt.calibrate import calibrate
from sage_diffusion.adapt.planner import make_plan
from sage_diffusion.cli import main
from sage_diffusion.integrations.diffusers import pipelines
from sage_diffusion.integrations.diffusers.pipelines import load_pipeline
from sage_diffusion.integrations.diffusers.sampler import PipelineSampler

LAYER = "transformer_blocks.3.attn1"
#: Balance would heal the layer.
LOW = "int4/fp8-fast-balance"
SPECS = ("int8/fp8-fast-balance", LOW)


@pytest.fixture(scope="module")
def poisoned():
    """A few channels of K 60 times as large, and of Q as much smaller: the scores stay."""
    pipe = load_pipeline("bundled")
    pipe.set_progress_bar_config(disable=True)
    attention = pipe.transformer.get_submodule(LAYER)
    with torch.no_grad():
        for linear, factor in ((attention.to_q, 1 / 60), (attention.to_k, 60)):
            linear.weight[::16] *= factor
            linear.bias[::16] *= factor
    return pipe


def test_calibration_finds_the_layer_and_the_plan_spares_it(poisoned):
    sampler = PipelineSampler(poisoned, {"num_inference_steps": 5})
    table = calibrate(sampler, [[0], [9]], specs=SPECS, share=1, rows=16)
    score = np.nanmean(table.metric("score")[..., 1], (1, 2))
    at = table.layers.index(LAYER)
    assert score[at] < np.delete(score, at).min() - 0.3
    assert table.outliers[..., 1].max((1, 2)).argmax() == at
    planned = make_plan(table, budget=0.22, costs=LOOPS)
    chosen = planned.index[at]
    assert (np.array(planned.specs)[chosen] != LOW).all()
    low = np.delete(planned.index, at, 0) == planned.specs.index(LOW)
    assert low.mean() > 0.5


def test_uncalibrated_the_guard_catches_it_within_two_steps(poisoned):
    enable(poisoned).set_attn_processor(LOW, guard=Guard(every=10))
    try:
        poisoned([3], num_inference_steps=5, generator=torch.Generator().manual_seed(0))
        summary = poisoned.sage.summary()
    finally:
        poisoned.set_attn_processor(None)
    layers = {layer.name: layer for layer in summary.layers}
    caught = layers.pop(LAYER)
    assert caught.drift > 0.2
    assert "relative L1" in caught.stepped_up[0]
    assert caught.stepped_up[0].endswith("at step 0")
    assert caught.ran == {(LOW, "reference"): 1, ("int8/fp8-fast-balance", "reference"): 4}
    assert not any(layer.stepped_up for layer in layers.values())
    assert f"{LAYER}  {LOW}" in str(summary)
    assert "stepped up: relative L1" in str(summary)


def test_a_session_brings_its_own_guard(poisoned):
    with pytest.raises(ValueError, match="a session has its own backend, strict and guard"):
        enable(poisoned).set_attn_processor(AttentionSession("int8/fp8"), guard=Guard())


def test_compare_says_so(poisoned, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipelines, "load_pipeline", lambda name: poisoned)
    command = ["compare", "bundled", "--spec", LOW, "--prompt", "heart", "--steps", "3"]
    command += ["--rows", "8", "--out", str(tmp_path), "--json"]
    assert main([*command, "--guard", "10"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["stepped_up"][LOW]) == [LAYER]
    assert f"{LOW}: {LAYER} stepped up: relative L1" in data["notes"][0]
    guarded = data["variants"][0]["psnr"]
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["stepped_up"] == {LOW: {}}
    assert guarded > data["variants"][0]["psnr"]
