"""What does not fit, or does not pay, is found with a few random tokens."""

import pytest
import torch

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.xkv import XKV
from sage_diffusion.kv.trial import Shape, check

SHAPE = Shape(2, 32, 32, torch.float32, torch.device("cpu"))


class Still:
    """RoPE at position 0."""

    def rotate(self, x, positions, inverse=False):
        return x.float()


def layers(method, count=3, **settings):
    shared = {}
    return [Layer(method, 8, 16, i, rope=Still(), shared=shared, **settings) for i in range(count)]


def test_settings_that_do_not_fit_name_the_layer():
    made = layers(Kivi(2, 2, group=24))[1:]
    with pytest.raises(ValueError, match="layer 1 can't be compressed: groups of 24 channels"):
        check(made, SHAPE)
    check(layers(Kivi(2, 2)), SHAPE, context=1)


def test_bases_across_layers_are_weighed_with_what_they_save():
    """Three layers of 64 channels a side share 96 numbers of K and 144 of V, for 384."""
    method = XKV(group=3, unit=32)
    check(layers(method), SHAPE)
    check(layers(method), SHAPE, context=4096)
    basis, saved = (96 + 144) * 192 * 4, 64 * (384 - 96 - 144) * 4
    told = rf"at 88 tokens: those of 3 layers take {basis} bytes, compression saves {saved}$"
    with pytest.raises(ValueError, match=told):
        check(layers(method), SHAPE, context=88)
