"""Bytes that the quantizers move: the count, and that the compiled kernels move so many."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sage_diffusion import AttentionSpec
from sage_diffusion.speed.traffic import launches


@pytest.fixture(scope="module")
def quantize_bytes():
    """``benchmarks`` is no top-level module of the tests."""
    path = Path(__file__).parent.parent / "benchmarks" / "quantize_bytes.py"
    spec = importlib.util.spec_from_file_location("quantize_bytes", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("length", [1024, 4096, 131072])
def test_quantization_moves_little_more_than_it_must(quantize_bytes, length):
    found = quantize_bytes.measure(length)
    assert {row["spec"] for row in found} == {
        "int8/fp16",
        "int8/int8",
        "int8/fp8",
        "int8/fp8-fast",
        "int4/int8",
        "int4/fp8-fast",
        "fp4/fp8-fast",
        "fp4/fp4",
    }
    assert all(1 < row["ratio"] <= 1.105 for row in found)


def test_what_statistics_add_to_the_traffic(quantize_bytes):
    rows = {(row["spec"], row["head_dim"]): row for row in quantize_bytes.measure(4096)}
    row = rows["int4/fp8-fast", 128]
    shares = {n: x / (row["read"] + row["written"]) for n, x in row["statistics"].items()}
    assert shares == pytest.approx({"k": 0.0436, "v": 0.0}, abs=1e-3)


@pytest.fixture
def traffic(monkeypatch):
    """Bytes by kernel, "read" or "written": addresses of global memory that a program touches."""
    pytest.importorskip("triton")
    from ptxvm.machine import Machine

    found, touched = Counter(), {"read": [], "written": []}

    def watch(name, kind):
        original = getattr(Machine, name)

        def watched(self, space, addr, data):
            if space == "global":
                size = data if isinstance(data, int) else data.shape[1]
                touched[kind].append(addr[self.mask][:, None] + np.arange(size, dtype=np.uint64))
            return original(self, space, addr, data)

        monkeypatch.setattr(Machine, name, watched)

    watch("_gather", "read")
    watch("_scatter", "written")
    run = Machine._cta

    def program(self, *args):
        run(self, *args)
        for kind, addresses in touched.items():
            if addresses:
                distinct = np.unique(np.concatenate([a.ravel() for a in addresses]))
                found[self.name, kind] += distinct.size
            addresses.clear()

    monkeypatch.setattr(Machine, "_cta", program)
    return found


@pytest.mark.parametrize(
    ("cc", "name", "head_dim"),
    [
        (89, "int8/fp16", 64),
        (89, "int8/fp8", 128),
        (80, "int8/int8", 64),
        (80, "int8/int8-tile_v", 64),
        (80, "int4/int8", 64),
        (89, "int4/fp8-fast", 64),
        (120, "fp4/fp4", 64),
    ],
)
def test_the_compiled_kernels_move_what_is_counted(traffic, cc, name, head_dim):
    from helpers import card, fused_view

    from sage_diffusion.kernels.attention import gluon, triton

    spec, length = AttentionSpec.parse(name), 130
    q, k, v = (fused_view(1, 1, length, head_dim, seed) for seed in range(3))
    with card(cc):
        (gluon if spec.smooth_q else triton).attention(q, k, v, spec)
    kernels = {kernel for kernel, _ in traffic}
    ours = {k for k in kernels if any(name in k for name in ("quantize", "stats", "sample"))}
    assert kernels - ours == (
        {"attention_kernel", "_bias_kernel"} if spec.smooth_q else {"_attention_fwd_kernel"}
    )
    in_columns = spec.smooth_q
    sums = spec.unsigned_p and not in_columns
    want = launches(spec, length, head_dim, sums, in_columns)
    assert sum(traffic[kernel, "read"] for kernel in ours) == want.read
    assert sum(traffic[kernel, "written"] for kernel in ours) == want.written
