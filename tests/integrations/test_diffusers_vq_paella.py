"""Stable Cascade's stage A through diffusers' PaellaVQModel."""

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.tokenizer import TokenizerError


def model():
    torch.manual_seed(0)
    made = PaellaVQModel(levels=2, bottleneck_blocks=3, embed_dim=16, num_vq_embeddings=60).eval()
    torch.nn.init.normal_(made.vquantizer.embedding.weight)
    for name, parameter in made.named_parameters():
        if name.endswith("gammas"):  # zeros would hide the blocks
            torch.nn.init.normal_(parameter)
    return made


def picture():
    return torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["folder", "file of Stability"])
def test_ids_and_pictures_are_the_librarys(tmp_path, kind):
    vq, path = model(), tmp_path
    if kind == "folder":
        vq.save_pretrained(path)
    else:
        state, path = vq.state_dict(), tmp_path / "stage_a.safetensors"
        state["vquantizer.codebook.weight"] = state.pop("vquantizer.embedding.weight")
        save_file(state, path)
    tokenizer = load_tokenizer(path)
    with torch.no_grad():
        quantized, _, (_, _, ids) = vq.vquantizer(vq.encode(picture()).latents)  # in 0 .. 1
        ids, want = ids.view(2, 4, 3), vq.decode(quantized).sample
        forward = tokenizer(picture())[0]
    assert torch.equal(tokenizer.encode(picture()), ids) and len(ids.unique()) > 3
    decoded = tokenizer.decode(ids)
    torch.testing.assert_close(decoded, want.clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(decoded, forward.clamp(0, 1))
    assert (tokenizer.traits.family, tokenizer.traits.factor) == ("stable-cascade-a", 4)


def test_weights_that_do_not_fit(tmp_path):
    state = model().state_dict()
    state["up_blocks.1.gammas"] = torch.zeros(5)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(TokenizerError, match="weights do not fit a PaellaVQModel"):
        load_tokenizer(tmp_path / "x.safetensors")
