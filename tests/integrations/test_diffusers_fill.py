"""Masked fill with tiny random models: what changes, what is refused, and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from diffusers import AmusedScheduler, UVit2DModel, VQModel

from sage_diffusion import cli
from sage_diffusion.integrations.diffusers.fill import FillModel, Notes, save_fill
from sage_diffusion.vq import SimVQ, load_tokenizer
from sage_diffusion.vq.checkpoints import save_tokenizer
from sage_diffusion.vq.families import compact
from sage_diffusion.vq.fill import load_fill, token_mask
from sage_diffusion.vq.idfile import Tokens, save_tokens
from sage_diffusion.vq.tokenizer import TokenizerError

CODES = 50


def network(codes=CODES, **options):
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "cond_embed_dim": 8,
        "micro_cond_encode_dim": 4,
        "micro_cond_embed_dim": 20,
        "encoder_hidden_size": 8,
        "vocab_size": codes + 1,
        "codebook_size": codes,
        "in_channels": 32,
        "block_out_channels": 32,
        "num_res_blocks": 1,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "block_num_heads": 2,
        **options,
    }
    return UVit2DModel(**config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two classes."""
    path = tmp_path_factory.mktemp("fill")
    classes = torch.randn(3, 2, 8), torch.randn(3, 8)
    save_fill(path, network(), Notes(None, ("cats", "dogs")), classes)
    return path


@pytest.fixture
def filler(folder):
    return load_fill(folder)


IDS = torch.arange(2 * 6 * 5).view(2, 6, 5) % CODES
MASK = torch.zeros(6, 5, dtype=torch.bool)
MASK[1:4, 2:] = True


