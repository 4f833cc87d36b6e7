"""Quantizers by name and size."""

import pytest

from sage_diffusion.vq.quantizers.recipes import RECIPES, recipe


@pytest.mark.parametrize("kind", RECIPES)
def test_every_kind_alone_in_groups_and_levels(kind):
    assert recipe(kind, 256, 8).bits == 8
    grouped = recipe(kind, 256, 8, groups=2)
    assert (grouped.kind, grouped.bits, grouped.dim, grouped.levels) == ("groups", 16, 8, 1)
    deep = recipe(kind, 256, 8, groups=2, depth=3)
    assert (deep.kind, deep.bits, deep.dim, deep.levels) == ("residual", 48, 8, 3)


@pytest.mark.parametrize("codes,levels", [(4096, [8, 8, 8, 8]), (1024, [16, 8, 8]), (4, [4])])
def test_levels_of_fsq(codes, levels):
    assert recipe("fsq", codes).settings["levels"] == levels
    assert recipe("fsq", codes, levels=[5, 3]).settings["levels"] == [5, 3]


def test_a_cosine_codebook_is_one():
    assert recipe("cosine").settings["metric"] == "cosine"
    assert recipe("vector").settings["metric"] == "l2"


@pytest.mark.parametrize(
    "given,message",
    [
        ({"kind": "vqgan"}, "quantizer must be one of vector, .*, got 'vqgan'"),
        ({"kind": "simvq", "levels": [5]}, "levels are of fsq, got quantizer 'simvq'"),
        ({"kind": "lfq", "codes": 100}, "codes must be a power of two for lfq, got 100"),
        ({"kind": "fsq", "codes": 100}, "codes must be a power of two for fsq without levels"),
        ({"kind": "vector", "groups": 3}, "dim a multiple of groups, got 3, 1, 16"),
        ({"kind": "vector", "depth": 0}, "groups and depth must be 1 or more"),
    ],
)
def test_numbers_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        recipe(**given)
