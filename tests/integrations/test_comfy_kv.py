"""Proxies for ComfyUI's KV caches, without ComfyUI: slices, what is measured, the report."""

import json

import pytest
import torch

from sage_diffusion.integrations.comfy import causal_wan
from sage_diffusion.integrations.comfy.kv import (
    Memory,
    Newest,
    References,
    Settings,
    text_cache,
    video_caches,
)
from sage_diffusion.integrations.comfy.kv_report import bars, difference, size, text_of
from sage_diffusion.kv.methods.kivi import Kivi

FRAME = 16


def video(method="lossless", memory=None, **more):
    """A layer's dict of a video of ten frames, as ComfyUI's attention sees it."""
    memory = Memory() if memory is None else memory
    make = video_caches(Settings(method, **more), memory, layers=1, heads=2, head_dim=32)
    return make(1, 10 * FRAME, "cpu", torch.float32)[0]


def attend(cache, seed):
    """What ``CausalWanSelfAttention`` does with a block's K and V; the K that was written."""
    random = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, FRAME, 2, 32, generator=random) for _ in "kv")
    end = cache["end"]
    cache["k"][:, end : end + FRAME] = k
    cache["v"][:, end : end + FRAME] = v
    cache["end"] = end + FRAME
    read = cache["k"][:, : end + FRAME], cache["v"][:, : end + FRAME]
    for side in read:
        side.view(1, end + FRAME, 64)  # ComfyUI flattens the heads
    return k, read


def test_what_is_written_is_read_through_rewinds():
    cache = video()
    first, _ = attend(cache, 0)
    attend(cache, 1)
    cache["end"] -= FRAME
    second, (keys, _) = attend(cache, 2)
    assert torch.equal(keys, torch.cat([first, second], 1))
    assert cache["k"].shape == (1, 160, 2, 32) and cache["end"] == 2 * FRAME


def test_blocks_are_compressed_when_they_have_left_the_newest():
    memory = Memory()
    cache = video(Kivi(4, 4, 16), memory)
    written = [attend(cache, seed)[0] for seed in range(5)]
    _, (keys, _) = attend(cache, 5)
    exact = [torch.equal(keys[:, i * FRAME : (i + 1) * FRAME], written[i]) for i in range(5)]
    assert exact == [True, False, False, False, True]
    assert memory.host == 2 * 10 * FRAME * 64 * 4
    assert memory.parts["sink"] == 2 * FRAME * 64 * 4 and memory.parts["k.codes"] > 0
    assert memory.tokens == 6 * FRAME and memory.kept < memory.peak


def test_a_rewind_forgets_blocks_beyond_the_window():
    cache = video(window=3 * FRAME)
    written = []
    for seed in range(6):
        attend(cache, 100 + seed)
        cache["end"] -= FRAME
        k, (keys, _) = attend(cache, seed)
        written.append(k)
    assert torch.equal(keys, torch.cat([written[0], *written[4:]], 1))


def test_a_slice_that_the_proxy_does_not_know_is_refused():
    cache = video()
    k, _ = attend(cache, 0)
    with pytest.raises(TypeError, match="along its tokens only"):
        cache["k"][:, :, 0]
    with pytest.raises(TypeError, match="read and written by slices"):
        cache["k"][:, 3]
    with pytest.raises(ValueError, match="read from its first token"):
        cache["k"][:, 4:16]
    with pytest.raises(ValueError, match="K must be written before V"):
        cache["v"][:, 0:FRAME] = k
    cache["k"][:, 99:115] = k
    with pytest.raises(ValueError, match="has 16 tokens, the next must be written there"):
        cache["v"][:, 99:115] = k


def entries(batch, length, device, dtype):
    """A cache of four kinds of layers: whole, linear, shared, and one that is an object."""
    whole = torch.empty(batch, 2, length, 32, dtype=dtype)
    state = torch.zeros(batch, 5)
    return [(whole, whole.clone(), 0), (state, state, 0), (), object()]


