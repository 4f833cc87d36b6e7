"""``benchmarks.kv_decode`` on one small layer."""

import pytest
import torch
from from_file import from_file

transformers = pytest.importorskip("transformers")

measure = from_file("benchmarks/kv_decode.py").measure


def test_every_cache_decodes_and_the_packed_ones_take_less():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    rows = measure(transformers.LlamaForCausalLM(config).eval(), tokens=2048, steps=1)
    assert {"exact", "fp8", "k8v8", "k4v4", "k3v2", "k2v2"} <= set(rows)
    assert all(row["milliseconds"] > 0 for row in rows.values())
    assert rows["exact"]["peak_share"] == 1
    assert rows["no past"]["peak_bytes"] < 0.2 * rows["exact"]["peak_bytes"]
    assert (
        rows["k2v2"]["peak_bytes"] < rows["k4v4"]["peak_bytes"] < 0.45 * rows["exact"]["peak_bytes"]
    )
