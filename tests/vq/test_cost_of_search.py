"""Predicted bounds of the nearest-code kernel: what it must not lose again."""

import json

import pytest

pytest.importorskip("triton", minversion="3.9")

from sage_diffusion import cli
from sage_diffusion.speed.cost import CostError, NoKernelError
from sage_diffusion.vq.cost import search_costs


@pytest.mark.parametrize("dim,second", [(32, 0.4), (128, 0.3)])
def test_goals(dim, second):
    """Tensor-bound on an RTX 4090: an id beside every score would make the integer pipe bind."""
    (got,) = search_costs(["rtx4090"], [dim])
    assert (got.bound, got.spills, got.head_dim) == ("tensor", 0, dim)
    assert got.second <= second


def test_command(capsys):
    assert cli.main(["cost", "--gpu", "rtx4090", "--latent-dim", "32", "--json"]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    assert (kernel["spec"], kernel["head_dim"]) == ("nearest code, bf16", 32)
    assert cli.main(["cost", "--gpu", "rtx2080ti", "--latent-dim", "32"]) == 1
    assert "Triton needs sm_80 or newer, found sm_75" in capsys.readouterr().err


def test_unknown_cards():
    with pytest.raises(CostError, match="gpu must be one of"):
        search_costs(["rtx1"], [32])
    with pytest.raises(NoKernelError, match="rtx2080ti"):
        search_costs(["rtx2080ti"], [32])
