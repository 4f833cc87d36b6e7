"""VQGAN checkpoints of three projects through diffusers' VQModel: ids and pictures are theirs."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from diffusers import VQModel

from sage_diffusion.vq import Residual, SimVQ, load_tokenizer
from sage_diffusion.vq.checkpoints import convert, save_tokenizer
from sage_diffusion.vq.repair import repair
from sage_diffusion.vq.tokenizer import TokenizerError
from sage_diffusion.vq.training import Training

#: Two levels, the coarser with attention, as taming's VQGANs have it.
CONFIG = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 8,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 60,
}


def model(**options):
    torch.manual_seed(0)
    made = VQModel(**{**CONFIG, **options}).eval()
    torch.nn.init.normal_(made.quantize.embedding.weight)
    return made


def picture():
    return torch.rand(1, 3, 16, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(vq, image):
    """Ids and picture by the library's own calls, for pictures in the network's range."""
    latents = vq.encode(image).latents
    ids = vq.quantize(latents)[2][2].view(1, *latents.shape[2:])
    return ids, vq.decode(latents).sample


def taming(state):
    """diffusers' names to those of taming-transformers: written down apart from the loader."""
    found = {}
    for name, tensor in state.items():
        new = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{1 - int(m[1])}", name)
        new = new.replace("down_blocks", "down").replace("downsamplers.0", "downsample")
        new = new.replace("upsamplers.0", "upsample").replace("conv_norm_out", "norm_out")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
        new = new.replace("conv_shortcut", "nin_shortcut")
        if "attn" in new or "attentions" in new:
            new = new.replace("attentions", "attn").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])", r"\1", new)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        found[new] = tensor.contiguous()
    return found


@pytest.mark.parametrize(
    "options", [{}, {"norm_type": "spatial", "vq_embed_dim": 8}, {"lookup_from_codebook": True}]
)
def test_a_folder_of_diffusers(tmp_path, options):
    vq = model(**options)
    vq.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    low = 0.0 if options.get("lookup_from_codebook") else -1.0  # aMUSEd's range is 0 .. 1
    image = picture()
    ids, again = theirs(vq, image * (1 - low) + low)
    assert torch.equal(tokenizer.encode(image), ids)
    want = ((again - low) / (1 - low)).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(ids), want, rtol=1e-4, atol=1e-5)
    assert (tokenizer.codebook_size, tokenizer.traits.factor) == (60, 2)
    other = 0.0 - 1.0 - low
    assert not torch.equal(theirs(vq, image * (1 - other) + other)[0], ids)