class TestFill:
    def test_only_masked_ids_change(self, filler):
        got = filler.fill(IDS, MASK, steps=4)
        assert got.shape == IDS.shape and got.dtype == torch.int64
        assert torch.equal(got[:, ~MASK], IDS[:, ~MASK])
        assert (got[:, MASK] != IDS[:, MASK]).any()
        assert got.min() >= 0 and got.max() < CODES

    def test_what_lies_under_the_mask_is_not_read(self, filler):
        other = IDS.masked_fill(MASK, -7)
        assert torch.equal(filler.fill(other, MASK, steps=3), filler.fill(IDS, MASK, steps=3))

    def test_the_same_seed_fills_the_same(self, filler):
        torch.manual_seed(1)
        first = filler.fill(IDS, MASK, seed=3, steps=3)
        torch.manual_seed(2)
        assert torch.equal(first, filler.fill(IDS, MASK, seed=3, steps=3))
        assert not torch.equal(first, filler.fill(IDS, MASK, seed=4, steps=3))

    def test_a_variant_is_the_next_seed(self, filler):
        several = filler.fill(IDS, MASK, seed=3, steps=3, variants=3)
        assert several.shape == (6, 6, 5)
        for i in range(3):
            alone = filler.fill(IDS, MASK, seed=3 + i, steps=3)
            assert torch.equal(several[2 * i : 2 * i + 2], alone)

    def test_hot_noise_leaves_what_was_given(self, filler):
        """At such a temperature the scheduler masks tokens that were given."""
        got = filler.fill(IDS, MASK, steps=6, temperature=(900.0, 900.0))
        assert torch.equal(got[:, ~MASK], IDS[:, ~MASK])

    def test_pictures_with_masks_of_their_own(self, filler):
        masks = torch.stack([MASK, torch.zeros_like(MASK)])
        got = filler.fill(IDS, masks, steps=3)
        assert torch.equal(got[1], IDS[1]) and not torch.equal(got[0], IDS[0])
        whole = torch.ones(6, 5, dtype=torch.bool)
        assert filler.fill(IDS, whole, steps=3).max() < CODES

    def test_fewer_are_masked_at_every_step_along_a_cosine(self, filler):
        masked = []
        filler.model.register_forward_pre_hook(
            lambda module, args: masked.append(int((args[0] == CODES).sum()))
        )
        filler.fill(IDS[:1], torch.ones(6, 5, dtype=torch.bool), steps=4)
        assert masked == [30] + [int(30 * np.cos(np.pi / 2 * i / 4)) for i in (1, 2, 3)]

    @pytest.mark.parametrize("steps", [1, 5])
    def test_a_single_token(self, filler, steps):
        mask = torch.zeros(6, 5, dtype=torch.bool)
        mask[2, 3] = True
        got = filler.fill(IDS, mask, steps=steps)
        assert torch.equal(got[:, ~mask], IDS[:, ~mask]) and got.max() < CODES

    @pytest.mark.parametrize(
        "hole,read",
        [
            ((slice(9, 11), slice(10, 12)), (slice(6, 14), slice(7, 15))),
            ((slice(0, 1), slice(19, 20)), (slice(0, 8), slice(12, 20))),
            ((slice(4, 14), slice(0, 20)), (slice(2, 16), slice(0, 20))),
        ],
    )
    def test_reads_a_window_around_the_mask(self, folder, tmp_path, hole, read):
        save_fill(tmp_path, network(), Notes(window=8))
        filler, ids = load_fill(tmp_path), torch.arange(400).view(1, 20, 20) % CODES
        seen = []
        filler.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        mask = torch.zeros(20, 20, dtype=torch.bool)
        mask[hole] = True
        got = filler.fill(ids, mask, steps=2)
        assert torch.equal(seen[0], ids.masked_fill(mask, CODES)[(slice(None), *read)])
        assert torch.equal(got[:, ~mask], ids[:, ~mask]) and got.max() < CODES
        assert torch.equal(filler.fill(ids, mask & False), ids)

    def test_the_surest_tokens_are_drawn_where_logits_are_sharp(self, tmp_path):
        save_fill(tmp_path, network(), Notes(sharpness=1e6))
        filler, surest = load_fill(tmp_path), []
        filler.model.register_forward_hook(lambda module, args, out: surest.append(out.argmax(1)))
        got = filler.fill(IDS, MASK, steps=1)
        assert torch.equal(got[:, MASK], surest[0][:, MASK])

    def test_a_class_and_guidance_move_the_logits(self, filler):
        """Guidance 3: without + 3 (cats - without)."""
        seen, step = [], filler.scheduler.step

        def watched(logits, *args, **kwargs):
            seen.append(logits)
            return step(logits, *args, **kwargs)

        filler.scheduler.step = watched
        for options in ({}, {"prompt": "cats"}, {"prompt": "cats", "guidance": 3.0}):
            filler.fill(IDS[:1], MASK, steps=1, **options)
        without, cats, guided = seen
        assert not torch.allclose(without, cats, atol=1e-3)
        torch.testing.assert_close(guided, without + 3 * (cats - without), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "ids,mask,options,message",
        [
            (IDS, MASK[:5], {}, r"grid, 6 x 5, got torch.bool \(5, 5\)"),
            (IDS, MASK.float(), {}, "must be boolean"),
            (IDS[0], MASK, {}, r"ids must be integers \[B, h, w\]"),
            (IDS + CODES, MASK, {}, "ids must be 0 to 49, got 50"),
            (IDS, MASK, {"steps": 0}, "at least 1"),
            (IDS, MASK, {"variants": 0}, "at least 1"),
            (IDS, MASK, {"temperature": -1.0}, "from 0 on"),
            (IDS, MASK, {"guidance": 2.0}, "guidance needs a prompt"),
            (IDS, MASK, {"prompt": "cows"}, r"a class of the fill model \(cats, dogs\), got cows"),
        ],
    )
    def test_refuses(self, filler, ids, mask, options, message):
        with pytest.raises(TokenizerError, match=message):
            filler.fill(ids, mask, **options)

    def test_attention_is_this_projects(self, folder):
        filler = load_fill(folder, "int8/fp8")
        session, places = filler.model.sage.session, []
        find = session.spec_for

        def watched(*args, **kwargs):
            places.append(session.where.progress)
            return find(*args, **kwargs)

        session.spec_for = watched
        got = filler.fill(IDS, MASK, steps=3)
        assert torch.equal(got[:, ~MASK], IDS[:, ~MASK])
        assert "6 layers" in repr(session)
        assert sorted(set(places)) == [0.0, 0.5, 1.0]
        assert "int8/fp8 100%" in str(filler.model.sage.summary())


