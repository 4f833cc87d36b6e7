"""Compressed KV caches inside ComfyUI: causal Wan, language models, Flux KV Cache."""

from __future__ import annotations

import weakref

import pytest
import torch

HEADS, DIM, LAYERS, FRAME = 2, 32, 3, 16


@pytest.fixture(scope="module")
def wan():
    """A tiny causal Wan with ComfyUI's own classes."""
    import comfy.ops
    from comfy.ldm.wan.ar_model import CausalWanModel

    torch.manual_seed(0)
    model = CausalWanModel(
        dim=HEADS * DIM,
        ffn_dim=96,
        text_dim=16,
        num_heads=HEADS,
        num_layers=LAYERS,
        device="cpu",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    return randomized(model)


def randomized(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def settings(*args, **kwargs):
    from sage_diffusion.integrations.comfy.kv import Settings

    return Settings(*args, **kwargs)


def caches_of(wan, chosen, memory):
    from sage_diffusion.integrations.comfy.kv import video_caches

    return video_caches(chosen, memory, layers=LAYERS, heads=wan.num_heads, head_dim=wan.head_dim)


def rollout(wan, caches, blocks=4, steps=3):
    """As ComfyUI's AR sampler goes: every block denoised in steps that rewind, then written."""
    random = torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 16, generator=random)
    cross = wan.init_crossattn_caches(1, "cpu", torch.float32)
    found = []
    for block in range(blocks):
        x = torch.randn(1, 16, 1, 8, 8, generator=random)
        for step in range(steps + 1):
            time = torch.full((1, 1), 1000.0 * (1 - step / steps))
            x = x - 0.1 * (out := wan.forward_block(x, time, text, block, caches, cross))
            found.append(out)
            if step < steps:
                for cache in caches:
                    cache["end"] -= FRAME
    return torch.cat(found, 2)


def native(wan, blocks=4):
    return rollout(wan, wan.init_kv_caches(1, blocks * FRAME, "cpu", torch.float32), blocks)


def difference(found, want):
    return ((found - want).norm() / want.norm()).item()


def test_lossless_video_is_bit_equal(wan):
    from sage_diffusion.integrations.comfy.kv import Memory

    memory = Memory()
    caches = caches_of(wan, settings("lossless"), memory)(1, 4 * FRAME, "cpu", torch.float32)
    assert (rollout(wan, caches) - native(wan)).abs().max() == 0
    assert memory.host == LAYERS * 2 * 4 * FRAME * HEADS * DIM * 4
    assert memory.kept == memory.host
    assert memory.peak == memory.kept * (LAYERS + 1) // LAYERS and memory.tokens == 4 * FRAME


def test_int8_of_committed_blocks_with_rewinds(wan):
    from sage_diffusion.integrations.comfy.kv import Memory
    from sage_diffusion.kv.methods.kivi import Kivi

    chosen = settings(Kivi(8, 8, 16), sink=0, recent=0)
    memory = Memory()
    caches = caches_of(wan, chosen, memory)(1, 4 * FRAME, "cpu", torch.float32)
    error = difference(rollout(wan, caches), native(wan))
    assert 0 < error <= 2e-4
    assert memory.parts["k.codes"] > 0 and memory.layers == LAYERS


def test_fewer_bits_are_further_away_and_smaller(wan):
    from sage_diffusion.integrations.comfy.kv import Memory
    from sage_diffusion.kv.methods.video import Video

    found, want = [], native(wan, blocks=12)
    for bits in (8, 4, 2):
        memory = Memory()
        method = Video(bits, centroids=4, block=32, span=FRAME)
        caches = caches_of(wan, settings(method), memory)(1, 12 * FRAME, "cpu", torch.float32)
        error = difference(rollout(wan, caches, blocks=12), want)
        found.append((error, -memory.kept))
        assert memory.kept < memory.peak < memory.host
    assert found == sorted(found)


def test_a_window_forgets_the_oldest_blocks_and_keeps_the_first(wan):
    from sage_diffusion.integrations.comfy.kv import Memory

    memory = Memory()
    chosen = settings("lossless", window=3 * FRAME)
    caches = caches_of(wan, chosen, memory)(1, 8 * FRAME, "cpu", torch.float32)
    rollout(wan, caches, blocks=3)
    first = caches[0]["k"]._pair.layer.read()[0][:, :, :FRAME].clone()
    caches = caches_of(wan, chosen, memory)(1, 8 * FRAME, "cpu", torch.float32)
    rollout(wan, caches, blocks=8)
    layer = caches[0]["k"]._pair.layer
    assert caches[0]["end"] == layer.tokens == 3 * FRAME
    assert memory.tokens == 4 * FRAME  # a block's first step, before it rewinds
    assert torch.equal(layer.read()[0][:, :, :FRAME], first)


def language_model(kind):
    import comfy.ops
    from comfy.text_encoders import llama

    class Config(llama.Llama2Config):
        pass

    config = Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    config.head_dim = 32
    config.lm_head = False
    if kind == "gemma3":
        config.transformer_type = "gemma3"
        config.sliding_attention = [16, False]
        config.rope_theta = [10000.0, 1000000.0]
        config.rope_scale = [1.0, 1.0]
        config.q_norm = config.k_norm = "gemma3"
        config.rms_norm_add = True

    class Model(torch.nn.Module, llama.BaseLlama, llama.BaseGenerate):
        def __init__(self):
            super().__init__()
            self.num_layers = config.num_hidden_layers
            self.model = llama.Llama2_(
                config, device="cpu", dtype=torch.float32, ops=comfy.ops.disable_weight_init
            )

    torch.manual_seed(0)
    return randomized(Model())


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def writer(request):
    return language_model(request.param)


def write(model, length=40, prompt=50, **options):
    prompt = model.model.embed_tokens(torch.arange(prompt)[None] % 90 + 3)
    return model.generate(
        prompt,
        do_sample=False,
        max_length=length,
        stop_tokens=[],
        execution_dtype=torch.float32,
        **options,
    )


class Clip:
    """What of a CLIP the patch touches, with ComfyUI's own model patcher."""

    def __init__(self, model, patcher=None):
        import comfy.model_patcher

        self.cond_stage_model = model
        device = torch.device("cpu")
        self.patcher = patcher or comfy.model_patcher.ModelPatcher(model, device, device)

    def clone(self):
        return Clip(self.cond_stage_model, self.patcher.clone())

    def write(self, **options):
        self.patcher.patch_model()
        try:
            return write(self.cond_stage_model.transformer, **options)
        finally:
            self.patcher.unpatch_model()


@pytest.fixture
def clip(writer):
    holder = torch.nn.Module()
    holder.transformer = writer
    return Clip(holder)


def test_lossless_text_is_the_same(clip):
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip

    want = clip.write()
    found = compress_clip(clip, settings("lossless"))
    assert found.host.write() == want and found.kind == "text"
    memory = found.memory
    assert memory.layers == 4 and memory.tokens == 50 + 39
    assert memory.host == 4 * 2 * 2 * 90 * 32 * 4
    assert clip.write() == want  # the one given is as it was


def test_nothing_is_allocated_for_what_is_never_written(clip):
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip

    found = compress_clip(clip, settings("lossless"))
    found.host.patcher.patch_model()
    cache = clip.cond_stage_model.transformer.init_kv_cache(1, 10**9, "cpu", torch.float32)
    found.host.patcher.unpatch_model()
    assert cache[0][0].shape == (1, 2, 10**9, 32) and found.memory.kept == 0
    assert found.memory.host == 4 * 2 * 2 * 10**9 * 32 * 4


def test_sliding_layers_keep_their_window_only():
    from sage_diffusion.integrations.comfy.kv import Newest
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip

    holder = torch.nn.Module()
    holder.transformer = language_model("gemma3")
    clip = Clip(holder)
    found = compress_clip(clip, settings("lossless"))
    want = clip.write(length=30)
    assert found.host.write(length=30) == want
    assert found.memory.parts["window"] < found.memory.host / 2
    sliding = Newest(16)
    sliding.append(*(torch.randn(1, 2, 50, 32) for _ in "kv"))
    sliding.append(*(torch.randn(1, 2, 1, 32) for _ in "kv"))
    assert sliding.tokens == 51 and sliding.read()[0].shape[2] == 16
    with pytest.raises(ValueError, match="takes one token at a time, got 2"):
        sliding.append(*(torch.randn(1, 2, 2, 32) for _ in "kv"))
    with pytest.raises(ValueError, match="can't go back by 16 tokens"):
        sliding.crop(35)


def test_compressed_text_takes_less(clip):
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip

    found = compress_clip(clip, settings("k4v4", sink=8, recent=8))
    assert len(found.host.write(prompt=300, length=40)) == 40
    memory = found.memory
    assert memory.kept < 0.4 * memory.host and memory.parts["k.codes"] > 0


def test_what_has_no_cache_is_refused(clip, families):
    from sage_diffusion.integrations.comfy.kv_patch import compress_clip, compress_model

    with pytest.raises(ValueError, match="keeps no KV cache: it must be an autoregressive"):
        compress_model(families("sd3").model, settings())
    with pytest.raises(ValueError, match="generates no text"):
        compress_clip(Clip(torch.nn.Linear(2, 2)), settings())
    with pytest.raises(ValueError, match="preset must be one of"):
        settings("k9v9")
    with pytest.raises(ValueError, match="window must be -1 or more"):
        settings("k4v4", window=-2)


def patches_of(model):
    """Flux KV Cache's two patches of a MODEL."""
    patches = model.model_options["transformer_options"]["patches"]
    assert [len(patches[name]) for name in ("attn1_patch", "post_input")] == [1, 1]
    return patches["attn1_patch"][0], patches["post_input"][0]


def two_steps(model):
    """K and V that two blocks attend to in the step after the one with the references."""
    attention, inputs = patches_of(model)
    random = torch.Generator().manual_seed(4)
    found = []
    for length in (80, 16):
        picture = {
            "img": torch.zeros(1, 80, 8),
            "transformer_options": {"reference_image_num_tokens": [40, 24]},
        }
        assert inputs(picture)["img"].shape[1] == length
        for index in range(2):
            q, k, v = (torch.randn(1, 2, 4 + length, 32, generator=random) for _ in "qkv")
            options = {
                "block_type": "double",
                "block_index": index,
                "reference_image_num_tokens": [40, 24],
            }
            out = attention(q, k, v, options)
            assert out["k"].shape[2] == 84 and torch.equal(out["q"], q)
            found.append(torch.cat([out["k"], out["v"]], 1))
    return torch.stack(found)


def test_flux_references_are_kept_in_few_bits(families):
    from comfy_extras.nodes_flux import FluxKVCache

    from sage_diffusion.integrations.comfy.kv_patch import compress_model

    cached = FluxKVCache.execute(families("flux").model)[0]
    exact = compress_model(cached, settings("lossless"))
    small = compress_model(cached, settings("k8v8"))
    found, near = two_steps(exact.host), two_steps(small.host)
    assert len(patches_of(cached)[0].cache) == 0  # the one given is as it was
    want = two_steps(cached)
    assert torch.equal(found, want) and exact.kind == "references"
    assert torch.equal(near[:2], want[:2]) and 0 < difference(near, want) < 0.01
    assert small.memory.layers == 2 and small.memory.tokens == 64
    smaller = compress_model(small.host, settings("k4v4"))  # takes the place of k8v8
    two_steps(smaller.host)
    assert 0 < smaller.memory.kept < small.memory.kept
    attention, inputs = patches_of(small.host)
    of_the_run, reported = weakref.ref(attention.cache), small.memory.to_dict()
    attention.cleanup()  # as ComfyUI does when a run ends; the report comes after
    assert len(attention.cache) == 0 and of_the_run() is None
    assert small.memory.to_dict() == reported and small.memory.kept > 0
    inputs({"img": torch.zeros(1, 16, 8), "transformer_options": {}})  # without references
    assert small.memory.kept == small.memory.host == 0
    two_steps(small.host)
    assert small.memory.to_dict() == reported


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The pack's own causal video model through ComfyUI's loader."""
    import comfy.sd

    from sage_diffusion.integrations.comfy.causal_wan import BUNDLED, convert

    path = tmp_path_factory.mktemp("models") / "causal_video.safetensors"
    convert(BUNDLED, path)
    return comfy.sd.load_diffusion_model(str(path))


SEEN, CLIPS = 27, 2


def continued(model, clips):
    """The last pictures of clips that ComfyUI's AR sampler goes on with, ``[N, 3, 32, 32]``."""
    import comfy.sample
    import comfy.samplers
    import torch.nn.functional as F

    from sage_diffusion.kv.bouncing import FRAMES, render

    pictures = render(clips, SEEN)
    seen = F.pad(F.pixel_unshuffle(pictures, 2), (0, 0, 0, 0, 0, 4)).transpose(1, 2)
    space = model.model.latent_format
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["ar_config"] = {"initial_latent": space.process_out(seen)}
    noise = torch.randn(CLIPS, 16, FRAMES, 16, 16, generator=torch.Generator().manual_seed(3))
    prompt = [[torch.zeros(1, 1, 16), {}]]
    samples = comfy.sample.sample_custom(
        model,
        noise,
        1.0,
        comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 1}),
        torch.tensor([1.0, 0.5, 0.0]),
        prompt,
        prompt,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )
    last = space.process_in(samples.float())[:, :12, -1]
    return F.pixel_shuffle(last, 2)


