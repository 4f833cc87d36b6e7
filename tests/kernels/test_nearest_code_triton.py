"""The nearest-code kernel, as compiled, against its twin and against float64.

The simulated card stops at every access out of bounds and every race.
"""

import pytest
import torch
from helpers import card
from test_nearest_code import data, oracle

from sage_diffusion.kernels.vq import reference
from sage_diffusion.kernels.vq.terms import terms

triton = pytest.importorskip("sage_diffusion.kernels.vq.triton")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32

#: Card, type, (N, K, D), metric, splits, rounded.
CASES = {
    "sm80-float": (80, FLOAT, (37, 301, 8), "l2", 3, False),
    "sm80-odd": (80, HALF, (5, 130, 3), "cosine", 1, False),
    "sm80-chunks": (80, BRAIN, (9, 140, 130), "l2", 2, False),
    "sm89-rounded": (89, FLOAT, (37, 301, 12), "cosine", 2, True),
    "sm89-brain": (89, BRAIN, (70, 500, 32), "dot", 4, False),
    "sm90-float": (90, FLOAT, (70, 260, 40), "l2", 2, False),
    "sm90-l2": (90, BRAIN, (70, 260, 32), "l2", 2, False),
    "sm120-cosine": (120, BRAIN, (66, 260, 16), "cosine", 2, False),
    "sm120-one": (120, FLOAT, (1, 1, 1), "dot", 1, False),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel(name):
    cc, dtype, shape, metric, split, rounded = CASES[name]
    z, table = data(*shape, dtype)
    before = z.clone(), table.clone()
    with card(cc) as gpu:
        got = triton.nearest_code(z, table, terms(table, metric), split=split, rounded=rounded)
    assert [name for name, _ in gpu.launches] == ["_tile_maxima_kernel", "_find_code_kernel"]
    assert gpu.launches[0][1][1] == split
    block = 64 if dtype == FLOAT and not rounded and cc != 90 else 128
    twin = reference.nearest_code(
        z, table, terms(table, metric), block_k=block, splits=split, rounded=rounded
    )
    assert torch.equal(got, twin)
    if not rounded:
        want = oracle(z, table, metric).argmax(1)
        want[want == len(table) - 1] = 0  # the twin of the first code
        assert torch.equal(got, want)
    assert torch.equal(z, before[0]) and torch.equal(table, before[1])


def test_mixed_types_are_searched_in_float32():
    z, table = data(6, 90, 8, FLOAT)
    with card(89):
        got = triton.nearest_code(z.half(), table, terms(table, "l2"))
    assert torch.equal(got, reference.nearest_code(z.half().float(), table, terms(table, "l2")))
