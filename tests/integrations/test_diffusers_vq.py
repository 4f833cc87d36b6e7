"""VQGAN checkpoints of three projects through diffusers' VQModel: ids and pictures are theirs."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from diffusers import VQModel

from sage_diffusion.vq import SimVQ, load_tokenizer
from sage_diffusion.vq.checkpoints import convert
from sage_diffusion.vq.tokenizer import TokenizerError

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


def test_simvq_is_folded(tmp_path):
    """Its ids stand for the projected codes: decoding the raw ones gives another picture."""
    vq = model(vq_embed_dim=8)
    simvq = SimVQ(8, 60)
    state = taming(vq.state_dict())
    for name in ("quant_conv", "post_quant_conv"):
        del state[f"{name}.weight"], state[f"{name}.bias"]
        layer = getattr(vq, name)
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    state["quantize.embedding.weight"] = simvq.basis
    state["quantize.embedding_proj.weight"] = simvq.projection.weight.detach()
    state["quantize.embedding_proj.bias"] = simvq.projection.bias.detach()
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