def test_layers_that_are_no_pair_of_tensors_stay():
    memory = Memory()
    found = text_cache(entries, Settings(), memory, ())(1, 1000, "cpu", torch.float32)
    assert memory.layers == 1 and found[0][0].shape == (1, 2, 1000, 32)
    assert isinstance(found[1][0], torch.Tensor) and found[2] == ()
    assert memory.left == {
        "the state of a linear layer": 1,
        "grows by itself, or is another layer's": 1,
        "object is read without slices": 1,
    }
    assert memory.host == 2 * 2 * 1000 * 32 * 4


def test_text_keeps_sink_and_newest_exact():
    memory = Memory()
    make = text_cache(entries, Settings("k4v4"), memory, ())
    k_side, v_side, _ = make(1, 400, "cpu", torch.float32)[0]
    k = torch.randn(1, 2, 300, 32, generator=torch.Generator().manual_seed(0))
    for start in range(300):
        k_side[:, :, start : start + 1] = k[:, :, start : start + 1]
        v_side[:, :, start : start + 1] = k[:, :, start : start + 1]
    read = k_side[:, :, :300]
    assert torch.equal(read[:, :, :32], k[:, :, :32])
    assert torch.equal(read[:, :, -128:], k[:, :, -128:])
    error = (read - k).norm() / k.norm()
    assert 0 < error < 0.1
    assert k_side[:, :, :300].data_ptr() == read.data_ptr()


def test_newest_is_a_window_that_can_begin_again():
    layer = Newest(4)
    k = torch.arange(10.0).view(1, 1, 10, 1)
    layer.append(k, -k)
    layer.append(k[:, :, :1], -k[:, :, :1])
    assert layer.read()[0].flatten().tolist() == [7, 8, 9, 0] and layer.tokens == 11
    layer.crop(10)
    assert layer.read()[1].flatten().tolist() == [-7, -8, -9]
    with pytest.raises(ValueError, match="takes one token at a time, got 2"):
        layer.append(k[:, :, :2], k[:, :, :2])
    with pytest.raises(ValueError, match="can't go back by 3 tokens"):
        layer.crop(7)
    assert layer.tokens == 10


