"""Reference tokens of diffusers' models in few bits."""

import importlib

import pytest
import torch

pytest.importorskip("diffusers")

from sage_diffusion.integrations.diffusers.kv_references import (
    compressed_references,
)

CONTAINERS = {
    "flux2": ("Flux2KVCache", (1, 1)),
    "qwenimage21": ("QwenImage21KVCache", (2,)),
    "glm_image": ("GlmImageKVCache", (2,)),
    "wan_animate_2": ("WanAnimate2KVCache", (2,)),
}


def container(kind):
    """A cache of two layers and these, or a skip where this diffusers lacks it."""
    try:
        module = importlib.import_module(f"diffusers.models.transformers.transformer_{kind}")
        made = getattr(module, CONTAINERS[kind][0])(*CONTAINERS[kind][1])
    except (ImportError, AttributeError):
        pytest.skip(f"this diffusers has no {CONTAINERS[kind][0]}")
    if kind == "flux2":
        return made, [made.get_double(0), made.get_single(0)]
    if kind == "qwenimage21":
        return made, [made.get_layer(0), made.get_layer(1)]
    return made, [made[0], made[1]] if kind == "glm_image" else [made.get(0), made.get(1)]


def references(seed, tokens=96):
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, tokens, 2, 32, generator=random) for _ in "kv")


def read(layer, kind):
    """K and V of the references alone."""
    if kind != "glm_image":
        return layer.get()
    k, v = layer.get(*references(9, 4))
    return k[:, :-4], v[:, :-4]


def near(found, want, limit):
    return all(
        0 < (a - b).norm() / b.norm() < limit and a.shape == b.shape
        for a, b in zip(found, want, strict=True)
    )


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_is_stored_comes_back_and_takes_less(kind):
    cache, layers = container(kind)
    first, second = references(0), references(1)
    layers[0].store(*first)  # before it is compressed
    with compressed_references(cache, "k8v8") as handle:
        layers[1].store(*second)
        for _ in range(2):
            assert near(read(layers[0], kind), first, 0.01)
            assert near(read(layers[1], kind), second, 0.01)
        assert handle.exact_bytes == 4 * first[0].numel() * 4
        assert handle.nbytes < 0.4 * handle.exact_bytes
        if hasattr(cache, "clear"):
            cache.clear()
            assert handle.nbytes == 0
            layers[0].store(*first)
    assert near(read(layers[0], kind), first, 0.01)  # decoded, and the cache's own again
    assert "store" not in vars(layers[0])
    layers[0].store(*second)
    if kind != "glm_image":
        assert torch.equal(layers[0].get()[0], second[0])


def test_lossless_is_bit_equal():
    cache, layers = container("flux2")
    k, v = references(0)
    with compressed_references(cache, "lossless"):
        layers[0].store(k, v)
        found = layers[0].get()
    assert torch.equal(found[0], k) and torch.equal(found[1], v)


def test_pictures_of_one_sample_are_added_and_samples_kept_apart():
    cache, layers = container("glm_image")
    first, more, other = references(0), references(1, 32), references(2)
    with compressed_references(cache, "lossless"):
        layers[0].store(*first)
        layers[0].store(*more)
        cache.next_sample()
        layers[0].store(*references(3, 128))
        k, _ = layers[0].get(*(torch.cat([x, x]) for x in other))
    assert k.shape == (2, 128 + 96, 2, 32)
    assert torch.equal(k[:1, :128], torch.cat([first[0], more[0]], 1))


def test_a_transformer_is_followed_and_let_go():
    cache, layers = container("flux2")

    class Transformer(torch.nn.Module):
        def forward(self, x, kv_cache=None):
            if kv_cache is None:
                made, _ = container("flux2")
                made.get_double(0).store(*references(0))
                return x, made
            return x, kv_cache.get_double(0).get()[0]

    model = Transformer()
    handle = compressed_references(model, "k8v8")
    _, made = model(torch.zeros(1))
    assert made.get_double(0).k_ref is None and handle.exact_bytes > 0
    _, k = model(torch.zeros(1), kv_cache=made)
    assert 0 < (k - references(0)[0]).abs().max() < 0.1
    handle.remove()
    handle.remove()
    assert made.get_double(0).k_ref is not None and not model._forward_hooks
    layers[0].store(*references(4))
    model(torch.zeros(1), kv_cache=cache)
    assert layers[0].k_ref is not None


def test_an_empty_cache_says_what_its_own_class_says():
    cache, layers = container("flux2")
    with compressed_references(cache), pytest.raises(RuntimeError, match="not been populated"):
        layers[0].get()
    for method, said in (("xkv", "K before RoPE"), ("prefixkv", "see no queries")):
        with pytest.raises(ValueError, match=said):
            compressed_references(cache, method)
    with pytest.raises(ValueError, match="list is not a cache of Flux2KVLayerCache"):
        compressed_references([], "k8v8")
