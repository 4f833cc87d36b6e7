"""Tokenizers of transformers: folders of one alone and of whole models; LlamaGen's names."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers.models.apertus1p5")  # the youngest of them

from transformers.models.apertus1p5 import modeling_apertus1p5 as apertus
from transformers.models.chameleon import modeling_chameleon as chameleon
from transformers.models.emu3 import modeling_emu3 as emu3
from transformers.models.glm_image import modeling_glm_image as glm_image
from transformers.models.janus import modeling_janus as janus

from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.checkpoints import convert
from sage_diffusion.vq.tokenizer import TokenizerError

SMALL = {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 2]}

#: Family -> the class, its config, the name of its config in a whole model, its keys there.
MODELS = {
    "emu3": (
        emu3.Emu3VQVAE,
        {**SMALL, "codebook_size": 60, "attn_resolutions": [1], "hidden_size": 64},
        ("emu3", "vq_config", "model.vqmodel."),
    ),
    "janus": (
        janus.JanusVQVAE,
        {**SMALL, "num_embeddings": 60, "embed_dim": 4, "latent_channels": 8, "num_patches": 8},
        ("janus", "vq_config", "model.vqmodel."),
    ),
    "chameleon": (
        chameleon.ChameleonVQVAE,
        {**SMALL, "num_embeddings": 60, "embed_dim": 4, "latent_channels": 8},
        ("chameleon", "vq_config", "model.vqmodel."),
    ),
    "apertus": (
        apertus.Apertus1p5VisionTokenizerModel,
        {**SMALL, "codebook_size": 60, "embed_dim": 4, "latent_channels": 8},
        ("apertus1p5", "vision_config", "model.vision_tokenizer."),
    ),
}


def make(family):
    torch.manual_seed(0)
    kind, config, whole = MODELS[family]
    model = kind(kind.config_class(**config)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    if family == "chameleon":  # it starts with tiny weights: take codes from its own latents
        with torch.no_grad():
            latents = model.quant_conv(model.encoder(torch.rand(1, 3, 16, 16)))
        model.quantize.embedding.weight.data = latents[0].flatten(1).t()[:60].contiguous()
    if family == "janus":  # its codes lie on the unit sphere, as training left them
        weight = model.quantize.embedding.weight
        weight.data = torch.nn.functional.normalize(weight.data)
    return model, whole


def picture():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def save(folder, state, config, parts=1):
    """A folder as transformers writes it, in so many files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    for i in range(parts):
        some = {name: state[name].contiguous().clone() for name in names[i::parts]}
        save_file(some, folder / f"model-{i}.safetensors")
    if parts > 1:
        (folder / "model.safetensors.index.json").write_text("{}")


