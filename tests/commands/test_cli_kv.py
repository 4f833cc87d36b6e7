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


def test_an_empty_text_is_said(model, written, capsys):
    written.write_text("")
    assert main(["kv", "report", str(model), "--text", str(written)]) == 1
    assert "must have some text, it is empty" in capsys.readouterr().err


class Letters:
    """A tokenizer that the tiny model is given."""

    def __call__(self, text, **kwargs):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 97 for letter in text]]))


@pytest.fixture
def written(model, tmp_path, monkeypatch):
    from sage_diffusion.integrations.transformers import loading

    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda path: (load(path)[0], Letters()))
    text = tmp_path / "text"
    text.write_text("".join(chr(32 + i * i % 91) for i in range(900)))
    return text


def test_calibrated_on_one_text_and_judged_on_another(model, written, tmp_path, capsys):
    out = tmp_path / "kv.safetensors"
    given = ["kv", "calibrate", str(model), "--text", str(written), "--out", str(out), "--json"]
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == out.stat().st_size and found["about"]["tokens"] == 900
    assert "matryoshka" not in found["about"]
    report = ["kv", "report", str(model), "--preset", "matryoshka", "--tokens", "300", "--json"]
    assert main(report) == 1
    assert "needs a calibration of the model" in capsys.readouterr().err
    assert main([*report, "--calibration", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "matryoshka"
    bench = ["kv", "bench", str(model), "--text", str(written), "--calibration", str(out)]
    bench += ["--tokens", "512", "--scored", "999", "--preset", "lossless", "--preset", "k4v4"]
    assert main([*bench, "--preset", "calibrated-2.25", "--json"]) == 1  # heads of 32 channels
    assert "groups of 64 channels must divide the head's 32" in capsys.readouterr().err
    assert main([*bench, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["presets"]
    assert found["scored"] == 900 - 513  # all that there are
    assert rows["lossless"]["kl"] < 1e-9 < rows["k4v4"]["kl"] and rows["k4v4"]["body_bits"] == 5


def test_rotations_are_trained_on_request(model, written, tmp_path, capsys):
    out = tmp_path / "kv.safetensors"
    given = ["kv", "calibrate", str(model), "--text", str(written), "--out", str(out)]
    assert main([*given, "--draws", "0", "--train", "1"]) == 0
    assert "rotations at half of the channels, KL on chunks left out" in capsys.readouterr().out
    from sage_diffusion.kv.calibration import Calibration

    assert "post.losses" in Calibration.load(out).tensors


def test_bench_refuses_what_it_cannot_judge(model, written, capsys, monkeypatch):
    given = ["kv", "bench", str(model), "--text", str(written), "--preset", "k4v4"]
    assert main(given) == 1
    assert "must have more than 3585 tokens, it has 900" in capsys.readouterr().err
    assert main([*given, "--preset", "k5v5"]) == 1
    assert "preset must be one of" in capsys.readouterr().err
    from sage_diffusion.integrations.transformers import kv_evaluate

    monkeypatch.setattr(kv_evaluate, "passage", None)  # before the text is read
    assert main([*given, "--preset", "matryoshka", "--tokens", "512"]) == 1
    assert "needs a calibration of the model" in capsys.readouterr().err


def test_a_conversion_says_what_it_costs(model, written, tmp_path, capsys):
    out = tmp_path / "transmla.safetensors"
    given = ["kv", "convert", str(model), "--text", str(written), "--judged", str(written)]
    given += ["--rank", "40", "--rope", "16", "--out", str(out), "--chunk", "300"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["numbers"] == 2 * 56 and found["before"] == 2 * 64
    assert 0 < found["partial"]["kl"] < found["whole"]["kl"] < 1
    assert found["bytes"] == out.stat().st_size
    assert main([*given, "--rope", "15"]) == 1
    assert "rope must be an even number" in capsys.readouterr().err
