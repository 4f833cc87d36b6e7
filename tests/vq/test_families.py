"""Families whose network is written here: their keys, round trips, and what they refuse."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sage_diffusion.vq import families, load_tokenizer
from sage_diffusion.vq.families import magvit, titok
from sage_diffusion.vq.tokenizer import TokenizerError


def picture(side=16):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def round_trip(tokenizer, image):
    """Ids, once it is certain that they decode to what the forward pass gives."""
    ids = tokenizer.encode(image)
    with torch.no_grad():
        forward, indices, _ = tokenizer(image)
    assert torch.equal(indices.view(ids.shape), ids) and len(ids.unique()) > 2
    torch.testing.assert_close(tokenizer.decode(ids), forward.clamp(0, 1), rtol=1e-5, atol=1e-5)
    return ids


class TestOpenMagvit2:
    def state(self):
        torch.manual_seed(0)
        parts = {
            "encoder": magvit._Encoder([32, 64], 32, 2, 5),
            "decoder": magvit._Decoder([32, 64], 2, 5),
        }
        return {f"{p}.{n}": x for p, net in parts.items() for n, x in net.state_dict().items()}

    def test_ids_are_signs(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file({**self.state(), "loss.perceptual_loss.lin0.weight": torch.zeros(1)}, path)
        tokenizer = load_tokenizer(path)
        ids = round_trip(tokenizer, picture())
        bits = (tokenizer.latents(picture()) > 0).long()
        assert torch.equal((bits * torch.tensor([1, 2, 4, 8, 16])).sum(-1), ids)
        assert (tokenizer.traits.family, tokenizer.traits.factor) == ("open-magvit2", 2)
        assert (tokenizer.codebook_size, tokenizer.traits.low) == (32, -1)

    def test_keys_are_the_published_ones(self):
        names = self.state()
        for name in (
            "encoder.down.0.downsample.weight",
            "encoder.down.1.block.0.nin_shortcut.weight",
            "encoder.mid_block.1.norm2.bias",
            "decoder.adaptive.1.gamma.weight",
            "decoder.up.1.upsample.conv1.bias",
            "decoder.up.0.block.1.conv2.weight",
            "decoder.conv_out.weight",
        ):
            assert name in names
        assert "encoder.conv_in.bias" not in names and "decoder.conv_in.bias" in names

    def test_channels_become_pixels_places_first(self):
        up = magvit._Upsample(2)
        torch.nn.init.zeros_(up.conv1.weight)
        up.conv1.bias.data = torch.arange(8.0)
        got = up(torch.zeros(1, 2, 1, 1))
        assert torch.equal(got, torch.tensor([[[[0.0, 2], [4, 6]], [[1, 3], [5, 7]]]]))

    def test_scale_is_the_codes_spread(self):
        layer = magvit._Adaptive(1, 32)
        for linear, value in ((layer.gamma, 2.0), (layer.beta, 3.0)):
            torch.nn.init.constant_(linear.weight, value)
            torch.nn.init.zeros_(linear.bias)
        codes = torch.tensor([1.0, -1, 1, 1]).view(1, 1, 2, 2)
        got = layer(torch.arange(128.0).view(1, 32, 2, 2), codes)
        torch.testing.assert_close(got.mean(), torch.tensor(3 * 0.5))
        torch.testing.assert_close(
            got.std(unbiased=False), torch.tensor(2 * 1.0), rtol=1e-4, atol=0
        )

    def test_weights_that_do_not_fit(self, tmp_path):
        state = self.state()
        del state["decoder.conv_in.bias"]
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(TokenizerError, match="weights do not fit Open-MAGVIT2's network"):
            load_tokenizer(tmp_path / "x.safetensors")


class TestTiTok:
    def folder(self, path, legacy=True, pixels=True, **options):
        """A tiny one: pictures of 32 x 32 in patches of 8, 5 tokens of 12 dims, 60 codes."""
        torch.manual_seed(0)
        width, cells, tokens, dim = 64, 16, 5, 12
        state = {"latent_tokens": torch.randn(tokens, width)}
        state["quantize.embedding.weight"] = torch.randn(60, dim)
        for part in ("encoder", "decoder"):
            state |= {
                f"{part}.class_embedding": torch.randn(1, width),
                f"{part}.positional_embedding": torch.randn(cells + 1, width),
                f"{part}.latent_token_positional_embedding": torch.randn(tokens, width),
            }
            layer = torch.nn.TransformerEncoderLayer(width, 1, 4 * width).state_dict()
            names = {
                "self_attn": "transformer.0.attn",
                "linear1": "transformer.0.mlp.c_fc",
                "linear2": "transformer.0.mlp.c_proj",
                "norm1": "transformer.0.ln_1",
                "norm2": "transformer.0.ln_2",
            }
            for name, tensor in layer.items():
                first, _, rest = name.partition(".")
                state[f"{part}.{names[first]}.{rest}"] = tensor
            for norm in ("ln_pre", "ln_post"):
                self.layer(state, f"{part}.{norm}", torch.nn.LayerNorm(width))
        self.layer(state, "encoder.patch_embed", torch.nn.Conv2d(3, width, 8, 8))
        self.layer(state, "encoder.conv_out", torch.nn.Conv2d(width, dim, 1))
        self.layer(state, "decoder.decoder_embed", torch.nn.Linear(dim, width))
        state["decoder.mask_token"] = torch.randn(1, 1, width)
        if legacy:
            self.layer(state, "decoder.ffn.0", torch.nn.Conv2d(width, 2 * width, 1))
            self.layer(state, "decoder.ffn.2", torch.nn.Conv2d(2 * width, 20, 1))
        else:
            self.layer(state, "decoder.ffn.0", torch.nn.Conv2d(width, 3 * 8 * 8, 1))
            self.layer(state, "decoder.conv_out", torch.nn.Conv2d(3, 3, 3))
        if legacy and pixels:
            state["pixel_quantize.embedding.weight"] = torch.randn(20, 16)
            state |= self.pixels()
        save_file({n: x.clone() for n, x in state.items()}, path / "model.safetensors")
        config = {"model": {"vq_model": {"use_l2_norm": True, **options}}}
        (path / "config.json").write_text(json.dumps(config))
        return state

    def layer(self, state, name, module):
        state |= {f"{name}.{n}": x for n, x in module.state_dict().items()}

    def pixels(self):
        """MaskGIT's decoder of four levels: 4 x 4 codes to 32 x 32 pixels."""
        state, widths = {}, [32, 32, 64, 64]
        conv = torch.nn.Conv2d
        self.layer(state, "conv_in", conv(16, 64, 3))
        places = [("mid.0", 64, 64)]
        for i, width in enumerate(widths):
            places.append((f"up.{i}.block.0", widths[min(i + 1, 3)], width))
            if i:
                self.layer(state, f"up.{i}.upsample_conv", conv(width, width, 3))
        for name, width, out in places:
            self.layer(state, f"{name}.norm1", torch.nn.GroupNorm(32, width))
            self.layer(state, f"{name}.norm2", torch.nn.GroupNorm(32, out))
            self.layer(state, f"{name}.conv1", conv(width, out, 3, bias=False))
            self.layer(state, f"{name}.conv2", conv(out, out, 3, bias=False))
            if width != out:
                self.layer(state, f"{name}.nin_shortcut", conv(out, out, 1, bias=False))
        self.layer(state, "norm_out", torch.nn.GroupNorm(32, 32))
        self.layer(state, "conv_out", conv(32, 3, 3))
        return {f"pixel_decoder.{n}": x for n, x in state.items()}

    @pytest.mark.parametrize("legacy", [True, False])
    def test_a_row_of_tokens(self, tmp_path, legacy):
        self.folder(tmp_path, legacy)
        tokenizer = load_tokenizer(tmp_path)
        ids = round_trip(tokenizer, picture(32))
        assert ids.shape == (2, 1, 5)
        assert (tokenizer.traits.family, tokenizer.traits.low) == ("titok", 0)
        assert tokenizer.picture_bits(32, 32) == 5 * tokenizer.bits
        z = tokenizer.latents(picture(32))[:, 0]
        table = torch.nn.functional.normalize(tokenizer.quantizer.codebook, dim=-1)
        assert torch.equal((z @ table.t()).argmax(-1), ids[:, 0])  # the angle, not the distance
        with pytest.raises(TokenizerError, match="pictures of 32 x 32 only, got 64 x 64"):
            tokenizer.encode(picture(64))

    def test_the_config_says_how_codes_are_compared(self, tmp_path):
        self.folder(tmp_path, use_l2_norm=False)
        assert load_tokenizer(tmp_path).quantizer.metric == "l2"
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(TokenizerError, match=r"must .* have model\.vq_model\.use_l2_norm"):
            load_tokenizer(tmp_path)

    def test_the_first_stage_has_no_pixels(self, tmp_path):
        self.folder(tmp_path, pixels=False)
        tokenizer = load_tokenizer(tmp_path)
        with pytest.raises(TokenizerError, match="titok can't decode: these weights are of its"):
            tokenizer.decode(tokenizer.encode(picture(32)))

    def test_patches_become_pixels_colours_last(self):
        state = {
            "decoder.class_embedding": torch.zeros(1, 64),
            "decoder.positional_embedding": torch.zeros(2, 64),
            "decoder.latent_token_positional_embedding": torch.zeros(1, 64),
            "decoder.ffn.0.weight": torch.zeros(12, 64, 1, 1),
            "quantize.embedding.weight": torch.zeros(2, 4),
        }
        decoder = titok._Decoder(titok._Shape(state, "decoder", False))
        torch.nn.init.zeros_(decoder.ffn[0].weight)
        for parameter in (decoder.class_embedding, decoder.positional_embedding):
            torch.nn.init.zeros_(parameter)
        torch.nn.init.zeros_(decoder.latent_token_positional_embedding)
        torch.nn.init.zeros_(decoder.mask_token)
        decoder.ffn[0].bias.data = torch.arange(12.0)
        torch.nn.init.dirac_(decoder.conv_out.weight)
        torch.nn.init.zeros_(decoder.conv_out.bias)
        got = decoder(torch.zeros(1, 4, 1, 1))
        assert torch.equal(got[0, 0], torch.tensor([[0.0, 3], [6, 9]]))


def test_unknown_keys_say_why_each_family_refuses(tmp_path):
    save_file({"encoder.blocks.0.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path / "x.safetensors")
    for family in families.families():
        assert f"{family.name}: " in str(caught.value)


def test_families_of_a_library_that_is_missing_say_so(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(families.importlib, "import_module", missing)
    found = families.families()
    assert len(found) == len(families.MODULES)
    assert found[1].refuse(None) == "diffusers is not installed"


def test_no_checkpoint_is_of_two_families(tmp_path):
    states = {
        "open-magvit2": TestOpenMagvit2().state(),
        "titok": TestTiTok().folder(tmp_path),
    }
    for name, state in states.items():
        checkpoint = families.Checkpoint(state, None, None)
        assert [f.name for f in families.families() if f.refuse(checkpoint) is None] == [name]
    # As its authors write it, and as this package does.
    names = [(family.name, family.make is None) for family in families.families()]
    assert len(set(names)) == len(names)
