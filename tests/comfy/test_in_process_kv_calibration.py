"""Language models of ComfyUI calibrated and compared, without a server."""

from __future__ import annotations

import pytest
import torch
from test_in_process_kv import Clip, language_model, settings


class TextClip(Clip):
    """A CLIP whose tokens are its text's letters, and which generates as ComfyUI's does."""

    def clone(self):
        return TextClip(self.cond_stage_model, self.patcher.clone())

    def tokenize(self, text, **options):
        return torch.tensor([[ord(letter) % 97 for letter in text]])

    def decode(self, ids):
        return "".join(chr(33 + number) for number in ids)

    def generate(self, tokens, **options):
        self.patcher.patch_model()
        try:
            model = self.cond_stage_model.transformer
            embeds = model.model.embed_tokens(tokens)
            return model.generate(embeds, stop_tokens=[], **options)
        finally:
            self.patcher.unpatch_model()


def text(length, seed):
    """Letters with habits: each follows from the one before, mostly."""
    random = torch.Generator().manual_seed(seed)
    found = [33]
    for step in torch.randint(0, 8, (length - 1,), generator=random).tolist():
        found.append(33 + (found[-1] * 3 + step) % 60)
    return "".join(map(chr, found))


def clip_of(kind):
    holder = torch.nn.Module()
    holder.transformer = language_model(kind)
    return TextClip(holder)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def calibrated(request):
    from sage_diffusion.integrations.comfy.kv_calibration import calibrate_clip

    clip = clip_of(request.param)
    return clip, calibrate_clip(clip, text(420, 1))


def test_rope_undoes_itself_and_is_the_models(calibrated):
    from sage_diffusion.integrations.comfy.kv_inside import rope_of, sliding, states, watched

    module = calibrated[0].cond_stage_model.transformer
    full = sliding(module).index(0)
    attention = module.model.layers[full].self_attn
    found, normed = {}, []
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: normed.append(kwargs["hidden_states"]), with_kwargs=True
    )
    embeds = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    with watched(module, lambda number, q, k, v: found.update({number: k})):
        states(module, embeds)
    handle.remove()
    want = attention.k_proj(normed[0]).view(1, 20, 2, 32).transpose(1, 2)
    want = want if attention.k_norm is None else attention.k_norm(want)
    back = rope_of(module).rotate(found[full], torch.arange(20)[None], inverse=True)
    assert (back - want).abs().max() < 1e-4


def test_a_calibration_covers_the_layers_that_see_everything(calibrated):
    clip, made = calibrated
    kind = clip.cond_stage_model.transformer.model.config.transformer_type
    assert made.layers == ((1, 3) if kind == "gemma3" else (0, 1, 2, 3))
    assert made.about["tokens"] == 420 and made.tensors["k.mean"].shape == (len(made.layers), 64)


def test_more_bits_predict_better(calibrated):
    from sage_diffusion.integrations.comfy.kv_calibration import compare_predictions
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip
    from sage_diffusion.kv.methods.calibrated import Calibrated

    clip, made = calibrated
    found = []
    for method in ("lossless", Calibrated(3.4, 4, 32), Calibrated(1.25, 3, 32)):
        given = settings(method, sink=8, recent=32, calibration=made)
        compressed = compress_clip(clip, given)
        found.append(compare_predictions(compressed, text(300, 2), scored=8).kl)
        assert compressed.memory.kept == 0  # what it says of the run before stays
    assert abs(found[0]) < 1e-7 < found[1] < found[2]


def test_it_is_compressed_anew_while_an_older_copy_is_loaded(calibrated):
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip

    clip, _ = calibrated
    first = compress_clip(clip, settings("k4v4", sink=8, recent=8))
    first.host.patcher.patch_model()
    try:
        second = compress_clip(clip, settings("k2v2", sink=8, recent=8))
    finally:
        first.host.patcher.unpatch_model()
    second.host.write(prompt=100, length=4)
    assert second.memory.layers == 4 and not second.memory.left