def test_references_are_written_once_and_read_often():
    memory = Memory()
    cache = References(Settings("k8v8"), memory)
    k, v = (torch.randn(1, 2, 96, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert len(cache) == 0 and "double_0" not in cache
    cache["double_0"], cache["double_1"] = (k, v), (v, k)
    assert 0 < memory.kept == memory.peak < memory.host  # a run of one step ends here
    for _ in range(2):
        for name, want in (("double_0", (k, v)), ("double_1", (v, k))):
            for found, side in zip(cache[name], want, strict=True):
                assert 0 < (found - side).norm() / side.norm() < 0.01
    assert list(cache) == ["double_0", "double_1"] and memory.layers == 2
    assert memory.kept < memory.host
    host, kept = memory.host, memory.kept
    cache["double_0"] = (k, v)  # again: what it replaces is gone
    assert len(cache["double_0"]) == 2 and (memory.layers, memory.host) == (2, host)
    assert memory.kept == kept
    del cache["double_0"]
    assert list(cache) == ["double_1"] and (memory.layers, memory.host) == (1, host // 2)
    cache["double_1"]
    assert memory.kept == kept // 2


def test_references_of_a_run_are_reported_until_another_begins():
    memory = Memory()
    k = torch.randn(1, 2, 96, 32, generator=torch.Generator().manual_seed(0))
    cache = References(Settings("k8v8"), memory)
    cache["double_0"] = cache["double_1"] = (k, k)
    cache["double_1"]
    kept = memory.kept
    cache = References(Settings("k8v8"), memory)  # the run is over
    assert (memory.layers, memory.kept) == (2, kept) and kept > 0
    cache.begin()
    assert memory == Memory()
    cache["double_0"] = (k, k)
    cache.begin()  # its second step
    cache["double_0"]
    assert (memory.layers, memory.kept) == (1, kept // 2)


def test_the_bundled_video_model_becomes_a_checkpoint(tmp_path, capsys):
    out = tmp_path / "video.safetensors"
    causal_wan.main([str(out)])
    assert out.stat().st_size > 1e6
    assert f"wrote {out}: put it into" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        causal_wan.main([str(out), "--transformer", str(tmp_path / "none")])
    assert "there is no folder" in capsys.readouterr().err


def test_the_report_says_what_was_measured():
    memory = Memory()
    assert text_of(memory).startswith("WARNING: no run has used this KV cache yet")
    cache = video(Kivi(4, 4, 16), memory)
    for seed in range(8):
        attend(cache, seed)
    memory.left["the state of a linear layer"] = 3
    text = text_of(memory)
    assert f"{size(memory.peak)} at its peak instead of {size(memory.host)}" in text
    assert f"{memory.peak / memory.host:.2f}x as much" in text  # a single layer, decoded once more
    assert "left as it is: 3 x the state of a linear layer" in text
    less = text_of(Memory(host=1 << 20, layers=2, tokens=9, kept=1 << 18, peak=1 << 19))
    assert "512.0 KiB at its peak instead of 1.0 MiB, 2.0x smaller" in less
    data = json.loads(json.dumps(memory.to_dict()))
    assert data["parts"]["sink"] > 0 and data["left"] == {"the state of a linear layer": 3}
    assert data["peak"] == memory.peak
    picture = bars(memory)
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.shape[2] == 640
    assert picture.min() >= 0 and picture.max() == 1 and picture.std() > 0.1
    sizes = [size(n) for n in (5, 2048, 3 * 2**20, 2**31)]
    assert sizes == ["5 B", "2.0 KiB", "3.0 MiB", "2.0 GiB"]


def test_a_run_begins_with_an_empty_memory():
    memory = Memory()
    make = video_caches(Settings("lossless"), memory, layers=2, heads=2, head_dim=32)
    attend(make(1, 4 * FRAME, "cpu", torch.float32)[0], 0)
    assert memory.kept > 0
    make(1, 2 * FRAME, "cpu", torch.bfloat16)
    assert memory.kept == 0 and memory.host == 2 * 2 * 2 * FRAME * 64 * 2


@pytest.mark.parametrize("name", ["sink", "recent", "window"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be -1 or more, got -2"):
        Settings("k4v4", **{name: -2})
    with pytest.raises(ValueError, match="preset must be one of"):
        Settings("best")


def test_two_runs_are_compared_by_time():
    exact = torch.rand(1, 16, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    found = exact.clone()
    found[:, :, 2:4] *= 1.01
    found[:, :, 6:] *= 2
    got = difference({"samples": found}, {"samples": exact})
    assert got.frames == 2 and got.decibels[0] == got.decibels[2] == float("inf")
    assert got.decibels[1] == pytest.approx(40, abs=0.01)
    assert got.decibels[3] == pytest.approx(0, abs=1e-3)
    assert "by 2 frames: equal, 40.0 dB, equal, 0.0 dB" in str(got)
    assert json.loads(json.dumps(got.to_dict()))["decibels"][2] is None
    assert got.picture.shape == (1, 12, 24, 3) and 0 <= got.picture.min() < got.picture.max() <= 1
    assert got.picture[0, 8:, :6].max() == 0 < got.picture[0, 8:, 18:].max()  # 4 x the difference


def test_pictures_are_compared_against_their_range():
    exact = torch.full((3, 5, 7, 3), 0.25)
    got = difference(exact + 0.1, exact)
    assert got.frames == 1 and got.decibels == pytest.approx((20, 20, 20), abs=1e-3)
    assert torch.equal(got.picture[0, :5], exact.transpose(0, 1).flatten(1, 2))
    torch.testing.assert_close(got.picture[0, 10:], torch.full((5, 21, 3), 0.4))
    for other in (exact[:2], {"samples": exact}, "text"):
        with pytest.raises(ValueError, match="must be"):
            difference(exact, other)
