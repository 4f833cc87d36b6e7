"""GLM-Image and aMUSEd, tiny and random: tokens out, edited, and back in."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers.models.glm_image")

import transformers
from diffusers import (
    AmusedInpaintPipeline,
    AmusedPipeline,
    AmusedScheduler,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    UVit2DModel,
    VQModel,
)

from sage_diffusion.integrations.diffusers.bridges import (
    PriorTokens,
    amused_ids,
    amused_inpaint,
    amused_picture,
    prior_tokens,
)
from sage_diffusion.vq.tokenizer import TokenizerError

MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:] = True


class Chat:
    """In place of GLM-Image's processor, whose vocabulary is a download: two grids to write."""

    def apply_chat_template(self, messages, *, target_h, target_w, **options):
        rows, columns = target_h // 32, target_w // 32
        count = len(messages)
        grids = torch.tensor([[1, rows, columns], [1, 1, 1]]).repeat(count, 1)
        ids = torch.tensor([[50, 51, 32]]).repeat(count, 1)
        found = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "image_grid_thw": grids,
            "images_per_sample": torch.tensor([2] * count),
        }
        return transformers.BatchFeature(found)


@pytest.fixture(scope="module")
def glm():
    torch.manual_seed(0)
    text = {
        "vocab_size": 60, "vision_vocab_size": 40, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "pad_token_id": 0, "eos_token_id": 39,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 16,
        "image_size": 64,
    }  # fmt: skip
    config = transformers.GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config={"embed_dim": 8, "num_embeddings": 32, "latent_channels": 32},
        image_token_id=55, image_start_token_id=32, image_end_token_id=33,
    )  # fmt: skip
    writer = transformers.GlmImageForConditionalGeneration(config).eval()
    writer.generation_config.eos_token_id = None
    writer.generation_config.suppress_tokens = list(range(32, 40))  # ids only
    return GlmImagePipeline(
        tokenizer=transformers.ByT5Tokenizer(),
        processor=Chat(),
        text_encoder=transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
            )
        ).eval(),
        vision_language_encoder=writer,
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            latent_channels=4,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        transformer=GlmImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, text_embed_dim=16, time_embed_dim=16, condition_dim=8,
            prior_vq_quantizer_codebook_size=32,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


class TestGlmImage:
    def draw(self, pipe, prior):
        return pipe(
            "a cat", **prior.arguments(), num_inference_steps=1, guidance_scale=1.5,
            output_type="pt", generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip

    def test_tokens_out_edited_and_in(self, glm):
        glm.set_progress_bar_config(disable=True)
        prior = prior_tokens(glm, "a cat", 96, 64, generator=torch.Generator().manual_seed(0))
        assert prior.ids.shape == (1, 3, 2) and prior.ids.max() < 32
        whole = glm.generate_prior_tokens(
            "a cat", 96, 64, generator=torch.Generator().manual_seed(0)
        )[0]
        assert torch.equal(prior.arguments()["prior_token_ids"], whole)
        picture = self.draw(glm, prior)
        assert picture.shape == (1, 3, 96, 64)
        ids = prior.ids.clone()
        ids[:, 1, 1] = (ids[:, 1, 1] + 1) % 32
        edited = replace(prior, ids=ids)
        assert not torch.equal(self.draw(glm, edited), picture)
        assert torch.equal(self.draw(glm, prior), picture)

    def test_a_token_is_four_of_the_diffusion_half(self):
        given = PriorTokens(torch.tensor([[[1, 2], [3, 4]]])).arguments()
        want = [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]
        assert given["prior_token_ids"].tolist() == [want]
        assert (given["height"], given["width"]) == (64, 64)

    def test_refuses(self, glm):
        with pytest.raises(TokenizerError, match="multiples of 32, got 64 x 40"):
            prior_tokens(glm, "a cat", 40, 64)
        with pytest.raises(TokenizerError, match="must be integers"):
            PriorTokens(torch.zeros(2, 2)).arguments()


@pytest.fixture(scope="module")
def amused(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    words = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 8})
    )
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=8, max_position_embeddings=8,
        bos_token_id=4, eos_token_id=5, pad_token_id=5,
    )  # fmt: skip
    vqvae = VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=50,
        lookup_from_codebook=True,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    network = UVit2DModel(
        hidden_size=32, cond_embed_dim=8, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
        encoder_hidden_size=8, vocab_size=60, codebook_size=50, in_channels=32,
        block_out_channels=32, num_res_blocks=1, num_attention_heads=2, num_hidden_layers=1,
        intermediate_size=32, block_num_heads=2, sample_size=8,
    )  # fmt: skip
    pipe = AmusedPipeline(
        vqvae.eval(),
        transformers.CLIPTokenizer.from_pretrained(path),
        transformers.CLIPTextModelWithProjection(text).eval(),
        network.eval(),
        AmusedScheduler(mask_token_id=59),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestAmused:
    def options(self):
        return {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}

    def test_pictures_are_their_ids(self, amused):
        ids = amused_ids(amused, "a b", **self.options())
        assert ids.shape == (1, 8, 8) and ids.max() < 50
        want = amused("a b", output_type="pt", **self.options()).images
        assert torch.equal(amused_picture(amused, ids), want)

    @pytest.mark.parametrize("inpainting", [False, True])
    def test_only_masked_ids_change(self, amused, inpainting):
        pipe = AmusedInpaintPipeline(**amused.components) if inpainting else amused
        pipe.set_progress_bar_config(disable=True)
        ids = torch.arange(128).view(2, 8, 8) % 50
        before = ids.clone()
        got = amused_inpaint(pipe, ids, MASK, "a b", **self.options())
        assert torch.equal(got[:, ~MASK], ids[:, ~MASK]) and torch.equal(ids, before)
        assert (got[:, MASK] != ids[:, MASK]).any() and got.max() < 50
        assert torch.equal(got, amused_inpaint(pipe, ids, MASK, "a b", **self.options()))

    def test_a_mask_of_another_grid(self, amused):
        with pytest.raises(TokenizerError, match="the ids' grid, 8 x 8"):
            amused_inpaint(amused, torch.zeros(1, 8, 8).long(), MASK[:4], "a")
        with pytest.raises(TokenizerError, match="ids must be 0 to 49"):
            amused_inpaint(amused, torch.full((1, 8, 8), 50), MASK, "a")
