"""Token nodes inside ComfyUI, without a server."""

from __future__ import annotations

import pytest
import torch


class FailingTokenizer:
    """Remembers where it was sent, and can do nothing."""

    def __init__(self):
        self.sent = []

    def to(self, device):
        self.sent.append(device)
        return self

    def decode(self, ids):
        raise RuntimeError("out of memory")


class AnyTokens:
    """Tokens of whoever asks."""

    ids = torch.zeros(1, 2, 2, dtype=torch.long)

    def check(self, tokenizer):
        """They fit."""


def test_a_tokenizer_that_fails_does_not_stay_on_the_card(monkeypatch, families):
    import comfy.model_management as management

    from sage_diffusion.nodes.vq import VQDecode

    monkeypatch.setattr(management, "vae_device", lambda: "card")
    monkeypatch.setattr(management, "vae_offload_device", lambda: "off")
    tokenizer = FailingTokenizer()
    with pytest.raises(RuntimeError, match="out of memory"):
        VQDecode.execute(tokenizer, AnyTokens())
    assert tokenizer.sent == ["card", "off"]


def test_stage_a_searches_in_a_copy_and_says_what_it_saved(monkeypatch, families):
    from comfy.ldm.cascade.stage_a import VectorQuantize

    from sage_diffusion.nodes import vq_search

    class Model:
        """As a VAE holds its network."""

        def __init__(self):
            torch.manual_seed(0)
            self.first_stage_model = torch.nn.Sequential(
                torch.nn.Identity(), VectorQuantize(4, 500)
            )
            self.first_stage_model.requires_grad_(False)

    shown = []
    monkeypatch.setattr(vq_search, "show", lambda node, text: shown.append(text))
    monkeypatch.setattr(vq_search.VQSearch, "hidden", type("Hidden", (), {"unique_id": "7"}))
    model = Model()
    made, text = vq_search.VQSearch.execute(model, True).args
    assert text == "1 quantizers search: first_stage_model.1"
    mine, theirs = made.first_stage_model[1], model.first_stage_model[1]
    assert mine.codebook is theirs.codebook and mine is not theirs
    x = torch.randn(2, 4, 9, 9) / 500
    want, got = theirs(x, dim=1), mine(x, dim=1)
    assert torch.equal(got[2], want[2]) and torch.equal(got[0], want[0])
    assert shown[-1].startswith(f"{text}\npeak memory of 1 quantizer calls: ")
    assert shown[-1].endswith("the same ids")
    mine(x, dim=1)
    assert len(shown) == 2


def test_a_file_that_was_written_in_place_is_read_anew(tmp_path, monkeypatch, families):
    """A folder's own time does not change when a file in it does."""
    import os

    from sage_diffusion.nodes import vq, vq_fill

    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    file = folder / "unet" / "config.json"
    file.write_text("{}")
    monkeypatch.setattr(vq, "tokenizer_path", lambda name: folder)
    monkeypatch.setattr(vq_fill, "fill_path", lambda name: folder)

    def seen():
        return (
            vq.LoadVQTokenizer.fingerprint_inputs("model"),
            vq_fill.VQFill.fingerprint_inputs(model="model", seed=3),
        )

    before, times = seen(), folder.stat()
    assert before == seen()
    file.write_text("[]")
    os.utime(file, ns=(1, 1))
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = seen()
    assert after[0] != before[0] and after[1] != before[1]

    def missing(name):
        raise ValueError(name)

    monkeypatch.setattr(vq_fill, "fill_path", missing)
    assert vq_fill.VQFill.fingerprint_inputs(model="gone") == []