def test_a_file_of_taming(tmp_path):
    vq = model()
    path = tmp_path / "vqgan.safetensors"
    extra = {"loss.discriminator.main.0.weight": torch.zeros(3), "model_ema.decay": torch.zeros(1)}
    save_file({**taming(vq.state_dict()), **extra}, path)
    tokenizer = load_tokenizer(path)
    image = picture()
    ids, again = theirs(vq, image * 2 - 1)
    assert torch.equal(tokenizer.encode(image), ids)
    torch.testing.assert_close(
        tokenizer.decode(ids), ((again + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5
    )


def test_averages_take_the_weights_places(tmp_path):
    """As training with an average writes them: names without dots, frozen tensors without one."""
    vq = model()
    state = taming(vq.state_dict())
    averages = {"model_ema." + n.replace(".", ""): x for n, x in state.items()}
    codes = averages.pop("model_ema.quantizeembeddingweight")
    raw = {n: x + 1 for n, x in state.items()} | {"quantize.embedding.weight": codes}
    save_file({**raw, **averages, "model_ema.decay": torch.zeros(1)}, tmp_path / "x.safetensors")
    tokenizer = load_tokenizer(tmp_path / "x.safetensors")
    ids, again = theirs(vq, picture() * 2 - 1)
    assert torch.equal(tokenizer.encode(picture()), ids)
    torch.testing.assert_close(
        tokenizer.decode(ids), ((again + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [60, 2**17])
def test_simvq_is_folded(tmp_path, size):
    """Its ids stand for the projected codes: decoding the raw ones gives another picture.

    As many codes as IBQ has do not make it IBQ.
    """
    vq = model(vq_embed_dim=8, num_vq_embeddings=size)
    simvq = SimVQ(8, size)
    state = taming(vq.state_dict())
    for name in ("quant_conv", "post_quant_conv"):
        del state[f"{name}.weight"], state[f"{name}.bias"]
        layer = getattr(vq, name)
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    state["quantize.embedding.weight"] = simvq.basis
    state["quantize.embedding_proj.weight"] = simvq.projection.weight.detach()
    state["quantize.embedding_proj.bias"] = simvq.projection.bias.detach()
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    state["model_ema.quantizeembedding_projbias"] = state["quantize.embedding_proj.bias"]
    torch.save({"state_dict": state}, tmp_path / "simvq.ckpt")
    tokenizer = convert(tmp_path / "simvq.ckpt", tmp_path / "simvq.safetensors")
    with torch.no_grad():
        vq.quantize.embedding.weight.copy_(simvq.table())
    image = picture()
    ids, again = theirs(vq, image * 2 - 1)
    assert torch.equal(tokenizer.encode(image), ids)
    torch.testing.assert_close(
        tokenizer.decode(ids), ((again + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5
    )
    assert load_tokenizer(tmp_path / "simvq.safetensors").fingerprint == tokenizer.fingerprint
    kept = {name.split(".")[0] for name in load_file(tmp_path / "simvq.safetensors")}
    assert kept == {"encoder", "decoder", "quantize"}


@pytest.mark.parametrize("residual", [False, True])
def test_a_repaired_vqgan_is_written_and_read(tmp_path, residual):
    vq = model(vq_embed_dim=8, num_vq_embeddings=60)
    vq.save_pretrained(tmp_path / "vqgan")
    loaded = load_tokenizer(tmp_path / "vqgan")
    if residual:
        loaded.quantizer = Residual([SimVQ(8, 20), SimVQ(8, 20)])
        object.__setattr__(loaded.traits, "family", "rq-vae")
    pixels = (picture()[0] * 255).to(torch.uint8)
    settings = Training(steps=1, batch=1, crop=12, parts="decoder")
    found = repair(loaded, [pixels], settings, method="simvq", tokens=20).tokenizer
    save_tokenizer(tmp_path / "repaired.safetensors", found)
    again = load_tokenizer(tmp_path / "repaired.safetensors")
    assert again.traits == loaded.traits and again.fingerprint == found.fingerprint
    image = picture()
    ids = found.encode(image)
    assert torch.equal(again.encode(image), ids)
    assert torch.equal(again.decode(ids), found.decode(ids))


class TestOtherCodes:
    """Networks of taming-transformers with other quantizers: ids by the published formula."""

    def network(self, **options):
        """A VQModel, its weights under taming's names, and latents of the picture."""
        vq = model(**options)
        state = taming(vq.state_dict())
        del state["quantize.embedding.weight"]
        with torch.no_grad():
            return vq, state, vq.encode(picture() * 2 - 1).latents

    def check(self, path, family, vq, ids, codes):
        """It encodes to these ids and decodes to the network's picture of these codes."""
        tokenizer = load_tokenizer(path)
        assert tokenizer.traits.family == family and len(ids.unique()) > 3
        assert torch.equal(tokenizer.encode(picture()), ids)
        with torch.no_grad():
            want = vq.decoder(vq.post_quant_conv(codes))
            forward, indices, _ = tokenizer(picture())
        decoded = tokenizer.decode(ids)
        assert torch.equal(indices.view(ids.shape), ids)
        assert torch.equal(decoded, forward.clamp(0, 1))
        torch.testing.assert_close(decoded, ((want + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)
        return tokenizer

    @pytest.mark.parametrize("metric", [None, "dot"])
    def test_ibq_chooses_by_dot_product(self, tmp_path, metric):
        """Told by 131,072 codes, or by whoever converts a smaller one."""
        vq, state, z = self.network(vq_embed_dim=8)
        table = torch.randn(100 if metric else 2**17, 8) * torch.rand(1 if metric else 2**17, 1)
        torch.save({**state, "quantize.embedding.weight": table}, tmp_path / "ibq.pt")
        convert(tmp_path / "ibq.pt", tmp_path / "ibq.safetensors", metric=metric)
        ids = torch.einsum("bdhw,kd->bhwk", z.double(), table.double()).argmax(-1)
        codes = table[ids].permute(0, 3, 1, 2)
        self.check(tmp_path / "ibq.safetensors", "ibq", vq, ids, codes)

    def test_fsq_rounds(self, tmp_path):
        vq, state, z = self.network()
        torch.save(state, tmp_path / "fsq.pt")
        made = convert(tmp_path / "fsq.pt", tmp_path / "fsq.safetensors", levels=[5, 5, 3, 3])
        assert made.codebook_size == 225
        levels = torch.tensor([5.0, 5, 3, 3]).view(4, 1, 1)
        digits = (z.tanh() * (levels - 1) * 1.001 / 2).round()
        ids = ((digits + levels // 2) * torch.tensor([1, 5, 25, 75]).view(4, 1, 1)).sum(1).long()
        self.check(tmp_path / "fsq.safetensors", "fsq", vq, ids, digits / (levels // 2))

    def test_rq_vae_codes_what_is_left(self, tmp_path):
        vq, state, z = self.network()
        tables = torch.randn(3, 31, 4) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
        for i, table in enumerate(tables):
            state[f"quantizer.codebooks.{i}.weight"] = table.clone()
            state[f"quantizer.codebooks.{i}.embed_ema"] = table[:-1].clone()
        save_file(state, tmp_path / "rq.safetensors")
        left, ids = z.permute(0, 2, 3, 1), []
        for table in tables[:, :-1]:  # the last row is padding
            ids.append((left[..., None, :] - table).norm(dim=-1).argmin(-1))
            left = left - table[ids[-1]]
        codes = z - left.permute(0, 3, 1, 2)
        self.check(tmp_path / "rq.safetensors", "rq-vae", vq, torch.stack(ids, -1), codes)

    @pytest.mark.parametrize("convolutions", [0, 1, 4])
    def test_var_codes_grids_of_growing_size(self, tmp_path, convolutions):
        """0: one convolution, shared by all, under a name without a number."""
        vq, state, _ = self.network()
        square = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            z = vq.encode(square * 2 - 1).latents
        table, sides = torch.randn(60, 4), (1, 2, 3, 4)
        layers = [torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(convolutions or 1)]
        for i, layer in enumerate(layers):
            name = f"qresi_ls.{i}" if convolutions else "qresi"
            for part, tensor in layer.state_dict().items():
                state[f"quantize.quant_resi.{name}.{part}"] = tensor
        for name in list(state):  # VAR has one layer for queries, keys and values
            if ".q." in name:
                three = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
                state[name.replace(".q.", ".qkv.")] = torch.cat(three)
        state["quantize.embedding.weight"] = table
        state["quantize.ema_vocab_hit_SV"] = torch.zeros(3, 60)
        torch.save(state, tmp_path / "var.pt")
        made = convert(tmp_path / "var.pt", tmp_path / "var.safetensors", scales=sides)
        left, ids = z, []
        # The places 1/12, 13/36, 23/36 and 11/12 of four convolutions: nearest to 0, 1/3, 2/3, 1.
        chosen = [layers[i] for i in (range(4) if convolutions == 4 else [0] * 4)]
        with torch.no_grad():
            for side, layer in zip(sides, chosen, strict=True):
                small = torch.nn.functional.adaptive_avg_pool2d(left, side).permute(0, 2, 3, 1)
                ids.append((small[..., None, :] - table).norm(dim=-1).argmin(-1))
                codes = table[ids[-1]].permute(0, 3, 1, 2)
                codes = torch.nn.functional.interpolate(codes, size=(4, 4), mode="bicubic")
                left = left - (codes + layer(codes)) / 2
            want = vq.decoder(vq.post_quant_conv(z - left))
        row = torch.cat([grid.flatten(1) for grid in ids], 1)[:, None]
        assert row.shape == (1, 1, 30) and torch.equal(made.encode(square), row)
        torch.testing.assert_close(
            made.decode(row), ((want + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5
        )
        with torch.no_grad():
            assert torch.equal(made.decode(row), made(square)[0].clamp(0, 1))
        assert made.picture_bits(8, 8) == 30 * made.bits
        assert torch.equal(load_tokenizer(tmp_path / "var.safetensors").encode(square), row)
        with pytest.raises(TokenizerError, match="pictures of 8 x 8 only, got 12 x 16"):
            made.encode(picture())
        with pytest.raises(TokenizerError, match=r"ids must be \[B, 1, 30\], got \(1, 3, 10\)"):
            made.decode(row.view(1, 3, 10))

    def test_a_quantizer_of_other_dims(self, tmp_path):
        _, state, _ = self.network()
        state["quantize.embedding.weight"] = torch.randn(60, 5)
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(TokenizerError, match="must have 4 dims as the network, got 5"):
            load_tokenizer(tmp_path / "x.safetensors")


def test_what_does_not_fit(tmp_path):
    vq = model()
    vq.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_vq_embeddings": 61}))
    with pytest.raises(TokenizerError, match=r"must be \(61, 4\) as configured, got \(60, 4\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    with pytest.raises(TokenizerError, match="weights do not fit a VQModel"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(TokenizerError, match=r"vqgan: config\.json names AutoencoderKL"):
        load_tokenizer(tmp_path)
