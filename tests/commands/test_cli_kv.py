"""``sage-diffusion kv`` on a tiny model of random weights."""

import json

import pytest
import torch

from sage_diffusion.cli import main

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_report_says_what_the_cache_takes(model, capsys):
    given = ["kv", "report", str(model), "--preset", "k4v4", "--tokens", "300", "--json"]
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 308 and found["layers"] == 2 and found["body_bits"] == 5
    assert found["bits_at"]["4096"] < found["bits"] < 32
    assert main(given[:-1]) == 0
    assert "k4v4: 2 layers compressed" in capsys.readouterr().out


def test_what_is_not_there_is_said(model, tmp_path, capsys):
    assert main(["kv", "report", str(tmp_path)]) == 1
    assert "must hold a config.json or one .gguf, it has 0" in capsys.readouterr().err
    text = tmp_path / "text"
    text.write_text("once upon a time")
    assert main(["kv", "report", str(model), "--text", str(text)]) == 1
    assert "must have a tokenizer to read a text" in capsys.readouterr().err