class TestFolders:
    def test_a_bare_model_has_no_classes(self, tmp_path):
        network().save_pretrained(tmp_path)
        filler = load_fill(tmp_path)
        assert filler.fill(IDS, MASK, steps=2).shape == IDS.shape
        with pytest.raises(TokenizerError, match=r"\(none\), got cats"):
            filler.fill(IDS, MASK, prompt="cats")

    def test_another_vocabulary_is_refused(self, filler, tmp_path):
        tokenizer = compact.make(SimVQ(6, CODES), {"widths": [8], "depths": [1]})
        filler.check(tokenizer)
        with pytest.raises(TokenizerError, match=r"another vocabulary \(50 codes"):
            filler.check(compact.make(SimVQ(6, 51), {"widths": [8], "depths": [1]}))
        save_fill(tmp_path, network(), Notes("0" * 16))
        with pytest.raises(TokenizerError, match=r"another vocabulary \(50 codes, 0000"):
            load_fill(tmp_path).check(tokenizer)
        save_fill(tmp_path, network(), Notes(tokenizer.fingerprint))
        load_fill(tmp_path).check(tokenizer)

    def test_what_is_no_fill_model(self, tmp_path):
        with pytest.raises(TokenizerError, match=r"must hold a UVit2DModel's config\.json"):
            load_fill(tmp_path)
        VQModel(block_out_channels=(32,)).save_pretrained(tmp_path)
        with pytest.raises(TokenizerError, match=r"config\.json names VQModel"):
            load_fill(tmp_path)
        save_fill(tmp_path, network(), Notes(None, ("cats",)))
        with pytest.raises(TokenizerError, match="embeddings of no class and of 1, got 1 and 1"):
            load_fill(tmp_path)
        (tmp_path / "fill.json").write_text("{]")
        with pytest.raises(TokenizerError, match=r"fill\.json is damaged"):
            load_fill(tmp_path)

    def test_amused_reads_prompts(self, tmp_path):
        """A whole pipeline's folder: its scheduler's mask, its text encoder, its picture's size."""
        transformers = pytest.importorskip("transformers")
        words = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
        (tmp_path / "tokenizer").mkdir()
        pieces = {word: i for i, word in enumerate(words)}
        (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(pieces))
        (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 8})
        )
        text = transformers.CLIPTextConfig(
            vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=8, max_position_embeddings=8,
            bos_token_id=4, eos_token_id=5, pad_token_id=5,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.CLIPTextModelWithProjection(text).save_pretrained(tmp_path / "text_encoder")
        network(vocab_size=60).save_pretrained(tmp_path / "transformer")
        AmusedScheduler(mask_token_id=59).save_pretrained(tmp_path / "scheduler")
        VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).save_pretrained(tmp_path / "vqvae")
        (tmp_path / "model_index.json").write_text("{}")
        filler = load_fill(tmp_path)
        assert filler.mask_id == 59
        inputs = filler.inputs(["", "a b"], (6, 5), 2)
        assert inputs["micro_conds"].tolist() == [[10.0, 12.0, 0.0, 0.0, 6.0]] * 4
        assert inputs["encoder_hidden_states"].shape == (4, 8, 8)
        assert not torch.allclose(inputs["pooled_text_emb"][0], inputs["pooled_text_emb"][2])
        got = filler.fill(IDS, MASK, steps=2, prompt="a b", guidance=4.0)
        assert torch.equal(got[:, ~MASK], IDS[:, ~MASK]) and got.max() < CODES


def test_a_token_is_masked_with_any_of_its_pixels():
    picture = torch.zeros(8, 12)
    picture[3, 4] = 1.0
    picture[7, 11] = 0.4
    want = torch.zeros(2, 3, dtype=torch.bool)
    want[0, 1] = True
    assert torch.equal(token_mask(picture, 4), want)
    with pytest.raises(TokenizerError, match=r"multiples of 5, got \(8, 12\)"):
        token_mask(picture, 5)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path, folder):
        torch.manual_seed(0)
        tokenizer = compact.make(SimVQ(6, CODES), {"widths": [8], "depths": [1]}).eval()
        save_tokenizer(tmp_path / "t.safetensors", tokenizer)
        save_tokens(tmp_path / "x.vqt", Tokens.of(tokenizer, IDS[:1]))
        pixels = np.kron(MASK.numpy(), np.ones((4, 4))) * 255
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mask.png")
        return tmp_path, [
            "vq", "fill", str(tmp_path / "x.vqt"), "--tokenizer", str(tmp_path / "t.safetensors"),
            "--model", str(folder), "--mask", str(tmp_path / "mask.png"),
            "--out", str(tmp_path / "y.png"), "--steps", "2", "--json",
        ]  # fmt: skip

    def test_variants_are_files(self, files, capsys, folder):
        path, arguments = files
        options = ["--variants", "2", "--seed", "5", "--prompt", "dogs", "--guidance", "2"]
        assert cli.main([*arguments, *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["files"] == [str(path / f"y_00{i}.png") for i in (0, 1)]
        assert (found["masked"], found["seeds"]) == (9, [5, 6])
        want = load_tokenizer(path / "t.safetensors").decode(
            load_fill(folder).fill(IDS[:1], MASK, seed=6, steps=2, prompt="dogs", guidance=2.0)
        )
        got = torch.from_numpy(np.array(Image.open(path / "y_001.png"))).permute(2, 0, 1) / 255
        assert (got - want[0]).abs().max() <= 0.5 / 255 + 1e-6

    def test_a_mask_of_another_grid(self, files, capsys):
        path, arguments = files
        Image.new("L", (24, 24), 255).save(path / "mask.png")
        assert cli.main(arguments) == 1
        assert "6 x 5, got torch.bool (6, 6)" in json.loads(capsys.readouterr().out)["error"]
        assert not (path / "y.png").exists()


def test_a_model_made_by_hand():
    scheduler = AmusedScheduler(mask_token_id=CODES, masking_schedule="linear")
    filler = FillModel(
        network(), scheduler, lambda text: (torch.zeros(1, 1, 8), torch.zeros(1, 8)), Notes()
    )
    assert filler.fill(IDS, MASK, steps=2).shape == IDS.shape