@torch.no_grad()
def theirs(family, model, image):
    """Ids and picture by the library's own calls."""
    pixels = image * 2 - 1
    if family == "emu3":
        sizes = [image.shape[2:]] * len(image)
        ids = torch.stack(model.encode(pixels, sizes).image_tokens)
        return ids, model.decode(ids)
    if family == "apertus":
        return model.encode(pixels).image_tokens, None
    if family == "janus":  # as published: the smallest angle; its encode forgets the latents' norm
        latents = torch.nn.functional.normalize(model.quant_conv(model.encoder(pixels)).double())
        scores = torch.einsum("bdhw,kd->bhwk", latents, model.quantize.embedding.weight.double())
        ids = scores.argmax(-1)
        library = model.encode(pixels).image_tokens.view(ids.shape)
        assert (library == ids).float().mean() > 0.97  # but for roundings, with codes of norm one
        return ids, model.decode(ids.flatten(1))
    return model.encode(pixels).image_tokens.view(len(image), 8, 8), None


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_ids_and_pictures_are_the_librarys(tmp_path, family, whole):
    model, (model_type, part, prefix) = make(family)
    state, config = model.state_dict(), model.config.to_dict()
    if whole:
        state = {prefix + name: tensor for name, tensor in state.items()}
        state["model.text_model.embed_tokens.weight"] = torch.zeros(2, 2)
        config = {"model_type": model_type, part: config}
        config["vocabulary_map"] = {"<|visual token 000000|>": 70, "IMGIMGAZ": 4}
    save(tmp_path / "model", state, config, parts=3 if whole else 1)
    tokenizer = load_tokenizer(tmp_path / "model")
    ids, again = theirs(family, model, picture())
    assert torch.equal(tokenizer.encode(picture()), ids) and len(ids.unique()) > 3
    assert (tokenizer.codebook_size, tokenizer.traits.factor) == (60, 2)
    offset = {"emu3": 70, "chameleon": 4, "apertus": 131272}.get(family, 0)
    assert tokenizer.traits.offset == (offset if whole else 0)
    if again is None:
        with pytest.raises(
            TokenizerError, match="can't decode: its tokens are read by a generator"
        ):
            tokenizer.decode(ids)
        return
    want = ((again + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(ids), want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        forward, indices, _ = tokenizer(picture())
    assert torch.equal(indices.view(ids.shape), ids)
    assert torch.equal(tokenizer.decode(ids), forward.clamp(0, 1))


def glm(tmp_path):
    torch.manual_seed(0)
    vision = glm_image.GlmImageVisionConfig(
        depth=1, hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4, image_size=32
    )
    vq = glm_image.GlmImageVQVAEConfig(embed_dim=16, num_embeddings=60, latent_channels=32)
    parts = {
        "visual": glm_image.GlmImageVisionModel(vision).eval(),
        "vqmodel": glm_image.GlmImageVQVAE(vq).eval(),
    }
    torch.nn.init.normal_(parts["vqmodel"].quantize.embedding.weight)
    state = {
        f"model.{p}.{n}": x for p, model in parts.items() for n, x in model.state_dict().items()
    }
    config = {"model_type": "glm_image", "vision_config": vision.to_dict()}
    save(tmp_path, state, {**config, "vq_config": vq.to_dict()})
    return parts


@torch.no_grad()
def test_glm_image_sees_through_its_vision_transformer(tmp_path):
    parts = glm(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    image, rows, columns = picture()[:, :, :8], 2, 4
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    patches = torch.nn.functional.unfold((image - mean) / std, 4, stride=4).transpose(1, 2)
    grids = torch.tensor([[1, rows, columns]] * 2)
    features = parts["visual"](patches.flatten(0, 1), grid_thw=grids).last_hidden_state
    features = features.view(2, rows, columns, -1).permute(0, 3, 1, 2)
    want = parts["vqmodel"].encode(features).image_tokens.view(2, rows, columns)
    assert torch.equal(tokenizer.encode(image), want) and len(want.unique()) > 2
    assert tokenizer.traits.low[0] == pytest.approx(-0.48145466 / 0.26862954)
    with pytest.raises(TokenizerError, match="diffusion half turns into pixels"):
        tokenizer.decode(want)


def test_glm_image_without_its_eyes(tmp_path):
    model = glm(tmp_path / "x")["vqmodel"]
    save(tmp_path / "y", model.state_dict(), model.config.to_dict())
    with pytest.raises(TokenizerError, match="pass its vision transformer"):
        load_tokenizer(tmp_path / "y")


def test_emu3_as_its_authors_write_it(tmp_path):
    """Their names, written down apart from the loader: convolutions of one pixel in attention."""
    model, _ = make("emu3")
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("down_block.", "").replace("up_block.", "")
        name = re.sub(r"attn_norms\.(\d+)", r"attn.\1.norm", name)
        name = name.replace("attn_norm.", "attn_1.norm.").replace("middle_block", "mid")
        for part in "qkv":
            name = name.replace(f"{part}_proj", part)
        name = name.replace("out_proj", "proj_out")
        linear = re.search(r"\.(q|k|v|proj_out)\.weight$", name)
        state[name] = tensor[:, :, None, None].contiguous() if linear else tensor
    assert "decoder.up.1.attn.0.norm.conv_y.weight" in state
    assert "encoder.mid.attn_1.norm.weight" in state
    save_file(state, tmp_path / "emu3.safetensors")
    tokenizer = load_tokenizer(tmp_path / "emu3.safetensors")
    ids, again = theirs("emu3", model, picture())
    assert torch.equal(tokenizer.encode(picture()), ids) and len(ids.unique()) > 3
    want = ((again + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(ids), want, rtol=1e-4, atol=1e-5)
    save(tmp_path / "folder", state, {"model_type": "Emu3VisionVQ"})
    assert load_tokenizer(tmp_path / "folder").fingerprint == tokenizer.fingerprint


def llamagen(state):
    """transformers' names to LlamaGen's: written down apart from the loader."""
    found = {}
    for name, tensor in state.items():
        name = re.sub(
            r"^(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.", r"\1.conv_blocks.\2.res.", name
        )
        name = re.sub(r"^(encoder|decoder)\.(?:down|up)\.", r"\1.conv_blocks.", name)
        for i, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f".mid.{part}.", f".mid.{i}.")
        found[name] = tensor
    return found


@pytest.mark.parametrize("prefix", ["", "gen_vision_model."])
def test_llamagen_and_janus_as_their_authors_write_them(tmp_path, prefix):
    model, _ = make("janus")
    state = {prefix + name: tensor for name, tensor in llamagen(model.state_dict()).items()}
    state[prefix + "quantize.codebook_used"] = torch.zeros(65536)
    state["language_model.x" if prefix else "quantize.codebook_used"] = torch.zeros(2)
    torch.save({"model": state}, tmp_path / "vq.pt")
    tokenizer = convert(tmp_path / "vq.pt", tmp_path / "vq.safetensors")
    ids, again = theirs("janus", model, picture())
    assert tokenizer.traits.family == "llamagen"
    assert torch.equal(tokenizer.encode(picture()), ids)
    want = ((again + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(ids), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(load_tokenizer(tmp_path / "vq.safetensors").encode(picture()), ids)


def test_longer_codes_choose_the_same_ids(tmp_path):
    """LlamaGen compares angles; transformers' Janus lengths too, which it never trained on."""
    model, _ = make("janus")
    state = llamagen(model.state_dict())
    save_file(state, tmp_path / "a.safetensors")
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"] * torch.rand(60, 1).add(
        1
    )
    save_file(state, tmp_path / "b.safetensors")
    a, b = (load_tokenizer(tmp_path / f"{name}.safetensors") for name in "ab")
    assert torch.equal(a.encode(picture()), b.encode(picture()))


def test_what_does_not_fit(tmp_path):
    model, _ = make("chameleon")
    config = model.config.to_dict()
    save(tmp_path / "x", model.state_dict(), {**config, "embed_dim": 8})
    with pytest.raises(TokenizerError, match="weights do not fit a ChameleonVQVAE"):
        load_tokenizer(tmp_path / "x")
    save(tmp_path / "x", {"a": torch.zeros(2)}, config)
    with pytest.raises(TokenizerError, match=r"must have quantize\.embedding\.weight, found none"):
        load_tokenizer(tmp_path / "x")
    save(tmp_path / "x", model.state_dict(), {**config, "model_type": "Emu3VisionVQ"})
    with pytest.raises(TokenizerError, match=r"emu3: config\.json has model_type Emu3VisionVQ"):
        load_tokenizer(tmp_path / "x")
    save_file({"a": torch.zeros(2)}, tmp_path / "x" / "second.safetensors")
    with pytest.raises(TokenizerError, match="or parts and their index, found 2 files"):
        load_tokenizer(tmp_path / "x")
