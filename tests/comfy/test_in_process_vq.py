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
