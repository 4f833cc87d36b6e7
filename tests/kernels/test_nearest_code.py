"""Nearest code on the CPU, and the kernel's twin, against float64."""

import pytest
import torch

from sage_diffusion.kernels.vq import blocks, reference, tuning
from sage_diffusion.kernels.vq.terms import METRICS, Terms, terms

#: (N, K, D): no multiple of any tile, more than one tile of latents and of codes, one of each.
SHAPES = [
    (37, 501, 8),
    (700, 777, 4),
    (20, 300, 32),
    (9, 64, 3),
    (5, 30, 2048),
    (3, 5000, 17),
    (1, 1, 3),
]


def oracle(z: torch.Tensor, table: torch.Tensor, metric: str) -> torch.Tensor:
    """Scores in float64."""
    z, table = z.double(), table.double()
    if metric == "cosine":
        table = table / table.norm(dim=1, keepdim=True)
    scores = z @ table.t()
    return scores - 0.5 * table.square().sum(1) if metric == "l2" else scores


def data(n: int, k: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents in views with a stride, and a table whose first code comes once more at the end."""
    g = torch.Generator().manual_seed(n + k + d)
    table = torch.randn(k, d, generator=g).to(dtype)
    table[-1] = table[0]
    z = torch.randn(d, n, generator=g).to(dtype).t()
    z[0] = 2 * table[0]
    return z, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n,k,d", SHAPES)
def test_the_best_code(n, k, d, metric, dtype):
    z, table = data(n, k, d, dtype)
    before = z.clone(), table.clone()
    want = oracle(z, table, metric).argmax(1)
    want[want == k - 1] = 0  # the twin of the first code
    assert torch.equal(blocks.nearest_code(z, table, terms(table, metric)), want)
    twin = reference.nearest_code(z, table, terms(table, metric), block_k=32, splits=3)
    assert torch.equal(twin, want)
    assert torch.equal(z, before[0]) and torch.equal(table, before[1])


def test_equal_codes_give_the_lowest_id_wherever_they_lie():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(7000, 24, generator=g)
    places = torch.randperm(7000, generator=g)[:900]
    table[places] = table[places[0]].clone()
    z = table[places[:40]] + 0.001 * torch.randn(40, 24, generator=g)
    for metric in METRICS:
        got = blocks.nearest_code(10 * z, table, terms(table, metric))
        best = oracle(10 * z, table, metric).amax(1, keepdim=True)
        assert torch.equal(got, (oracle(10 * z, table, metric) >= best - 1e-9).int().argmax(1))


def test_near_ties_are_decided_exactly():
    """Codes that float32 products can't tell apart: the exact best, not the first of them."""
    g = torch.Generator().manual_seed(1)
    base = 100 * torch.randn(1, 64, generator=g)
    table = base + 1e-4 * torch.randn(3000, 64, generator=g)
    z = base + torch.randn(50, 64, generator=g)
    want = oracle(z, table, "l2").argmax(1)
    assert torch.equal(blocks.nearest_code(z, table, terms(table, "l2")), want)
    product = z @ table.t() - 0.5 * table.square().sum(1)
    assert not torch.equal(product.argmax(1), want)  # what float32 alone would say


def test_zero_latents_score_all_codes_alike():
    table = torch.randn(500, 8)
    for metric in ("dot", "cosine"):
        z = torch.zeros(600, 8)
        assert not blocks.nearest_code(z, table, terms(table, metric)).any()


def test_given_terms():
    g = torch.Generator().manual_seed(2)
    z, table = torch.randn(30, 5, generator=g), torch.randn(200, 5, generator=g)
    given = Terms(torch.rand(200, generator=g), torch.randn(200, generator=g))
    want = (z.double() @ table.double().t() * given.scale + given.bias).argmax(1)
    assert torch.equal(blocks.nearest_code(z, table, given), want)
    assert torch.equal(reference.nearest_code(z, table, given, block_k=16, splits=2), want)


def test_scores_that_overflow_are_refused():
    table = torch.full((10, 4), 1e30)
    with pytest.raises(ValueError, match="must fit into float32"):
        blocks.nearest_code(torch.full((2, 4), -1e30), table, terms(table, "l2"))


def test_rounded_operands_are_scored_again_exactly():
    """Of two codes that BF16 can't tell apart the exact one, if they share a tile."""
    table = torch.zeros(64, 16)
    table[3], table[5] = 1.0, 1.001
    z = torch.full((1, 16), 2.0)
    assert torch.equal(table[3].bfloat16(), table[5].bfloat16())
    got = reference.nearest_code(z, table, terms(table, "l2"), rounded=True)
    assert got.item() == 5


@pytest.mark.parametrize(
    "latents,codes,programs", [(1024, 65536, 512), (1024, 4096, 512), (1, 8192, 64)]
)
def test_one_picture_fills_a_card(latents, codes, programs):
    """Four programs per multiprocessor of an RTX 4090 (128 of them), as far as the codes go."""
    config = tuning.launch("sm_89", torch.bfloat16)
    split = tuning.splits(latents, codes, 128, config)
    assert -(-latents // config.block_n) * split >= programs
    assert tuning.splits(65536, codes, 128, config) == 1


@pytest.mark.parametrize("dim,want", [(3, 16), (16, 16), (17, 32), (200, 256)])
def test_padded_dims(dim, want):
    assert tuning.padded_dim(dim) == want
