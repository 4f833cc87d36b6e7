"""Host overhead of our entry points over a bare ``scaled_dot_product_attention``, in microseconds.

    python -m benchmarks.overhead [--json]

Tiny tensors, so that the computation itself costs nothing; best of many rounds on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sage_diffusion import AttentionSession, attention


def best(call: Callable[[], object], rounds: int = 20, repeats: int = 500) -> float:
    """Microseconds per call, the best of ``rounds`` averages."""
    for _ in range(100):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
    return min(times) * 1e6


def measure() -> dict[str, float]:
    """Microseconds beyond the bare call, by entry point."""
    q = torch.randn(1, 2, 8, 16)
    session = AttentionSession("fp16")
    layer = session.layer("blocks.0")
    with torch.no_grad():
        bare = best(lambda: F.scaled_dot_product_attention(q, q, q))
        return {
            "bare call": bare,
            "attention(spec='fp16')": best(lambda: attention(q, q, q, "fp16")) - bare,
            "session layer, fp16": best(lambda: layer(q, q, q)) - bare,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure()
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value:6.1f} us")


if __name__ == "__main__":
    main()