def test_a_second_compression_takes_the_place_of_the_first(calibrated):
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip

    first = compress_clip(calibrated[0], settings("k4v4", sink=8, recent=8))
    second = compress_clip(first.host, settings("k2v2", sink=8, recent=8))
    second.host.write(prompt=100, length=4)
    assert second.memory.layers == 4 and not second.memory.left and not first.memory.layers


def test_what_does_not_fit_is_refused(calibrated):
    from sage_diffusion.integrations.comfy.kv_calibration import (
        calibrate_clip,
        compare_predictions,
    )
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip
    from sage_diffusion.kv.calibration import CalibrationError

    clip, made = calibrated
    with pytest.raises(ValueError, match="needs a calibration of this language model"):
        compress_clip(clip, settings("calibrated-2.25"))
    with pytest.raises(ValueError, match="sees no queries"):
        compress_clip(clip, settings("calibrated-1.8", calibration=made))
    with pytest.raises(CalibrationError, match="at least 288 tokens, it has 30"):
        calibrate_clip(clip, text(30, 1))
    with pytest.raises(ValueError, match="more than 65 tokens, it has 60"):
        compare_predictions(compress_clip(clip, settings()), text(60, 1))
    other = clip_of("llama")
    torch.nn.init.ones_(other.cond_stage_model.transformer.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(CalibrationError, match="must be of this model"):
        compress_clip(other, settings("calibrated-2.25", calibration=made))


@pytest.fixture
def nodes_alone(monkeypatch, tmp_path):
    """The nodes without a server, their folder a fresh one."""
    from types import SimpleNamespace

    import folder_paths
    from server import PromptServer

    from sage_diffusion.nodes import kv_calibration

    monkeypatch.setattr(PromptServer, "instance", None, raising=False)
    for name in ("KVCalibrate", "SaveKVCalibration", "LoadKVCalibration"):
        node = getattr(kv_calibration, name)
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None), raising=False)
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "kv_calibrations", ([str(tmp_path)], {".safetensors"}))
    return kv_calibration


def test_nodes_measure_keep_and_read(nodes_alone, tmp_path):
    clip = clip_of("llama")
    made, about = nodes_alone.KVCalibrate.execute(clip, text(300, 1)).args
    assert about == f"Model {made.fingerprint}: 4 layers, 300 tokens, without gradients"
    (path,) = nodes_alone.SaveKVCalibration.execute(made, "mine/llama", False).args
    assert path == str(tmp_path / "mine" / "llama.safetensors")
    name = nodes_alone.LoadKVCalibration.define_schema().inputs[0].options[0]
    again, text_of_it = nodes_alone.LoadKVCalibration.execute(name).args
    assert text_of_it == about and again.tensors.keys() == made.tensors.keys()
    before = nodes_alone.LoadKVCalibration.fingerprint_inputs(name)
    nodes_alone.SaveKVCalibration.execute(made, "mine/llama.safetensors", True)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["llama.safetensors"]
    assert nodes_alone.LoadKVCalibration.fingerprint_inputs(name) != before


def test_nodes_replace_nothing_else(nodes_alone, calibrated, tmp_path):
    from sage_diffusion.kv.calibration import CalibrationError

    (tmp_path / "other.safetensors").write_text("not one")
    save = nodes_alone.SaveKVCalibration.execute
    with pytest.raises(ValueError, match="exists: set overwrite"):
        save(calibrated[1], "other", False)
    with pytest.raises(CalibrationError, match="must be a safetensors file"):
        save(calibrated[1], "other", True)
    assert (tmp_path / "other.safetensors").read_text() == "not one"
    for name in ("", ".safetensors", "folder/", "../outside"):
        with pytest.raises(ValueError, match="must be a file's inside models/kv_calibrations"):
            save(calibrated[1], name, True)
    with pytest.raises(ValueError, match="no calibration named 'gone'"):
        nodes_alone.LoadKVCalibration.execute("gone")
    assert nodes_alone.LoadKVCalibration.fingerprint_inputs("gone") == []
