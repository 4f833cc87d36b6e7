import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_emoji import tiny_emoji
from tiny_pipelines import build

from sage_diffusion import AttentionSession, PrecisionPlan, Rule
from sage_diffusion.integrations.diffusers.bundled import EmojiPipeline
from sage_diffusion.integrations.diffusers.pipelines import (
    PipelineRun,
    compare_pipeline,
    images_of,
    load_pipeline,
)

CALL = {"class_labels": ["cat", "bird"], "num_inference_steps": 3}


def test_compare_pipeline_reports_calls_latents_and_pictures() -> None:
    pipe = tiny_emoji()
    plan = PrecisionPlan("int4/fp8-fast", (Rule("int8/fp8", "transformer_blocks.1.*"),))
    report = compare_pipeline(pipe, plan, seeds=(1, 2), **CALL)
    assert report.layers == ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    assert report.steps == (0, 1, 2) and len(report.rows) == 2 * 2 * 2 * 3
    assert report.specs == {"int4/fp8-fast": 12, "int8/fp8": 12}  # each branch of guidance
    end = report.end_to_end
    assert end.labels == tuple(f"picture {i}, seed {s}" for s in (1, 2) for i in (0, 1))
    assert len(end.psnr) == 4 and all(20 < value < 120 for value in end.psnr)
    assert len(end.latent_cosine) == 3 and all(0.9 < value < 1 for value in end.latent_cosine)
    again = compare_pipeline(pipe, plan, seeds=(1, 2), **CALL)
    assert again == report


def test_a_run_leaves_the_pipeline_and_the_random_state_alone() -> None:
    pipe = tiny_emoji()
    before = pipe(["cat"], 2, seed=0, output_type="pt").images
    kinds = [type(m.processor) for m in pipe.transformer.modules() if hasattr(m, "processor")]
    state = torch.get_rng_state()
    ticks = []
    run = PipelineRun(pipe, (3,), CALL, ("cat", "bird"), lambda: ticks.append(1))
    found = run(AttentionSession("int8/fp8"))
    assert len(ticks) == len(found.latents) == 3
    assert found.labels == ("cat", "bird")
    assert found.images.shape == (2, 3, 16, 16) and found.latents[0].shape == (2, 3, 16, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert "step" not in vars(pipe.scheduler) and "set_timesteps" not in vars(pipe.scheduler)
    after = [type(m.processor) for m in pipe.transformer.modules() if hasattr(m, "processor")]
    assert after == kinds
    assert torch.equal(pipe(["cat"], 2, seed=0, output_type="pt").images, before)


def test_the_pipeline_is_restored_when_it_fails() -> None:
    pipe = tiny_emoji()
    with pytest.raises(ValueError, match="must be one of cat"):
        PipelineRun(pipe, (0,), {"class_labels": ["cow"]})(AttentionSession("int8/fp8"))
    assert "step" not in vars(pipe.scheduler)


def test_latents_only() -> None:
    report = compare_pipeline(tiny_emoji(), "int8/fp8", output_type="latent", **CALL)
    assert report.end_to_end.psnr == () and len(report.end_to_end.latent_cosine) == 3
    assert report.pictures == () and report.end_to_end.mean_psnr is None


def test_fp16_is_bit_identical() -> None:
    report = compare_pipeline(tiny_emoji(), "fp16", **CALL)
    assert set(report.end_to_end.psnr) == {math.inf}


def test_generators_and_empty_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="give seeds instead of a generator"):
        compare_pipeline(tiny_emoji(), "int8/fp8", generator=torch.Generator(), **CALL)
    with pytest.raises(ValueError, match="at least one seed"):
        compare_pipeline(tiny_emoji(), "int8/fp8", seeds=(), **CALL)


class Output:
    def __init__(self, **values):
        vars(self).update(values)


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (Output(images=np.full((2, 8, 6, 3), 0.2, np.float32)), (2, 3, 8, 6)),
        (Output(images=[Image.new("RGB", (6, 8), (51, 51, 51))] * 2), (2, 3, 8, 6)),
        (Output(images=torch.full((2, 3, 8, 6), 0.2)), (2, 3, 8, 6)),
        (Output(frames=np.full((2, 5, 8, 6, 3), 0.2, np.float32)), (10, 3, 8, 6)),
        (Output(frames=[[Image.new("RGB", (6, 8), (51, 51, 51))] * 5]), (5, 3, 8, 6)),
        ((torch.full((1, 5, 3, 8, 6), 0.2),), (5, 3, 8, 6)),
    ],
)
def test_pictures_of_every_kind_of_output(output, shape) -> None:
    found = images_of(output)
    assert found.shape == shape and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full(shape, 0.2))


def test_an_output_without_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pictures but Output"):
        images_of(Output(audios=[1]))
    with pytest.raises(ValueError, match="no pictures but str"):
        images_of(Output(images=["a"]))


def test_load_pipeline_reads_folders_of_ours_and_of_diffusers(tmp_path) -> None:
    tiny_emoji().save_pretrained(tmp_path / "ours")
    found = load_pipeline(str(tmp_path / "ours"), device="cpu")
    assert isinstance(found, EmojiPipeline) and found.transformer.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder"):
        load_pipeline(str(tmp_path / "nowhere"))
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == "EmojiPipeline"


@pytest.mark.parametrize(("name", "pictures"), [("flux", 1), ("wan", 5), ("sd15", 1)])
def test_text_to_image_and_video_pipelines(name: str, pictures: int) -> None:
    tiny = build(name)
    arguments = {k: v for k, v in tiny.kwargs.items() if k not in ("generator", "output_type")}
    report = compare_pipeline(
        tiny.pipe, "int8/fp8", rows=8, **{**arguments, "num_inference_steps": 2}
    )
    assert report.steps == (0, 1) and set(report.specs) == {"int8/fp8"}
    assert len(report.end_to_end.psnr) == pictures and min(report.end_to_end.psnr) > 20
    assert len(report.end_to_end.latent_cosine) == 2 and not report.summary["declined"]