def test_the_bundled_video_model_remembers_in_comfyuis_sampler(bundled, capsys):
    from sage_diffusion.integrations.comfy.kv_patch import compress_model
    from sage_diffusion.integrations.comfy.kv_report import text_of
    from sage_diffusion.kv.bouncing import FRAMES, sample_clips, vote

    clips = sample_clips(32, seed=2, split="test")
    clips = clips[(clips.hidden >= 3).nonzero()[:CLIPS, 0]]

    def right(model):
        found = vote(continued(model, clips))
        x, y = clips.place(FRAMES - 1)
        return (found.identity == clips.identity) & (found.x == x) & (found.y == y)

    assert type(bundled.model).__name__ == "WAN21_CausalAR"
    assert right(bundled).all()
    kept = compress_model(bundled, settings("k4v4", sink=64, recent=64))
    assert right(kept.host).all()
    # The peak is that of the frames that were seen, 27 at once and exact until the next one.
    assert kept.memory.kept < 0.45 * kept.memory.host and kept.memory.layers == 5
    print(text_of(kept.memory))
    assert "at its peak instead of" in capsys.readouterr().out
    window = compress_model(bundled, settings("lossless", sink=0, recent=0, window=384))
    assert not right(window.host).any()


def test_the_nodes_compress_and_report(bundled, clip, monkeypatch):
    from types import SimpleNamespace

    from server import PromptServer

    from sage_diffusion.nodes.kv import KVCacheCompression, KVCacheReport

    monkeypatch.setattr(PromptServer, "instance", None, raising=False)
    for node in (KVCacheCompression, KVCacheReport):
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None), raising=False)
    model, text, cache = KVCacheCompression.execute("k4v4", bundled, clip, 8, 8).args
    assert [one.kind for one in cache] == ["video", "text"] and model is not bundled
    _, _, before, _ = KVCacheReport.execute("latent", cache).args
    assert before.count("WARNING: no run has used this KV cache yet") == 2
    text.write(prompt=100, length=20)
    after, bars, report, data = KVCacheReport.execute("the text", cache).args
    assert after == "the text" and "at its peak instead of" in report and "WARNING" not in report
    assert bars.shape[0] == 1 and '"kind": "text"' in data and '"video"' not in data
    told = []
    monkeypatch.setattr("sage_diffusion.nodes.kv.show", lambda node, text: told.append(text))
    KVCacheCompression.execute("k4v4", None, clip, window=600)
    KVCacheCompression.execute("k4v4", bundled, clip, window=600)
    assert told == ["k4v4: text\nwithout effect here: window", "k4v4: video and text"]
    with pytest.raises(ValueError, match="needs a model or a clip"):
        KVCacheCompression.execute("k4v4")
