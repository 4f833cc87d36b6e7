import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_emoji import CLASSES, tiny_emoji

from sage_diffusion.integrations.diffusers.bundled import ASSETS, EmojiPipeline


def test_euler_steps_of_the_guided_velocity() -> None:
    pipe = tiny_emoji()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = pipe(["cat", 2], 4, 3.0, latents=x, output_type="latent").images
    for step in range(4):
        times, labels = torch.full((2,), 1000 - 250.0 * step), torch.tensor([0, 2])
        with torch.no_grad():
            guided, free = (
                pipe.transformer(x, timestep=times, class_labels=y).sample
                for y in (labels, torch.full((2,), len(CLASSES)))
            )
        x = x - 0.25 * (free + 3.0 * (guided - free))
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_without_guidance_the_batch_is_not_doubled() -> None:
    pipe, sizes = tiny_emoji(), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    pipe([0], 2, guidance_scale=1.0, seed=0)
    pipe([0], 1, guidance_scale=2.0, seed=0)
    assert sizes == [1, 1, 2]


def test_a_picture_depends_on_its_seed_and_not_on_its_batch() -> None:
    pipe = tiny_emoji()
    batch = pipe(["cat", "dog", "bird"], 3, seed=5, output_type="pt").images
    single = pipe("dog", 3, seed=6, output_type="pt").images
    torch.testing.assert_close(batch[1:2], single, atol=1e-5, rtol=0)
    assert not torch.allclose(pipe("dog", 3, seed=7, output_type="pt").images, single, atol=1e-3)
    shared = torch.Generator().manual_seed(1)
    again = torch.Generator().manual_seed(1)
    first = pipe([0, 1], 2, generator=shared, output_type="pt").images
    assert torch.equal(first, pipe([0, 1], 2, generator=again, output_type="pt").images)


def test_output_types_agree() -> None:
    pipe = tiny_emoji()
    calls = {kind: pipe([0], 2, seed=0, output_type=kind) for kind in ("pt", "np", "pil", "latent")}
    tensor = calls["pt"].images
    assert tensor.shape == (1, 3, 16, 16) and tensor.min() >= 0 and tensor.max() <= 1
    assert np.array_equal(calls["np"].images, tensor.permute(0, 2, 3, 1).numpy())
    picture = calls["pil"].images[0]
    assert isinstance(picture, Image.Image) and picture.size == (16, 16)
    expected = (tensor[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(np.asarray(picture), expected)
    latent = calls["latent"].images
    torch.testing.assert_close((latent / 2 + 0.5).clamp(0, 1), tensor)
    assert torch.equal(pipe([0], 2, seed=0, output_type="pt", return_dict=False)[0], tensor)


def test_callback_sees_every_step_and_may_change_the_latents() -> None:
    pipe, seen = tiny_emoji(), []

    def stop(pipe, step, timestep, tensors):
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else None

    found = pipe([0], 2, seed=0, output_type="latent", callback_on_step_end=stop).images
    assert seen == [(0, 1000.0), (1, 500.0)] and not found.any()


def test_save_and_load(tmp_path) -> None:
    pipe = tiny_emoji()
    pipe.save_pretrained(tmp_path)
    loaded = EmojiPipeline.from_pretrained(tmp_path)
    assert loaded.classes == list(CLASSES)
    first, second = (p("bird", 2, seed=0, output_type="pt").images for p in (pipe, loaded))
    assert torch.equal(first, second)


def test_bundled_reads_half_precision_weights_as_float32(tmp_path) -> None:
    pipe = tiny_emoji()
    pipe.transformer.half().save_pretrained(tmp_path / "transformer")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(FileNotFoundError, match="must hold transformer/, scheduler/ and classes"):
        EmojiPipeline.bundled(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    loaded = EmojiPipeline.bundled(tmp_path)
    assert loaded.transformer.dtype == torch.float32 and not loaded.transformer.training
    assert loaded(["dog"], 1, seed=0, output_type="pt").images.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": ["cow"]}, "must be one of cat, dog, bird, or 0 .. 2, got 'cow'"),
        ({"class_labels": [3]}, "got 3"),
        ({"class_labels": [-1]}, "got -1"),
        ({"class_labels": []}, "at least one class"),
        ({"class_labels": [0], "num_inference_steps": 0}, "at least 1, got 0"),
        ({"class_labels": [0], "output_type": "jpeg"}, "got 'jpeg'"),
        ({"class_labels": [0], "seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_wrong_arguments_say_what_must_hold(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_emoji()(**arguments)


def test_names_must_fit_the_model() -> None:
    pipe = tiny_emoji()
    with pytest.raises(ValueError, match="classes must hold 3 names, got 1"):
        EmojiPipeline(pipe.transformer, pipe.scheduler, ["cat"])


def test_the_assets_are_small_and_complete() -> None:
    names = json.loads((ASSETS / "classes.json").read_text())
    assert len(names) == 31 and "cat-face" in names
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert 8 << 20 < size <= 16 << 20
    pipe = EmojiPipeline.bundled()
    model = pipe.transformer.config
    assert model.attention_head_dim == 64 and model.num_layers >= 6
    assert (model.sample_size // model.patch_size) ** 2 >= 144
    pipe.set_progress_bar_config(disable=True)
    # A trained model's heart is red; an untrained one's picture is noise.
    red, green, blue = pipe(["heart"], 6, seed=0, output_type="pt").images[0].mean((1, 2))
    assert red > green and red > blue
