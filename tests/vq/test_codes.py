"""The public search: what it checks, who computes, what it costs."""

import subprocess
import sys

import pytest
import torch

from sage_diffusion.vq import codes, nearest_code


def test_backends_agree():
    g = torch.Generator().manual_seed(0)
    z, table = torch.randn(300, 8, generator=g), torch.randn(700, 8, generator=g)
    for metric in ("l2", "cosine", "dot"):
        got = [nearest_code(z, table, metric, backend=b) for b in ("auto", "torch", "reference")]
        assert got[0].dtype == torch.int64 and got[0].shape == (300,)
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    near = nearest_code(z, table, rounded=True)
    assert (near == nearest_code(z, table)).float().mean() > 0.9
    assert nearest_code(z[:0], table).shape == (0,)


def test_no_gradient_is_recorded():
    z = torch.randn(4, 3, requires_grad=True)
    assert not nearest_code(z, torch.randn(9, 3)).requires_grad


@pytest.mark.parametrize(
    "z,table,options,message",
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(5, 4),
            {},
            r"z must be a floating matrix, got .*2, 3, 4",
        ),
        (torch.zeros(2, 4), torch.zeros(5, 4, dtype=torch.int64), {}, "table must be a floating"),
        (torch.zeros(2, 4), torch.zeros(5, 3), {}, "the same D, got 4 and 3"),
        (torch.zeros(2, 4), torch.zeros(5, 4, device="meta"), {}, "got cpu and meta"),
        (torch.zeros(2, 4), torch.zeros(0, 4), {}, "must have 1 to 1048576 codes"),
        (torch.zeros(2, 2049), torch.zeros(1, 2049), {}, "of 1 to 2048 dims"),
        (torch.full((2, 4), torch.nan), torch.zeros(5, 4), {}, "latents must be finite"),
        (torch.full((2, 4), torch.inf), torch.zeros(5, 4), {}, "latents must be finite"),
        (
            torch.zeros(2, 4),
            torch.zeros(5, 4),
            {"metric": "l1"},
            "one of l2, cosine, dot, got 'l1'",
        ),
        (torch.zeros(2, 4), torch.zeros(5, 4), {"backend": "faiss"}, "got 'faiss'"),
        (
            torch.zeros(2, 4),
            torch.zeros(5, 4),
            {"backend": "triton"},
            "needs a CUDA or ROCm device",
        ),
    ],
)
def test_bad_input(z, table, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(z, table, **options)


def test_what_a_gpu_is_given(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(codes.importlib.util, "find_spec", lambda name: object())
    assert codes.choose(device) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert codes.choose(device) == "torch"
    with pytest.raises(ValueError, match="triton can't search on cuda: Triton needs sm_80"):
        codes.choose(device, "triton")
    monkeypatch.setattr(codes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        codes.choose(device, "triton")


def test_importing_is_cheap(tmp_path):
    code = """
import sys, torch
for name in ("triton", "diffusers", "transformers", "safetensors", "PIL"):
    sys.modules[name] = None
import sage_diffusion.vq
assert "sage_diffusion.vq.quantizers" not in sys.modules
from sage_diffusion.vq import FSQ, SimVQ, VectorQuantizer, VQOutput, nearest_code
assert set(sage_diffusion.vq.__all__) <= set(dir(sage_diffusion.vq))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
