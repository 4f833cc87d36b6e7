"""The launchers under Triton's interpreter, which checks the Python and nothing of FP8."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

PROGRAM = """
import torch
from helpers import fused_view, relative_l1
from sage_diffusion.kernels.attention import reference, triton
from sage_diffusion.kernels.spec import AttentionSpec

q, k, v = fused_view(1, 4, 70, 40, 0), fused_view(1, 2, 130, 40, 1), fused_view(1, 2, 130, 40, 2)
mask = torch.rand(4, 1, 130, generator=torch.Generator().manual_seed(3)) > 0.3
for name in ("int8/fp16", "int8/int8"):
    for options in ({"mask": mask}, {"is_causal": True}):
        spec = AttentionSpec.parse(name)
        out, lse = triton.attention(q, k, v, spec, return_lse=True, **options)
        want, want_lse = reference.attention(q, k, v, spec, **options)
        error = relative_l1(out, want)
        assert error < 1e-3, (name, list(options), error)
        assert (lse - want_lse).abs().max() < 1e-4
print("agrees")
"""


@pytest.mark.skipif(
    triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 reads arrays of one element as NumPy 2.4 no longer does",
)
def test_launchers():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    tests = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join((tests, os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=tests
    )
    assert done.stdout == "agrees\n", done.stderr[-2000:]
