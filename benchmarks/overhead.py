"""Host overhead of our entry points over a bare ``scaled_dot_product_attention``, in microseconds.

    python -m benchmarks.overhead [--json]

Tiny tensors, so that the computation itself costs nothing; best of many rounds on the CPU.
Quantized calls are those of a card that is not here: their kernels are compiled for it, and started
by a driver that does nothing.  What PyTorch needs to start its own operators there is not in that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sage_diffusion import AttentionSession, attention
from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import Call
from sage_diffusion.integrations.comfy.timing import HostClock, Stopwatch
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.machine import triton_version

#: Backend, card and spec of quantized calls.
CALLS = (
    ("triton", "sm_90", "int8/fp16"),
    ("hopper", "sm_90", "int8/fp8"),
    ("gluon", "sm_89", "int8/fp8-fast"),
    ("gluon", "sm_89", "int4/fp8-fast"),
)


def best(call: Callable[[], object], rounds: int = 20, repeats: int = 500) -> float:
    """Microseconds of this process per call, the best of ``rounds`` averages."""
    for _ in range(100):
        call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - start) / repeats)
    return min(times) * 1e6


def _nothing() -> None:
    return None


def measure() -> dict[str, float]:
    """Microseconds beyond the bare call, by entry point."""
    q = torch.randn(1, 2, 8, 16)
    session = AttentionSession("fp16")
    layer = session.layer("blocks.0")
    watch = Stopwatch(HostClock(), compare=False)
    kind = (q.shape, q.shape, q.dtype, False)

    def marked() -> None:
        watch._left = 1
        watch.ours(kind, "fp16", _nothing, None)

    with torch.no_grad():
        bare = best(lambda: F.scaled_dot_product_attention(q, q, q))
        return {
            "bare call": bare,
            "attention(spec='fp16')": best(lambda: attention(q, q, q, "fp16")) - bare,
            "session layer, fp16": best(lambda: layer(q, q, q)) - bare,
            "seconds of a ComfyUI call, taken": best(marked),
        }


def quantized() -> dict[str, float]:
    """Microseconds of quantized calls, by backend, card and spec."""
    from sage_diffusion.verify.ahead import compiler

    # Tokens whose statistics are of one part, which Torch need not join.
    q = torch.zeros(1, 128, 24, 128, dtype=torch.float16).transpose(1, 2)
    found = {}
    for name, arch, text in CALLS:
        run, spec = backends.load(backends.named(name)), AttentionSpec.parse(text)
        with compiler(arch).running():
            found[f"{name} {arch} {text}"] = best(
                lambda run=run, spec=spec: run(Call(q, q, q), spec, False), 40, 20
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure() | (quantized() if triton_version() else {})
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value:6.1f} us")


if __name__ == "__main__":
    main()
