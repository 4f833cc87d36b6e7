"""Emu3 and Janus, tiny and random: tokens to ids, edited, to pixels."""

import pytest
import torch

pytest.importorskip("transformers.models.emu3")
pytest.importorskip("transformers.models.janus")

from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
)

from sage_diffusion.integrations.transformers.bridges import picture, picture_ids
from sage_diffusion.vq.tokenizer import TokenizerError

TEXT = {
    "vocab_size": 120, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
VQ = {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 2]}


def emu3():
    names = {f"<|visual token {i:06d}|>": 40 + i for i in range(60)}
    names |= {"<|extra_200|>": 101, "<image>": 102}
    config = Emu3Config(
        vq_config={**VQ, "codebook_size": 60, "attn_resolutions": [1], "hidden_size": 64},
        text_config={**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vocabulary_map=names,
    )
    torch.manual_seed(0)
    return Emu3ForConditionalGeneration(config).eval()


def janus():
    config = JanusConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 2, "projection_dim": 16, "num_image_tokens": 16,
        },
        vq_config={
            **VQ, "num_embeddings": 60, "embed_dim": 4, "latent_channels": 8,
            "projection_dim": 16, "image_token_embed_dim": 16,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    return JanusForConditionalGeneration(config).eval()


def test_emu3_through_its_words():
    model = emu3()
    words = torch.randint(40, 100, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([words, torch.full((2, 4, 1), 101)], dim=2).flatten(1)
    tokens = torch.cat([rows, torch.tensor([[7, 8, 9]] * 2)], dim=1)
    ids = picture_ids(model, tokens, 4, 6)
    assert torch.equal(ids, words - 40)
    with torch.no_grad():
        want = model.decode_image_tokens(image_tokens=tokens, height=4, width=6)
    assert torch.equal(picture(model, ids), ((want + 1) / 2).clamp(0, 1))
    ids[:, 1, 2] = 0
    edited = picture(model, ids)
    assert edited.shape == (2, 3, 8, 12)
    assert not torch.equal(edited, ((want + 1) / 2).clamp(0, 1))
    with pytest.raises(TokenizerError, match=r"grid of 4 x 5 must be \[B, 27\], got \(2, 31\)"):
        picture_ids(model, tokens, 4, 5)
    with pytest.raises(TokenizerError, match="ids must be 0 to 59, got"):
        picture(model, ids + 40)


def test_janus():
    model = janus()
    tokens = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    ids = picture_ids(model, tokens, 4, 4)
    assert ids.shape == (2, 4, 4) and torch.equal(ids.flatten(1), tokens)
    with torch.no_grad():
        want = ((model.decode_image_tokens(tokens) + 1) / 2).clamp(0, 1).permute(0, 3, 1, 2)
    assert torch.equal(picture(model, ids), want)
    ids = ids.clone()
    ids[:, 1, 2] = (ids[:, 1, 2] + 1) % 60
    assert picture(model, ids).shape == (2, 3, 8, 8)
    assert not torch.equal(picture(model, ids), want)
    with pytest.raises(TokenizerError, match=r"must be \[B, 12\], got \(2, 16\)"):
        picture_ids(model, tokens, 3, 4)
    with pytest.raises(TokenizerError, match="ids must be integers"):
        picture(model, ids.float())
